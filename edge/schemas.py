"""JSON schemas of the messages that REST carries, as Envoy's transcoder reads and prints them, made from a descriptor set.

Requests have the rules of buf.validate. What there are no words for raises ValueError.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import protovalidate
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from buf.validate import validate_pb2
from edge.examples import DURATION, EXAMPLES, TIMESTAMP, Json, Side

PUBLIC_PACKAGE = "genmesh."
ERROR_REASON = "genmesh.errors.v1.ErrorReason"
DETAILS = ("ErrorInfo", "BadRequest", "RetryInfo", "QuotaFailure")
"""Messages of google.rpc that errors carry."""
OWN_WORDS = {
    "google.rpc.Status": "What every answer but 200 is.",
    "google.rpc.Status.code": "gRPC code: a number of google.rpc.Code, for example 3 (INVALID_ARGUMENT) or 5 (NOT_FOUND).",
    "google.rpc.Status.message": "What is wrong, in English, for people who write programs.",
    "google.rpc.Status.details": "What programs can use: one ErrorInfo, and what else applies.",
    "google.rpc.ErrorInfo": "The machine-readable reason of a refusal.",
    "google.rpc.RetryInfo": "When to try again.",
    "google.rpc.RetryInfo.retry_delay": "Wait at least this long.",
}
"""Said in place of comments that were written for everybody's services."""
# Their stubs do not say which messages these extend.
FIELD_RULES: Any = validate_pb2.field
MESSAGE_RULES: Any = validate_pb2.message

INT32_BOUNDS: Json = {"minimum": -(2**31), "maximum": 2**31 - 1}
NUMBER_RULES = {"gte": "minimum", "lte": "maximum", "gt": "exclusiveMinimum", "lt": "exclusiveMaximum"}
STRING_RULES = {"min_len": "minLength", "max_len": "maxLength", "pattern": "pattern", "in": "enum"}
STRING_FORMATS = ("uuid", "email", "uri")
REPEATED_RULES = {"min_items": "minItems", "max_items": "maxItems", "unique": "uniqueItems"}
_CODE = re.compile(r"`([a-z0-9_]+)`")
_LINK = re.compile(r"\[([^\]]+)\]\[[^\]]*\]")


