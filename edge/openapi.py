"""The OpenAPI 3.1 document of the REST interface, made from the descriptor set: `python -m edge.openapi` (a part of `make gen`).

It describes what Envoy's transcoder does with the options of `envoy/envoy.yaml`. What it has no words for raises ValueError, so
that the document never says less than the contract by accident. Why not a generator of others: docs/adr/0021-openapi.md.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from google.api import annotations_pb2, http_pb2
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor

from edge import reference
from edge.contract import HTTP_METHODS
from edge.examples import Json, example
from edge.schemas import Schemas, comments, reachable, required_fields
from genmesh.options.v1 import options_pb2

ENVOY_DIR = Path(__file__).resolve().parent.parent / "envoy"
HTTP: Any = annotations_pb2.http  # its stub does not say which message it extends

# The transcoder's mapping of gRPC codes.
HTTP_STATUS = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "INTERNAL": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
# What any call can be told, by HTTP status: component, what it says, whether it applies to a method.
SHARED_REFUSALS = {
    400: (
        "InvalidArgument",
        "INVALID_ARGUMENT: the request is not JSON of the right form, has an unknown query parameter, or breaks a rule.",
    ),
    401: ("Unauthenticated", "UNAUTHENTICATED: no access token or API key, or one that is not good (any more)."),
    403: ("PermissionDenied", "PERMISSION_DENIED: the caller is known but may not do this; of an API key, its scope is missing."),
    404: ("NotFound", "NOT_FOUND: no such resource, or it is somebody else's."),
    413: ("TooLarge", "RESOURCE_EXHAUSTED (REQUEST_TOO_LARGE): the body is larger than 2 MiB."),
    429: ("ResourceExhausted", "RESOURCE_EXHAUSTED: a limit on rate was reached; RetryInfo and `retry-after` say when to try again."),
    500: ("Internal", "INTERNAL: a fault of ours; metadata `error_id` names the log line."),
    503: ("Unavailable", "UNAVAILABLE: a store or service is out of reach right now; RetryInfo and `retry-after` say when to try again."),
    504: (
        "DeadlineExceeded",
        "DEADLINE_EXCEEDED: there was no answer in time. It may still have happened: repeat it with the same id.",
    ),
}

INTRODUCTION = """\
Everything that the mesh offers, as JSON over HTTP. The same methods are there over gRPC and grpc-web on the same port; these
pages are made from their proto files.

**Who calls.** Methods say what they need. People sign in (`POST /v1/sessions`) and send `authorization: Bearer ACCESS_TOKEN`;
programs send `x-api-key: KEY`, as far as the scopes of the key go. One of the two, not both.

**JSON.** Names of fields are in lowerCamelCase. 64-bit integers are strings in answers, because JSON numbers are not that precise
in many languages; requests may have either. Enums are names, times RFC 3339, bytes base64. Answers have every field, but for
objects, choices and optional values that are not set. In requests absent and `null` are the same, and unknown fields are ignored;
unknown query parameters are refused. A body is at most 2 MiB.

**Errors.** Every answer but 200 is a `Status`. Programs branch on the `reason` of its `ErrorInfo`, never on words.

**Repeating.** A request with a `requestId` is safe to repeat with the same one. Refusals that pass have a `RetryInfo` and a header
`retry-after`, which say when to try again.

**Streams.** Methods that watch answer with one JSON object a line as things happen; with `accept: text/event-stream`, with
server-sent events, whose `data` is the object. Resume with the newest `resumeToken`, where there is one.

**Lists.** `pageSize` bounds a page; `nextPageToken` of the answer is the `pageToken` of the next request, and empty on the last
page.

