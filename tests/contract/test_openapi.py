"""The OpenAPI document against the contract: nothing is missing, nothing is more, and its rules refuse what services refuse.

The schema beside this file is the specification's own (https://spec.openapis.org/oas/3.1/schema), as the package
openapi-spec-validator 0.9.0 carries it (Apache-2.0).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import protovalidate
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from buf.validate import validate_pb2
from edge import reference
from edge.contract import HTTP, PublicMethod, public_methods
from edge.openapi import document
from genmesh.credits.v1 import credits_pb2, payments_pb2
from genmesh.identity.v1 import identity_pb2
from genmesh.inference.v1 import inference_pb2
from genmesh.jobs.v1 import jobs_pb2
from genmesh.options.v1 import options_pb2

Json = dict[str, Any]

ENVOY_DIR = Path(__file__).resolve().parents[2] / "envoy"
DESCRIPTORS = ENVOY_DIR / "descriptors.binpb"
DOCUMENT: Json = json.loads((ENVOY_DIR / "openapi.json").read_text())
SCHEMAS: Json = DOCUMENT["components"]["schemas"]
META_SCHEMA = json.loads((Path(__file__).parent / "openapi-3.1-schema.json").read_text())
METHODS = public_methods(DESCRIPTORS)
OPERATIONS = {
    operation["operationId"]: (http_method, path, operation)
    for path, methods in DOCUMENT["paths"].items()
    for http_method, operation in methods.items()
}
SERVED = {file.DESCRIPTOR.package for file in (identity_pb2, jobs_pb2, credits_pb2, payments_pb2, inference_pb2)}
"""Packages whose stubs are imported: the pool knows their methods."""


def _files() -> descriptor_pb2.FileDescriptorSet:
    return descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTORS.read_bytes())


def _camel(path: str) -> str:
    return re.sub(r"_([a-z])", lambda match: match[1].upper(), path)


def _operation_id(method: PublicMethod) -> str:
    return method.name[0].lower() + method.name[1:]


def _validator(schema: Json) -> jsonschema.Draft202012Validator:
    whole = {"$ref": "#/$defs/root", "$defs": {"root": schema}, "components": {"schemas": SCHEMAS}}
    return jsonschema.Draft202012Validator(whole, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)


def _message_class(full_name: str) -> type[Message]:
    return message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(full_name))


def _types(method: PublicMethod) -> tuple[type[Message], type[Message]]:
    found = descriptor_pool.Default().FindMethodByName(f"{method.service}.{method.name}")
    return _message_class(found.input_type.full_name), _message_class(found.output_type.full_name)


def _schemas_within(node: Any) -> Iterator[Json]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "schema":
                yield value
            elif key != "example":
                yield from _schemas_within(value)
    elif isinstance(node, list):
        for value in node:
            yield from _schemas_within(value)


# --- the whole ---------------------------------------------------------------------------------------------------------------


def test_it_is_a_document_of_openapi_3_1() -> None:
    jsonschema.Draft202012Validator(META_SCHEMA).validate(DOCUMENT)
    for schema in (*SCHEMAS.values(), *_schemas_within(DOCUMENT["paths"])):
        jsonschema.Draft202012Validator.check_schema(schema)


def test_what_is_committed_is_what_the_descriptors_make() -> None:
    made = document(_files())
    assert made == DOCUMENT
    assert (ENVOY_DIR / "docs" / "index.html").read_text() == reference.page(made)


def test_every_public_binding_is_there_and_nothing_else() -> None:
    assert {method.service.rpartition(".")[0] for method in METHODS} == SERVED
    bindings = {(binding.http_method, _camel(binding.path)) for method in METHODS for binding in method.bindings}
    assert {(http_method.upper(), path) for http_method, path, _ in OPERATIONS.values()} == bindings
    assert set(OPERATIONS) == {_operation_id(method) for method in METHODS}


def test_every_reference_leads_somewhere_and_every_schema_is_used() -> None:
    text = json.dumps(DOCUMENT)
    used = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    # Objects of errors are reached from Status alone, which every refusal is.
    assert used == set(SCHEMAS)
    for kind in ("responses", "headers"):
        assert set(re.findall(rf'"#/components/{kind}/([^"]+)"', text)) <= set(DOCUMENT["components"][kind])


def test_security_follows_the_options() -> None:
    for method in METHODS:
        security = OPERATIONS[_operation_id(method)][2]["security"]
        assert bool(security) == method.needs_token
    assert OPERATIONS["getJob"][2]["security"] == [{"bearerAuth": []}, {"apiKeyAuth": ["read"]}]
    assert OPERATIONS["createJob"][2]["security"] == [{"bearerAuth": []}, {"apiKeyAuth": ["submit"]}]
    assert OPERATIONS["createApiKey"][2]["security"] == [{"bearerAuth": []}]
    assert OPERATIONS["updateUser"][2]["security"] == [{"bearerAuth": ["admin"]}, {"apiKeyAuth": ["admin"]}]
    assert OPERATIONS["getQueueStats"][2]["security"] == [{"bearerAuth": ["operator"]}, {"apiKeyAuth": ["admin"]}]


def test_refusals_that_comments_name_are_there() -> None:
    responses = OPERATIONS["signIn"][2]["responses"]
    assert {"401", "403", "409", "429", "501"} <= set(responses)
    assert "EMAIL_TAKEN" in responses["409"]["description"]
    # `as RetryJob`, of another service.
    assert {"404", "400"} <= set(OPERATIONS["requeueDeadLetter"][2]["responses"])
    assert "JOB_NOT_FAILED" in OPERATIONS["requeueDeadLetter"][2]["responses"]["400"]["description"]


# --- examples and rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=[method.name for method in METHODS])
def test_examples_are_what_the_contract_says(method: PublicMethod) -> None:
    request_type, answer_type = _types(method)
    _, _, operation = OPERATIONS[_operation_id(method)]
    request: Json = {}
    if "application/json" in (body := operation.get("requestBody", {}).get("content", {})):
        request |= body["application/json"]["example"]
        _validator(body["application/json"]["schema"]).validate(request)
    for parameter in operation.get("parameters", []):
        if "example" in parameter:
            _validator(parameter["schema"]).validate(parameter["example"])
            request[parameter["name"]] = parameter["example"]
    protovalidate.validate(json_format.ParseDict(request, request_type()))
    for content in operation["responses"]["200"]["content"].values():
        _validator(content["schema"]).validate(content["example"])
        json_format.ParseDict(content["example"], answer_type())


def _fill(message: Message, seen: tuple[str, ...] = ()) -> None:
    """Set every field of a message to something, of oneofs the last member."""
    fields: Any = message.DESCRIPTOR.fields
    for field in fields:
        value: Any = getattr(message, field.name)
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            value["key"] = "value"
        elif kind is not None and kind.full_name == "google.protobuf.Any":
            value.add().Pack(_message_class("google.rpc.ErrorInfo")(reason="ERROR_REASON_INTERNAL", domain="genmesh"))  # pyright: ignore[reportCallIssue]  # dynamic
        elif kind is not None and kind.full_name not in seen:
            child: Message = value.add() if field.is_repeated else value
            child.SetInParent()
            if not kind.full_name.startswith("google.protobuf."):
                _fill(child, (*seen, kind.full_name))
        elif kind is None:
            one = _some(field)
            value.append(one) if field.is_repeated else setattr(message, field.name, one)


def _some(field: FieldDescriptor) -> Any:
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            return "x"
        case FieldDescriptor.TYPE_BYTES:
            return b"x"
        case FieldDescriptor.TYPE_BOOL:
            return True
        case FieldDescriptor.TYPE_DOUBLE:
            return 0.5
        case FieldDescriptor.TYPE_INT64:
            return -(2**63)
        case _:
            return 1


@pytest.mark.parametrize("method", METHODS, ids=[method.name for method in METHODS])
@pytest.mark.parametrize("filled", [False, True], ids=["empty", "full"])
def test_answers_as_the_transcoder_prints_them_fit(method: PublicMethod, filled: bool) -> None:
    answer = _types(method)[1]()
    if filled:
        _fill(answer)
    printed = json_format.MessageToDict(answer, always_print_fields_with_no_presence=True)
    schema = OPERATIONS[_operation_id(method)][2]["responses"]["200"]["content"]["application/json"]["schema"]
    _validator(schema).validate(printed)
    assert set(printed) <= set(SCHEMAS[schema["$ref"].rpartition("/")[2]].get("properties", {}))


def _candidates(field: FieldDescriptor) -> Iterator[Any]:
    """Values on both sides of every rule there is, and of the type itself."""
    rules = field.GetOptions().Extensions[validate_pb2.field]  # pyright: ignore[reportArgumentType]  # its stub does not know
    bounds = [bound for _, kind in rules.ListFields() if isinstance(kind, Message) for _, bound in kind.ListFields()]
    numbers = [number for number in bounds if isinstance(number, int | float) and not isinstance(number, bool)]
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            yield from (
                "",
                "x",
                "A_b-9",
                "a@example.com",
                "not a uuid",
                "0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0001",
                "image/png",
                "0123456789abcdef",
            )
            yield from ("x" * (int(number) + more) for number in numbers for more in (-1, 0, 1))
            yield from ("ä" * (int(number) + more) for number in numbers for more in (0, 1))
        case FieldDescriptor.TYPE_INT32 | FieldDescriptor.TYPE_INT64:
            limit = 2**31 if field.type == FieldDescriptor.TYPE_INT32 else 2**63
            yield from {0, -1, 1, limit - 1, limit, -limit, -limit - 1} | {int(number) + more for number in numbers for more in (-1, 0, 1)}
        case FieldDescriptor.TYPE_DOUBLE:
            yield from {0.0, -0.5, 1e300} | {float(number) + more for number in numbers for more in (-0.5, 0, 0.5)}
        case FieldDescriptor.TYPE_ENUM if field.enum_type is not None:
            yield from (*field.enum_type.values_by_name, "NO_SUCH_NAME")
        case _:
            return


def _requests(message: Descriptor, seen: set[str]) -> Iterator[Descriptor]:
    if message.full_name not in seen and message.full_name.startswith("genmesh."):
        seen.add(message.full_name)
        yield message
        for field in message.fields:
            if field.message_type is not None:
                yield from _requests(field.message_type, seen)


def test_rules_refuse_what_services_refuse() -> None:
    """One field at a time, in every message that requests are made of: the schema and the validator of the services say the same."""
    compared = 0
    seen: set[str] = set()
    for method in METHODS:
        if not any("{" not in binding.path for binding in method.bindings):
            continue
        descriptor: Any = _types(method)[0].DESCRIPTOR
        for message in _requests(descriptor, seen):
            name = message.name if f"{message.name}Input" not in SCHEMAS else f"{message.name}Input"
            if name not in SCHEMAS:
                continue  # all in the query
            for field in message.fields:
                compared += _compare(message, field, name)
    assert compared > 300


def _compare(message: Descriptor, field: FieldDescriptor, name: str) -> int:
    schema = SCHEMAS[name]["properties"][field.json_name]
    count = 0
    for value in _candidates(field):
        said = [value] if field.is_repeated else value
        in_schema = _validator(schema).is_valid(said)
        try:
            parsed = json_format.ParseDict({field.json_name: said}, _message_class(message.full_name)())
            paths = [violation.proto.field for violation in protovalidate.collect_violations(parsed)]
            # Fields that are not there are not what is looked at.
            broken = [path for path in paths if path is not None and path.elements[0].field_name == field.name]
            valid = not broken
        except json_format.ParseError:
            valid = False
        if said == "" and not in_schema and valid and field.GetOptions().Extensions[validate_pb2.field].ignore:  # pyright: ignore[reportArgumentType]
            continue  # empty means left out, which is how the document says it
        assert in_schema == valid, (message.full_name, field.name, value)
        count += 1
    return count


def test_what_is_required_is_what_services_miss() -> None:
    for name, message in (("CreateJobRequest", jobs_pb2.CreateJobRequest), ("RegisterUserRequest", identity_pb2.RegisterUserRequest)):
        assert not _validator(SCHEMAS[name]).is_valid({})
        for field in SCHEMAS[name]["required"]:
            example = dict(
                next(op for _, _, op in OPERATIONS.values() if _body_name(op) == name)["requestBody"]["content"]["application/json"][
                    "example"
                ]
            )
            del example[field]
            assert not _validator(SCHEMAS[name]).is_valid(example)
            with pytest.raises(protovalidate.ValidationError):
                protovalidate.validate(json_format.ParseDict(example, message()))


def _body_name(operation: Json) -> str:
    return (
        operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
    )


def test_of_a_choice_exactly_one_is_taken() -> None:
    validator = _validator(SCHEMAS["SignInRequest"])
    assert validator.is_valid({"apiKey": "k"})
    assert not validator.is_valid({})
    assert not validator.is_valid({"apiKey": "k", "googleIdToken": "t"})


# --- it follows the contract -------------------------------------------------------------------------------------------------


def _method_of(files: descriptor_pb2.FileDescriptorSet, name: str) -> descriptor_pb2.MethodDescriptorProto:
    return next(method for file in files.file for service in file.service for method in service.method if method.name == name)


def _field_of(files: descriptor_pb2.FileDescriptorSet, message: str, name: str) -> descriptor_pb2.FieldDescriptorProto:
    return next(
        field for file in files.file for one in file.message_type if one.name == message for field in one.field if field.name == name
    )


def _rules(field: descriptor_pb2.FieldDescriptorProto) -> validate_pb2.FieldRules:
    return field.options.Extensions[validate_pb2.field]  # pyright: ignore[reportArgumentType,reportReturnType]


def test_a_changed_rule_changes_it() -> None:
    files = _files()
    _rules(_field_of(files, "ImageSpec", "prompt")).string.max_len = 5
    assert document(files)["components"]["schemas"]["ImageSpecInput"]["properties"]["prompt"]["maxLength"] == 5


def test_a_new_field_and_a_new_binding_are_in_it() -> None:
    files = _files()
    message = next(one for file in files.file for one in file.message_type if one.name == "ListModelsRequest")
    message.field.add(name="only_loaded", json_name="onlyLoaded", number=99, type="TYPE_BOOL", label="LABEL_OPTIONAL")
    _method_of(files, "ListModels").options.Extensions[HTTP].additional_bindings.add(get="/v1/catalogue")
    paths = document(files)["paths"]
    assert [one["name"] for one in paths["/v1/models"]["get"]["parameters"]] == ["onlyLoaded"]
    assert paths["/v1/catalogue"]["get"]["operationId"] == "listModels_2"


def test_changed_access_changes_it() -> None:
    files = _files()
    _method_of(files, "ListModels").options.Extensions[options_pb2.access] = options_pb2.ACCESS_PUBLIC
    assert document(files)["paths"]["/v1/models"]["get"]["security"] == []


def test_what_it_has_no_words_for_stops_it() -> None:
    files = _files()
    _rules(_field_of(files, "ImageSpec", "prompt")).string.contains = "tiger"
    with pytest.raises(ValueError, match=r"ImageSpec\.prompt: no words for the rule string\.contains"):
        document(files)
    files = _files()
    _method_of(files, "ListModels").options.Extensions[options_pb2.access] = options_pb2.ACCESS_SERVICE
    with pytest.raises(ValueError, match="ListModels has a REST binding but may not be called"):
        document(files)
    files = _files()
    _method_of(files, "ListModels").options.Extensions[HTTP].get = "/v1/{name=models/*}"
    with pytest.raises(ValueError, match="no words for the path"):
        document(files)


# --- the page ----------------------------------------------------------------------------------------------------------------


def test_the_page_shows_every_method_and_needs_nothing_but_its_style() -> None:
    page = (ENVOY_DIR / "docs" / "index.html").read_text()
    for name, (_, path, _) in OPERATIONS.items():
        assert f'<article id="{name}">' in page
        assert f"<code>{path}</code>" in page
    targets = set(re.findall(r'href="#([^"]+)"', page))
    assert targets <= set(re.findall(r'id="([^"]+)"', page))
    # What a policy of `default-src 'none'; style-src 'self'` would stop.
    assert not re.search(r"<script|<img|<iframe|<form|<style|\sstyle=|\son[a-z]+=|javascript:|@import|url\(", page)
    assert set(re.findall(r'(?:href|src)="([^#"][^"]*)"', page)) == {"/docs/style.css", "/openapi.json"}
    style = (ENVOY_DIR / "docs" / "style.css").read_text()
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_escapes_what_comments_say() -> None:
    hostile = json.loads(json.dumps(DOCUMENT).replace("GetMe answers with", "<script>alert(1)</script> & `<b>` answers with"))
    page = reference.page(hostile)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