class Schemas:
    """Schemas by name, written down when first asked for.

    `answered` are full names of messages in answers: one that is in requests too has a second schema, `…Input`.
    """

    def __init__(self, pool: descriptor_pool.DescriptorPool, comments: dict[str, str], answered: set[str]) -> None:
        self.by_name: Json = {}
        self._pool = pool
        self._comments = comments
        self._answered = answered
        self._owners: dict[str, str] = {}

    def resolve(self, schema: Json) -> Json:
        """The schema itself, where it is a reference."""
        return self.by_name[schema["$ref"].rpartition("/")[2]] | schema if "$ref" in schema else schema

    def message(self, message: Descriptor, side: Side, without: Sequence[str] = ()) -> Json:
        """A reference to the schema of a message, without the fields named."""
        name = _name(message)
        if side == "request" and message.full_name in self._answered:
            name += "Input"
        self._own(name, message.full_name)
        if name not in self.by_name:
            self.by_name[name] = {}  # messages that contain themselves end here
            self.by_name[name].update(self._object(message, side, without))
        elif {message.fields_by_name[field].json_name for field in without} & set(self.by_name[name].get("properties", {})):
            raise ValueError(f"{message.full_name}: two bindings have different variables in their paths")
        return {"$ref": f"#/components/schemas/{name}"}

    def _object(self, message: Descriptor, side: Side, without: Sequence[str]) -> Json:
        fields = [field for field in message.fields if field.name not in without]
        schema: Json = {"type": "object", "description": self._comments.get(message.full_name, "")}
        if fields:
            schema["properties"] = {field.json_name: self.field(field, side) for field in fields}
        violated = required_fields(message) if side == "request" else set[str]()
        required = [field.json_name for field in fields if (field.name in violated if side == "request" else not field.has_presence)]
        if required:
            schema["required"] = required
        choices: list[Json] = []
        for oneof in message.oneofs:
            members = [field for field in oneof.fields if oneof.name != f"_{field.name}"]  # such a one makes `optional`
            if members:
                one_each: list[Json] = [{"required": [field.json_name]} for field in members]
                choices.append({"oneOf": one_each if oneof.name in violated else [*one_each, {"not": {"anyOf": one_each}}]})
        schema |= choices[0] if len(choices) == 1 else {"allOf": choices} if choices else {}
        if side == "request":
            for rule in message.GetOptions().Extensions[MESSAGE_RULES].cel:
                schema["description"] += f" Rule: {rule.message}."
        if message.full_name.startswith("google.rpc.") and message.name in DETAILS:
            self._detail(message, schema)
        return schema

    def _detail(self, message: Descriptor, schema: Json) -> None:
        """A message in an Any says its type; an ErrorInfo of ours has a reason of ours."""
        properties = {"@type": {"const": f"type.googleapis.com/{message.full_name}"}, **schema.get("properties", {})}
        if message.name == "ErrorInfo":
            properties["reason"] = self._enum(self._pool.FindEnumTypeByName(ERROR_REASON))
            properties["domain"] = {"const": "genmesh", "description": "Always `genmesh`."}
        schema |= {"properties": properties, "required": ["@type", *schema.get("required", [])]}

    def _enum(self, enum: EnumDescriptor) -> Json:
        name = _name(enum)
        self._own(name, enum.full_name)
        scope = enum.full_name.rpartition(".")[0]
        values = [(value.name, self._comments.get(f"{scope}.{value.name}", "")) for value in enum.values]
        lines = "\n".join(f"- `{value}`: {text}" for value, text in values)
        said = self._comments.get(enum.full_name, "")
        self.by_name[name] = {"type": "string", "description": f"{said}\n\n{lines}", "enum": [value for value, _ in values]}
        return {"$ref": f"#/components/schemas/{name}"}

    def _own(self, name: str, full_name: str) -> None:
        if self._owners.setdefault(name, full_name) != full_name:
            raise ValueError(f"{full_name} and {self._owners[name]} would both be {name}")

    def field(self, field: FieldDescriptor, side: Side) -> Json:
        """The schema of a field, with its description and example."""
        rules = field.GetOptions().Extensions[FIELD_RULES] if side == "request" else validate_pb2.FieldRules()
        kind = field.message_type
        notes = [self._comments.get(field.full_name, "")]
        if kind is not None and kind.GetOptions().map_entry:
            if _constraints(rules, field, notes):
                raise ValueError(f"{field.full_name}: no words for rules of a map")
            schema: Json = {"type": "object", "additionalProperties": self._single(kind.fields_by_name["value"], side, {})}
        elif field.is_repeated:
            schema = {"type": "array", **_constraints(rules, field, notes)}
            schema["items"] = self._single(field, side, _constraints(rules.repeated.items, field, notes))
        else:
            schema = self._single(field, side, _constraints(rules, field, notes))
        schema["description"] = " ".join(note for note in notes if note)
        example = EXAMPLES.get(f"{field.containing_type.name}.{field.json_name}" if field.containing_type else "")
        if example is None and "$ref" not in schema:
            example = EXAMPLES.get(field.json_name)
        if example is not None:
            schema["examples"] = [example]
        return schema

    def _single(self, field: FieldDescriptor, side: Side, constraints: Json) -> Json:
        match field.type:
            case FieldDescriptor.TYPE_STRING:
                return {"type": "string", **constraints}
            case FieldDescriptor.TYPE_BOOL:
                return {"type": "boolean"}
            case FieldDescriptor.TYPE_BYTES:
                return {"type": "string", "contentEncoding": "base64", **constraints}
            case FieldDescriptor.TYPE_INT32:
                return {"type": "integer", "format": "int32", **INT32_BOUNDS, **constraints}
            case FieldDescriptor.TYPE_INT64 if side == "answer":
                return {"type": "string", "format": "int64", "pattern": "^-?[0-9]{1,19}$"}
            case FieldDescriptor.TYPE_INT64:
                pattern = _digits(constraints.get("minimum"), constraints.get("maximum"))
                bounds = {"minimum": -(2**63), "maximum": 2**63 - 1} | constraints
                return {"type": ["string", "integer"], "format": "int64", "pattern": pattern, **bounds}
            case FieldDescriptor.TYPE_DOUBLE:
                return {"type": "number", "format": "double", **constraints}
            case FieldDescriptor.TYPE_ENUM if field.enum_type is not None:
                return {**self._enum(field.enum_type), **constraints}
            case FieldDescriptor.TYPE_MESSAGE if field.message_type is not None:
                return self._nested(field.message_type, side)
            case _:
                raise ValueError(f"{field.full_name}: no words for its type")

    def _nested(self, message: Descriptor, side: Side) -> Json:
        if message.full_name == "google.protobuf.Timestamp":
            return dict(TIMESTAMP)
        if message.full_name == "google.protobuf.Duration":
            return dict(DURATION)
        if message.full_name == "google.protobuf.Any" and side == "answer":
            details = (self._pool.FindMessageTypeByName(f"google.rpc.{name}") for name in DETAILS)
            return {"anyOf": [self.message(detail, "answer") for detail in details]}
        if message.full_name.startswith((PUBLIC_PACKAGE, "google.rpc.")):
            return self.message(message, side)
        raise ValueError(f"no words for {message.full_name}")


def required_fields(message: Descriptor) -> set[str]:
    """Fields and oneofs that cannot be left out: those whose rules an empty message breaks."""
    empty: Message = message_factory.GetMessageClass(message)()
    paths = (violation.proto.field for violation in protovalidate.collect_violations(empty))
    return {path.elements[0].field_name for path in paths if path is not None}