**Support.** Every answer has an `x-request-id`, which log lines have too; only bytes that are no HTTP request get one without.
"""

_PATH_VARIABLE = re.compile(r"\{([a-z0-9_]+)\}")
_CODE_NAME = re.compile(rf"\b({'|'.join(HTTP_STATUS)})\b")
_AS_METHOD = re.compile(r"\bas ([A-Z]\w+)")


def document(files: descriptor_pb2.FileDescriptorSet) -> Json:
    """The OpenAPI document of the methods that have a REST binding. Raises ValueError for what it cannot describe."""
    return _Writer(files).document()


class _Writer:
    def __init__(self, files: descriptor_pb2.FileDescriptorSet) -> None:
        self._pool = descriptor_pool.DescriptorPool()
        for file in files.file:
            self._pool.Add(file)
        self._comments = comments(files)
        self._methods = [
            method
            for file in files.file
            for service in file.service
            for method in self._pool.FindServiceByName(f"{file.package}.{service.name}").methods
            if method.GetOptions().HasExtension(HTTP)
        ]
        answered = {name for method in self._methods for name in reachable(method.output_type)}
        self._schemas = Schemas(self._pool, self._comments, answered)

    def document(self) -> Json:
        paths: dict[str, Json] = {}
        names: set[str] = set()
        for method in self._methods:
            for number, (http_method, path, rule) in enumerate(_bindings(method)):
                operation = self._operation(method, path, rule)
                if number:
                    operation["operationId"] += f"_{number + 1}"
                if operation["operationId"] in names or http_method in paths.get(path, {}):
                    raise ValueError(f"{method.full_name}: its name or its binding {http_method} {path} is there twice")
                names.add(operation["operationId"])
                paths.setdefault(_PATH_VARIABLE.sub(lambda match: f"{{{_camel(match[1])}}}", path), {})[http_method] = operation
        status = {"application/json": {"schema": self._schemas.message(self._pool.FindMessageTypeByName("google.rpc.Status"), "answer")}}
        services = list({method.containing_service.full_name: method.containing_service for method in self._methods}.values())
        return {
            "openapi": "3.1.0",
            "info": {
                "title": "Genmesh",
                "version": "v1",
                "summary": "Generative media: priced, queued, streamed, stored and settled exactly once.",
                "description": INTRODUCTION,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/"}],
            "tags": [{"name": service.name, "description": self._comments.get(service.full_name, "")} for service in services],
            "paths": paths,
            "components": {
                "schemas": dict(sorted(self._schemas.by_name.items())),
                "responses": {
                    name: {"description": text, "headers": _headers(number), "content": status}
                    for number, (name, text) in SHARED_REFUSALS.items()
                },
                "headers": {
                    "RequestId": {"description": "Id of the request, which log lines carry too.", "schema": {"type": "string"}},
                    "RetryAfter": {
                        "description": "Seconds until the request may be repeated: RetryInfo, rounded up.",
                        "schema": {"type": "integer", "minimum": 0},
                    },
                },
                "securitySchemes": {
                    "bearerAuth": {
                        "type": "http",
                        "scheme": "bearer",
                        "bearerFormat": "JWT",
                        "description": "Access token of SignIn or RefreshSession. The names beside it are roles: one of them is needed.",
                    },
                    "apiKeyAuth": {
                        "type": "apiKey",
                        "in": "header",
                        "name": "x-api-key",
                        "description": "API key of CreateApiKey. The names beside it are the scopes that the key needs.",
                    },
                },
            },
        }

    # --- methods -------------------------------------------------------------------------------------------------------------

    def _operation(self, method: MethodDescriptor, path: str, rule: http_pb2.HttpRule) -> Json:
        if rule.response_body or method.client_streaming:
            raise ValueError(f"{method.full_name}: no words for response_body or a stream of requests")
        in_path = _PATH_VARIABLE.findall(path)
        if "{" in _PATH_VARIABLE.sub("", path):
            raise ValueError(f"{method.full_name}: no words for the path {path}")
        fields = method.input_type.fields_by_name
        parameters = [self._parameter(method, fields[name], "path") for name in in_path]
        operation: Json = {
            "operationId": method.name[0].lower() + method.name[1:],
            "tags": [method.containing_service.name],
            "summary": _sentences(self._comments.get(method.full_name, ""))[0],
            "description": self._comments.get(method.full_name, ""),
            **_security(method),
        }
        if rule.body == "*":
            body = self._body(method, in_path)
        else:
            body = self._raw_body(fields[rule.body]) if rule.body else None
            parameters += [self._parameter(method, field, "query") for name, field in fields.items() if name not in (*in_path, rule.body)]
        if parameters:
            operation["parameters"] = parameters
        if body:
            operation["requestBody"] = body
        operation["responses"] = self._responses(method, bool(in_path), bool(body))
        return operation

    def _parameter(self, method: MethodDescriptor, field: FieldDescriptor, place: Literal["path", "query"]) -> Json:
        kind = field.message_type
        if kind is not None and kind.full_name != "google.protobuf.Timestamp":
            raise ValueError(f"{field.full_name}: no words for a message in a {place}")
        schema = self._schemas.field(field, "request")
        parameter: Json = {"name": field.json_name, "in": place, "description": schema.pop("description"), "schema": schema}
        if place == "path" or field.name in required_fields(method.input_type):
            parameter["required"] = True
        if examples := schema.pop("examples", None):
            parameter["example"] = examples[0]
        return parameter

    def _body(self, method: MethodDescriptor, in_path: Sequence[str]) -> Json | None:
        message = method.input_type
        if len(in_path) == len(message.fields):
            return None  # nothing is left to say: the transcoder takes no body for an empty one
        ref = self._schemas.message(message, "request", without=in_path)
        schema = self._schemas.resolve(ref)
        return {
            "required": "required" in schema or "oneOf" in schema,
            "content": {"application/json": {"schema": ref, "example": example(schema, self._schemas.resolve, "request")}},
        }

    def _raw_body(self, field: FieldDescriptor) -> Json:
        if field.message_type is None or field.message_type.full_name != "google.api.HttpBody":
            raise ValueError(f"{field.full_name}: no words for a body that is a single field")
        return {"required": True, "description": self._comments.get(field.full_name, ""), "content": {"*/*": {}}}

    def _responses(self, method: MethodDescriptor, with_path_variable: bool, with_body: bool) -> Json:
        ref = self._schemas.message(method.output_type, "answer")
        answer: Json = {"schema": ref, "example": example(ref, self._schemas.resolve, "answer")}
        said = self._comments.get(method.output_type.full_name, "")
        ok: Json = {"description": said, "headers": REQUEST_ID, "content": {"application/json": answer}}
        if method.server_streaming:
            ok["description"] = (
                f"{said}\n\nA stream: one such object a line, as things happen. With `accept: text/event-stream`: one server-sent event "
                "each, whose `data` is the object."
            )
            ok["content"]["text/event-stream"] = answer
        # 401 and 403 everywhere: a token that is not needed has to be good all the same, and browsers are told by their origin.
        statuses = {400, 401, 403, 429, 500, 503, 504}
        statuses |= {404} if with_path_variable else set()
        statuses |= {413} if with_body else set()
        special: dict[int, list[str]] = {}
        for code, words in self._refusals(method):
            special.setdefault(HTTP_STATUS[code], []).extend([words] if words != code else [])
        responses: Json = {"200": ok}
        for status in sorted(statuses | set(special)):
            name, text = SHARED_REFUSALS.get(status, ("", ""))
            if special.get(status):
                # What any call can be told applies beside what is special to this one.
                words = [*dict.fromkeys(special[status]), *([text.rstrip(".")] if status in statuses else [])]
                responses[str(status)] = {
                    "description": "\n\n".join(f"{one}." for one in words),
                    "headers": _headers(status),
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Status"}}},
                }
            else:
                responses[str(status)] = {"$ref": f"#/components/responses/{name}"}
        return responses

    def _refusals(self, method: MethodDescriptor) -> Iterator[tuple[str, str]]:
        """gRPC codes that the comment of a method names under `Errors:`, each with its words; `as METHOD` takes over that one's."""
        _, _, errors = self._comments.get(method.full_name, "").partition("Errors: ")
        for clause in _clauses(errors):
            if other := _AS_METHOD.search(clause):
                yield from self._refusals(next(one for one in self._methods if one.name == other[1]))
            elif code := _CODE_NAME.match(clause):
                yield code[1], clause


