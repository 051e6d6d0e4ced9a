"""The running mesh against its own OpenAPI document: schemathesis makes requests right and wrong, Envoy and the services answer.

Every operation is called with the examples of the document, with values at the edges of its rules, and with random ones, from a
fixed seed. The caller is an administrator who may spend nothing, so that no job is ever made.

One check of schemathesis is replaced, negative_data_rejection, because the transcoder reads JSON as protobuf does, not as a schema
says it (a number in quotation marks is a number, `null` is absent, unknown fields are ignored): our own reads each request that
succeeded in the same way, and asks the validator of the services.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import jsonschema
import protovalidate
import pytest
import pytest_asyncio
import schemathesis
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from edge.contract import public_methods
from genmesh.credits.v1 import credits_pb2
from genmesh.identity.v1 import identity_pb2
from tests.e2e.caller import DEADLINE_S, PASSWORD, SET_USER_CEILING, UPDATE_USER, Edge, User
from tests.e2e.conftest import NewUser, sign_in

Json = dict[str, Any]
Case = schemathesis.Case[Any]

SEED = 1
MAX_EXAMPLES = 10
"""Random requests an operation and kind of request (right, wrong); those of the examples and of the edges of rules come on top."""

ENVOY_DIR = Path(__file__).resolve().parents[2] / "envoy"
DOCUMENT: Json = json.loads((ENVOY_DIR / "openapi.json").read_text())
METHODS = {method.name: method for method in public_methods(ENVOY_DIR / "descriptors.binpb")}
STREAMS = [method.name[0].lower() + method.name[1:] for method in METHODS.values() if method.streaming]
"""They answer until the client has enough: tested on their own, below."""
OPERATIONS = {operation["operationId"]: (method, path) for path, ops in DOCUMENT["paths"].items() for method, operation in ops.items()}

# Operations that cannot succeed with values that nobody made before, or that this deployment does not offer.
NEED_SOMETHING = frozenset(
    {
        *(name for name, (_, path) in OPERATIONS.items() if "{" in path),
        "signIn", "refreshSession", "linkIdentity", "createTopUp", "receivePaymentEvent",  # tokens and signatures of others
        "createJob", "batchCreateJobs", "clawbackCredits", "requeueDeadLetter",  # credits, a failed job
    }
)  # fmt: skip
SCHEMA = schemathesis.openapi.from_dict(
    DOCUMENT,
    config=schemathesis.Config.from_dict(
        {
            "seed": SEED,
            # Tokens come from the test, and what it does not send is not to be made up: two credentials at once are refused.
            "generation": {"deterministic": True, "max-examples": MAX_EXAMPLES, "with-security-parameters": False},
            # Others (TRACE, QUERY) Envoy refuses before it looks at the path.
            "phases": {"coverage": {"unexpected-methods": ["GET", "PUT", "POST", "DELETE", "PATCH"]}},
            # The values are to come from the document, not from our sources.
            "analysis": {"constants": {"enabled": False}},
            # 501 is said on purpose (NOT_OFFERED); that the document says so is checked by status_code_conformance.
            "checks": {"not_a_server_error": {"expected-statuses": ["2xx", "4xx", "501"]}},
        }
    ),
)


@dataclass
class Caller:
    """Who calls, and what came of it."""

    url: str
    token: str
    throwaway: str
    """Token of somebody whose session may end."""
    open_doors: set[str] = field(default_factory=set[str])
    """Operations that succeeded for the caller, and were then tried without a token and with wrong ones."""
    statuses: defaultdict[str, set[int]] = field(default_factory=lambda: defaultdict(set))

    def headers(self, operation_id: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.throwaway if operation_id == 'signOut' else self.token}"}


@pytest_asyncio.fixture(scope="module")
async def caller(edge: Edge, admin: User, new_user: NewUser) -> Caller:
    """An administrator of its own, who may spend nothing."""
    user, throwaway = await new_user(0), await new_user(0)
    ceiling = credits_pb2.SetUserCeilingRequest(user_id=user.user_id, daily_millicredits=0, monthly_millicredits=0)
    await admin.call(SET_USER_CEILING, ceiling)
    roles = identity_pb2.Roles(roles=["admin", "operator"])
    await admin.call(UPDATE_USER, identity_pb2.UpdateUserRequest(user_id=user.user_id, roles=roles))
    again = await sign_in(edge, user.email, PASSWORD)
    return Caller(edge.stack.edge_url, again.token, throwaway.token)


# --- reading requests as the transcoder does ---------------------------------------------------------------------------------


def _read(message: Descriptor, value: Json) -> Json:
    """What the transcoder makes of a JSON object, in a form that protobuf's own reader takes. Names may be either of a field's."""
    fields = {name: one for one in message.fields for name in (one.name, one.json_name)}
    read: Json = {}
    for name, said in value.items():
        one = fields.get(name)
        if one is None or said is None:
            continue
        if one.is_repeated and one.message_type is not None and one.message_type.GetOptions().map_entry:
            read[name] = said
        elif one.is_repeated:
            read[name] = [_read_one(one, each) for each in _flat(said) if each is not None]
        else:
            read[name] = _read_one(one, said)
    return read


def _flat(value: Any) -> Iterator[Any]:
    """A single value stands for a list of one, and lists in lists for their elements."""
    if isinstance(value, list):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def _read_one(one: FieldDescriptor, value: Any) -> Any:
    if one.enum_type is not None and isinstance(value, str):
        return int(value) if value.isdecimal() else value.upper().replace("-", "_")
    if one.type == FieldDescriptor.TYPE_BOOL and value in ("true", "false"):
        return value == "true"
    if one.message_type is None or not isinstance(value, dict):
        return value
    if one.message_type.full_name == "google.protobuf.Timestamp":
        return "1970-01-01T00:00:00Z"
    return _read(one.message_type, value)


def _request(kind: Descriptor, case: Case, response: schemathesis.Response) -> Json:
    """What was said to an operation, from all places, as one JSON object."""
    url = urlsplit(str(response.request.url))
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(case.operation.path))
    in_path = re.fullmatch(pattern, url.path)
    assert in_path is not None, url.path
    operation = case.operation.definition.raw
    declared = {one["name"] for one in operation.get("parameters", []) if one["in"] == "query"}
    repeated = {one.json_name for one in kind.fields if one.is_repeated}
    query: Json = {}
    for name, value in parse_qsl(url.query, keep_blank_values=True):
        assert name in declared or not value, f"an unknown query parameter was accepted: {name}"
        # Where there can be but one, the last of several wins.
        query[name] = [*query.get(name, []), value] if name in repeated else value
    body: Any = response.request.body
    said = json.loads(body) if body and "requestBody" in operation else {}
    return said | {name: unquote(value) for name, value in in_path.groupdict().items()} | query


def accepts_only_what_the_contract_allows(ctx: Any, response: schemathesis.Response, case: Case) -> None:
    """A request that succeeded is one that the rules of the contract allow."""
    operation_id = case.operation.definition.raw["operationId"]
    if response.status_code != 200 or operation_id == "receivePaymentEvent":
        return
    method = METHODS[operation_id[0].upper() + operation_id[1:]]
    kind = descriptor_pool.Default().FindMethodByName(f"{method.service}.{method.name}").input_type
    said = _request(kind, case, response)
    try:
        message = json_format.ParseDict(_read(kind, said), message_factory.GetMessageClass(kind)(), ignore_unknown_fields=True)
    except json_format.ParseError as error:
        raise AssertionError(f"accepted, but it is no {kind.name}: {error}") from None
    violations = [violation.proto.message for violation in protovalidate.collect_violations(message)]
    assert not violations, f"accepted against the rules of {kind.name}: {violations}"


def says_why(ctx: Any, response: schemathesis.Response, case: Case) -> None:
    """A refusal has exactly one ErrorInfo, and a message."""
    if response.status_code == 200:
        return
    status = response.json()
    reasons = [one["reason"] for one in status["details"] if one["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"]
    assert len(reasons) == 1, status
    assert status["message"], status


# The network and the services take their time, and wrong requests are rare among random ones.
SLOW = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
    accepts_only_what_the_contract_allows,
    says_why,
]


@SCHEMA.exclude(operation_id=STREAMS).parametrize()  # pyright: ignore[reportUntypedFunctionDecorator]  # it says no types
@settings(deadline=None, derandomize=True, database=None, suppress_health_check=SLOW)
def test_every_operation_keeps_to_the_document(case: Case, caller: Caller) -> None:
    operation_id = case.operation.definition.raw["operationId"]
    response = case.call(base_url=caller.url, headers=caller.headers(operation_id), timeout=DEADLINE_S)
    caller.statuses[operation_id].add(response.status_code)
    wanted = list(CHECKS)
    if response.status_code == 200 and operation_id not in caller.open_doors:
        # Once an operation: wrong API keys are counted, and soon answered with 429.
        caller.open_doors.add(operation_id)
        wanted.append(checks.ignored_auth)
    case.validate_response(response, checks=wanted, headers=caller.headers(operation_id), transport_kwargs={"base_url": caller.url})


def test_every_operation_was_reached(caller: Caller) -> None:
    """After the test above: each operation answered for itself, and each that can has succeeded."""
    if set(caller.statuses) != set(OPERATIONS) - set(STREAMS):
        pytest.skip("not every operation was called in this run")
    for operation_id, statuses in caller.statuses.items():
        wanted = {200, 400, 404, 409, 429, 501} if operation_id in NEED_SOMETHING else {200}
        assert statuses & wanted, (operation_id, statuses)


# --- streams -----------------------------------------------------------------------------------------------------------------


def _of_stream(operation_id: str) -> tuple[str, Json]:
    _, path = OPERATIONS[operation_id]
    return path, DOCUMENT["paths"][path]["get"]["responses"]


@pytest.mark.parametrize("operation_id", STREAMS)
@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_streams_keep_to_the_document(edge: Edge, caller: Caller, operation_id: str, accept: str) -> None:
    path, responses = _of_stream(operation_id)
    schema = responses["200"]["content"][accept]["schema"] | {"components": DOCUMENT["components"]}
    async with edge.http.stream("GET", path, headers=caller.headers(operation_id) | {"accept": accept}) as reply:
        assert (reply.status_code, reply.headers["content-type"]) == (200, accept)
        line = await anext(line async for line in reply.aiter_lines() if line)
    jsonschema.Draft202012Validator(schema).validate(json.loads(line.removeprefix("data: ")))


@pytest.mark.parametrize("operation_id", STREAMS)
async def test_refusals_of_streams_keep_to_the_document(edge: Edge, caller: Caller, operation_id: str) -> None:
    path, responses = _of_stream(operation_id)
    status = {"$ref": "#/components/schemas/Status", "components": DOCUMENT["components"]}
    calls: dict[int, tuple[Json, dict[str, str]]] = {401: ({}, {}), 400: ({"unknown": "1"}, caller.headers(operation_id))}
    for expected, (query, headers) in calls.items():
        for accept in responses["200"]["content"]:
            reply = await edge.http.get(path, params=query, headers=headers | {"accept": accept})
            assert (reply.status_code, reply.headers["content-type"]) == (expected, "application/json")
            assert str(expected) in responses
            jsonschema.Draft202012Validator(status).validate(reply.json())


# --- the document and its page -----------------------------------------------------------------------------------------------


async def test_the_document_is_served_to_everybody(edge: Edge) -> None:
    reply = await edge.http.get("/openapi.json")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "application/json")
    assert reply.json() == DOCUMENT


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
async def test_its_page_is_served_under_a_strict_policy(edge: Edge, path: str) -> None:
    reply = await edge.http.get(path, follow_redirects=True)
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/html")
    assert reply.text == (ENVOY_DIR / "docs" / "index.html").read_text()
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "style-src 'self'" in policy
    assert "unsafe" not in policy
    style = await edge.http.get("/docs/style.css")
    assert style.headers["content-type"].startswith("text/css")
    assert style.text == (ENVOY_DIR / "docs" / "style.css").read_text()