def _constraints(rules: validate_pb2.FieldRules, field: FieldDescriptor, notes: list[str]) -> Json:
    """JSON Schema keywords for the rules of a field; what only words can say goes to the notes."""
    found: Json = {}
    for kind, value in rules.ListFields():
        match kind.name:
            case "required" | "ignore":
                pass
            case "cel":
                notes += [f"It {rule.message}." for rule in value]
            case "string" | "int32" | "int64" | "double" | "enum" | "repeated" | "timestamp":
                for rule, bound in value.ListFields():
                    found |= _keyword(field, kind.name, rule.name, bound, notes)
            case _:
                raise ValueError(f"{field.full_name}: no words for rules of {kind.name}")
    return found


def _keyword(field: FieldDescriptor, kind: str, rule: str, bound: Any, notes: list[str]) -> Json:
    match kind, rule:
        case "string", "in":
            return {"enum": list(bound)}
        case "string", _ if rule in STRING_RULES:
            return {STRING_RULES[rule]: bound}
        case "string", _ if rule in STRING_FORMATS:
            return {"format": rule}
        case "int32" | "int64" | "double", _ if rule in NUMBER_RULES:
            return {NUMBER_RULES[rule]: bound}
        case "enum", "not_in" if field.enum_type is not None:
            return {"not": {"enum": [field.enum_type.values_by_number[number].name for number in bound]}}
        case "repeated", "items":
            return {}  # of the items, see _field
        case "repeated", _ if rule in REPEATED_RULES:
            return {REPEATED_RULES[rule]: bound}
        case "timestamp", "gt_now":
            notes.append("It has to be in the future.")
            return {}
        case ("enum", "defined_only") | ("double", "finite"):
            return {}  # names and JSON numbers cannot be anything else
        case _:
            raise ValueError(f"{field.full_name}: no words for the rule {kind}.{rule}")


def _digits(minimum: int | None, maximum: int | None) -> str:
    """Pattern of a 64-bit integer in a string: its sign, and no more digits than the largest has."""
    count = len(str(maximum if maximum is not None else 2**63 - 1))
    if minimum is None:
        return f"^-?[0-9]{{1,{count}}}$"
    return f"^[0-9]{{1,{count}}}$" if minimum <= 0 else f"^[1-9][0-9]{{0,{count - 1}}}$"


def reachable(message: Descriptor, seen: set[str] | None = None) -> set[str]:
    """Full names of a message and of all that it can contain."""
    found = set[str]() if seen is None else seen
    if message.full_name not in found:
        found.add(message.full_name)
        for field in message.fields:
            if field.message_type is not None:
                reachable(field.message_type, found)
    return found


def _name(kind: Descriptor | EnumDescriptor) -> str:
    """Its name within its package."""
    return kind.full_name.removeprefix(f"{kind.file.package}.")


def comments(files: descriptor_pb2.FileDescriptorSet) -> dict[str, str]:
    """Comments by the full name of what they stand above, a line each paragraph, with the names that fields have in JSON."""
    json_names = {
        field.name: field.json_name
        for file in files.file
        if file.package.startswith(PUBLIC_PACKAGE)
        for message in _messages(file.message_type)
        for field in message.field
    }
    found: dict[str, str] = {}
    for file in files.file:
        for location in file.source_code_info.location:
            at = _declaration(file, location.path)
            if not location.leading_comments or at is None:
                continue
            name, is_value = at
            paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", location.leading_comments)]
            text = "\n\n".join(paragraphs[:1] if file.package == "google.rpc" else paragraphs)
            text = _LINK.sub(r"\1", text)
            if not is_value:  # those of ErrorReason name keys of metadata, which are no fields
                text = _CODE.sub(lambda match: f"`{json_names.get(match[1], match[1])}`", text)
            found[f"{file.package}.{name}"] = text
    return found | OWN_WORDS


def _messages(messages: Iterable[descriptor_pb2.DescriptorProto]) -> Iterator[descriptor_pb2.DescriptorProto]:
    for message in messages:
        yield message
        yield from _messages(message.nested_type)


_CHILDREN = {
    "FileDescriptorProto": {4: "message_type", 5: "enum_type", 6: "service"},
    "DescriptorProto": {2: "field", 3: "nested_type", 4: "enum_type", 8: "oneof_decl"},
    "EnumDescriptorProto": {2: "value"},
    "ServiceDescriptorProto": {2: "method"},
}


def _declaration(file: descriptor_pb2.FileDescriptorProto, path: Sequence[int]) -> tuple[str, bool] | None:
    """Name of the declaration at a path of source_code_info, and whether it is a value of an enum; None for what has no name."""
    here: Any = file
    names: list[str] = []
    children: str | None = None
    for number, index in zip(path[::2], path[1::2], strict=False):
        children = _CHILDREN.get(type(here).__name__, {}).get(number)
        if children is None:
            return None
        if children == "value":
            names.pop()  # values are named beside their enum
        here = getattr(here, children)[index]
        names.append(here.name)
    return (".".join(names), children == "value") if names and len(path) % 2 == 0 else None