REQUEST_ID: Json = {"x-request-id": {"$ref": "#/components/headers/RequestId"}}
RETRY_AFTER: Json = {"retry-after": {"$ref": "#/components/headers/RetryAfter"}}


def _headers(status: int) -> Json:
    return REQUEST_ID | (RETRY_AFTER if status in (429, 503) else {})


def _bindings(method: MethodDescriptor) -> Iterator[tuple[str, str, http_pb2.HttpRule]]:
    rule: http_pb2.HttpRule = method.GetOptions().Extensions[HTTP]
    for one in (rule, *rule.additional_bindings):
        kind = one.WhichOneof("pattern")
        if kind not in HTTP_METHODS:
            raise ValueError(f"{method.full_name}: REST binding of kind {kind} is not supported")
        yield kind, getattr(one, kind), one


def _security(method: MethodDescriptor) -> Json:
    """Who may call: OpenAPI 3.1 lets the lists of such schemes name roles."""
    options = method.GetOptions()
    access, scope = options.Extensions[options_pb2.access], options.Extensions[options_pb2.scope]
    if access == options_pb2.ACCESS_PUBLIC:
        return {"security": []}
    role = {options_pb2.ACCESS_USER: None, options_pb2.ACCESS_OPERATOR: "operator", options_pb2.ACCESS_ADMIN: "admin"}
    if access not in role:
        raise ValueError(f"{method.full_name} has a REST binding but may not be called from outside")
    if role[access]:
        scope = options_pb2.SCOPE_ADMIN
    security: list[Json] = [{"bearerAuth": [role[access]] if role[access] else []}]
    if scope != options_pb2.SCOPE_UNSPECIFIED:
        security.append({"apiKeyAuth": [options_pb2.Scope.Name(scope).removeprefix("SCOPE_").lower()]})
    return {"security": security}


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def _clauses(text: str) -> Iterator[str]:
    """Parts of a sentence between commas and semicolons that stand in no parentheses."""
    depth, start = 0, 0
    for place, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0 and letter in ",;.":
            yield text[start:place].strip()
            start = place + 1
            if letter == ".":
                return
    yield text[start:].strip()


def _sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.:])\s", text, maxsplit=1)


def main() -> None:
    """Write `envoy/openapi.json` and the page made from it, `envoy/docs/index.html`."""
    made = document(descriptor_pb2.FileDescriptorSet.FromString((ENVOY_DIR / "descriptors.binpb").read_bytes()))
    (ENVOY_DIR / "openapi.json").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (ENVOY_DIR / "docs").mkdir(exist_ok=True)
    (ENVOY_DIR / "docs" / "index.html").write_text(reference.page(made), encoding="utf-8")


if __name__ == "__main__":
    main()
