"""The edge as clients meet it: a real Envoy with the rendered configuration, in front of real mTLS servers with canned answers.

Every transport (gRPC, grpc-web, JSON, server-sent events) is spoken on the wire, tokens are real, and the internal
services stand behind the edge too: that they cannot be reached is Envoy's doing alone.
"""

# RPC methods are named by the proto

import asyncio
import base64
import itertools
import json
import re
import ssl
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from cli.stack.certificates import ensure_certificates
from edge.contract import PublicMethod, public_methods
from edge.settings import ENVOY_DIR
from genmesh.credits.v1 import credits_pb2, credits_pb2_grpc
from genmesh.errors.v1 import errors_pb2
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from genmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from servicekit.errors import MeshError
from servicekit.tls import TlsFiles, server_credentials
from tests.canned_mesh import (
    API_KEY,
    AUDIENCE,
    ENDED_JOB_ID,
    GET_JOB,
    GRPC_WEB,
    ISSUER,
    JOB_ID,
    LIMITED_API_KEY,
    MISSING_JOB_ID,
    ORIGIN,
    SLOW_API_KEY,
    START_TIMEOUT_S,
    USER_ID,
    Edge,
    Issuer,
    canned_mesh,
    frame,
    frames,
    refusal_of_grpc_web,
    refusal_of_rest,
    refusals,
    trailers,
)
from tests.e2e.caller import answered_too_early

IDENTITY_HEADERS = {
    "x-user-id": "somebody-else",
    "x-user-roles": "admin",
    "x-user-plan": "PLAN_PRO",
    "x-org-id": "theirs",
    "x-client-address": "10.9.8.7",
    "x-jwt-payload": "e30",
    "x-forwarded-client-cert": "URI=spiffe://genmesh/jobs_service",
    "x-envoy-original-path": "/forged",
}


@pytest.fixture(scope="module")
async def edge(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Edge]:
    async with canned_mesh(certificates) as mesh, mesh.edge(tmp_path_factory.mktemp("envoy")) as running:
        yield running


@pytest.fixture(autouse=True)
def _fresh(edge: Edge) -> None:
    edge.backend.seen.clear()
    edge.backend.notices.clear()
    edge.backend.checks.clear()
    edge.backend.go_on.clear()
    edge.backend.set_cookie = ""
    edge.backend.refusal = None


@pytest.fixture
def jobs(edge: Edge) -> "jobs_pb2_grpc.JobsServiceAsyncStub":
    return jobs_pb2_grpc.JobsServiceStub(edge.channel)  # pyright: ignore[reportReturnType]


# --- gRPC --------------------------------------------------------------------------------------------------------------------


async def test_grpc_unary(edge: Edge, jobs: "jobs_pb2_grpc.JobsServiceAsyncStub") -> None:
    response = await jobs.GetJob(jobs_pb2.GetJobRequest(job_id=JOB_ID), metadata=edge.metadata)
    assert (response.job.job_id, response.job.owner_id) == (JOB_ID, USER_ID)


async def test_grpc_stream_delivers_each_message_at_once(edge: Edge, jobs: "jobs_pb2_grpc.JobsServiceAsyncStub") -> None:
    tokens: list[str] = []
    async for message in jobs.WatchJobs(jobs_pb2.WatchJobsRequest(), metadata=edge.metadata):
        tokens.append(message.resume_token)
        edge.backend.go_on.set()
    assert tokens == ["1", "2"]


async def test_grpc_over_tls(edge: Edge) -> None:
    credentials = grpc.ssl_channel_credentials((edge.certificates / "ca.crt").read_bytes())
    async with grpc.aio.secure_channel(f"localhost:{edge.tls_port}", credentials) as channel:
        response = await jobs_pb2_grpc.JobsServiceStub(channel).GetJob(jobs_pb2.GetJobRequest(job_id=JOB_ID), metadata=edge.metadata)
    assert response.job.job_id == JOB_ID


async def test_grpc_error_keeps_its_details(edge: Edge, jobs: "jobs_pb2_grpc.JobsServiceAsyncStub") -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await jobs.CancelJob(jobs_pb2.CancelJobRequest(job_id=ENDED_JOB_ID), metadata=edge.metadata)
    status = rpc_status.from_call(error.value)  # pyright: ignore[reportArgumentType]
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.reason == errors_pb2.ErrorReason.Name(errors_pb2.ERROR_REASON_JOB_TERMINAL)


# --- grpc-web ----------------------------------------------------------------------------------------------------------------


async def test_grpc_web_unary(edge: Edge) -> None:
    reply = await edge.http.post(
        "/genmesh.jobs.v1.JobsService/GetJob",
        content=frame(jobs_pb2.GetJobRequest(job_id=JOB_ID).SerializeToString()),
        headers=GRPC_WEB | edge.bearer,
    )
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/grpc-web+proto"
    [(_, message)] = [frame for frame in frames(reply.content) if frame[0] == 0]
    assert jobs_pb2.GetJobResponse.FromString(message).job.job_id == JOB_ID
    assert trailers(reply.content)["grpc-status"] == "0"


async def test_grpc_web_text(edge: Edge) -> None:
    reply = await edge.http.post(
        "/genmesh.jobs.v1.JobsService/GetJob",
        content=base64.b64encode(frame(jobs_pb2.GetJobRequest(job_id=JOB_ID).SerializeToString())),
        headers=GRPC_WEB | {"content-type": "application/grpc-web-text", "accept": "application/grpc-web-text"} | edge.bearer,
    )
    assert reply.status_code == 200
    assert JOB_ID.encode() in base64.b64decode(reply.content.split(b"=")[0] + b"==")


async def test_grpc_web_stream_delivers_each_message_at_once(edge: Edge) -> None:
    body, headers = b"", GRPC_WEB | edge.bearer
    async with edge.http.stream("POST", "/genmesh.jobs.v1.JobsService/WatchJobs", content=frame(b""), headers=headers) as reply:
        async for chunk in reply.aiter_raw():
            body += chunk
            edge.backend.go_on.set()
    messages = [jobs_pb2.WatchJobsResponse.FromString(payload) for flag, payload in frames(body) if flag == 0]
    assert [message.resume_token for message in messages] == ["1", "2"]
    assert trailers(body)["grpc-status"] == "0"


async def test_grpc_web_error_keeps_its_details(edge: Edge) -> None:
    reply = await edge.http.post(
        "/genmesh.jobs.v1.JobsService/GetJob",
        content=frame(jobs_pb2.GetJobRequest(job_id=MISSING_JOB_ID).SerializeToString()),
        headers=GRPC_WEB | edge.bearer,
    )
    told = trailers(reply.content) or dict(reply.headers)
    assert told["grpc-status"] == str(grpc.StatusCode.NOT_FOUND.value[0])
    assert told["grpc-status-details-bin"]


# --- JSON --------------------------------------------------------------------------------------------------------------------


async def test_json_is_proto_json(edge: Edge) -> None:
    reply = await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=edge.bearer)
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/json"
    job = reply.json()["job"]
    assert job["jobId"] == JOB_ID
    assert job["state"] == "STATE_PENDING"
    assert job["costMillicredits"] == str(2**53 + 1)
    assert job["assets"] == []


async def test_json_prints_zero(edge: Edge) -> None:
    reply = await edge.http.get("/v1/credits", headers=edge.bearer)
    assert reply.json() == dict.fromkeys(("availableMillicredits", "reservedMillicredits", "promotionalMillicredits"), "0")


async def test_json_of_a_full_page(edge: Edge) -> None:
    reply = await edge.http.get("/v1/jobs", params={"pageSize": 200, "states": "STATE_COMPLETED"}, headers=edge.bearer)
    assert reply.status_code == 200
    assert len(reply.json()["jobs"]) == 200
    assert len(reply.content) > 256 * 1024


async def test_json_error_is_a_status_with_details(edge: Edge) -> None:
    reply = await edge.http.post(f"/v1/jobs/{ENDED_JOB_ID}:cancel", headers=edge.bearer)
    assert reply.status_code == 400
    body = reply.json()
    assert body["code"] == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert body["details"][0]["reason"] == "ERROR_REASON_JOB_TERMINAL"
    missing = await edge.http.get(f"/v1/jobs/{MISSING_JOB_ID}", headers=edge.bearer)
    assert (missing.status_code, missing.json()["code"]) == (404, 5)


async def test_json_patch(edge: Edge) -> None:
    headers = {"authorization": f"Bearer {edge.issuer.token(roles=['admin'])}"}
    reply = await edge.http.patch(f"/v1/admin/users/{USER_ID}", json={"plan": "PLAN_PRO"}, headers=headers)
    assert reply.status_code == 200, reply.text
    assert (reply.json()["user"]["userId"], reply.json()["user"]["plan"]) == (USER_ID, "PLAN_PRO")
    refused = await edge.http.patch(f"/v1/admin/users/{USER_ID}", json={"plan": "PLAN_PRO"}, headers=edge.bearer)
    assert (refused.status_code, refused.json()["code"]) == (403, grpc.StatusCode.PERMISSION_DENIED.value[0])


async def test_json_over_tls(edge: Edge) -> None:
    context = ssl.create_default_context(cafile=str(edge.certificates / "ca.crt"))
    async with httpx.AsyncClient(verify=context) as client:
        reply = await client.get(f"https://localhost:{edge.tls_port}/v1/models", headers=edge.bearer)
    assert reply.json() == {"models": []}


async def _events(reply: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in reply.aiter_lines():
        if line:
            assert line.startswith("data: ")
            yield json.loads(line.removeprefix("data: "))


async def test_server_sent_events(edge: Edge) -> None:
    tokens: list[str] = []
    headers = {"accept": "text/event-stream"} | edge.bearer
    async with edge.http.stream("GET", "/v1/jobs:watch", headers=headers) as reply:
        assert reply.headers["content-type"] == "text/event-stream"
        async for event in _events(reply):
            tokens.append(event["resumeToken"])
            edge.backend.go_on.set()
    assert tokens == ["1", "2"]


async def test_stream_without_sse_is_lines_of_json(edge: Edge) -> None:
    edge.backend.go_on.set()
    reply = await edge.http.get("/v1/jobs:watch", headers=edge.bearer)
    assert [json.loads(line)["resumeToken"] for line in reply.text.splitlines()] == ["1", "2"]


# --- bad input ---------------------------------------------------------------------------------------------------------------


def _create(prompt: str = "a tiger face", **image: Any) -> dict[str, Any]:
    return {"requestId": str(uuid.uuid4()), "spec": {"image": {"prompt": prompt, **image}}}


DEEP = '{"spec":' * 5000 + "1" + "}" * 5000
BAD_BODIES = {
    "not JSON": "{",
    "no object": "[]",
    "wrong type": json.dumps(_create(width="wide")),
    "out of range of the type": json.dumps(_create(width=2**40)),
    "unknown enum": json.dumps(_create(format="IMAGE_FORMAT_NONE")),
    "NaN where a number belongs": json.dumps(_create(guidanceScale="NaN")),
    "two of a oneof's kind": '{"requestId":"x","requestId":"y"}',
    "lone surrogate": '{"requestId":"' + str(uuid.uuid4()) + r'","spec":{"image":{"prompt":"\ud800"}}}',
    "invalid UTF-8": b'{"spec":{"image":{"prompt":"\xff\xfe"}}}',
    "deep": DEEP,
    "too long a prompt": json.dumps(_create("x" * 1_000_000)),
    "empty": "",
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=BAD_BODIES.keys())
async def test_bad_json_is_refused_in_json(edge: Edge, body: str | bytes) -> None:
    reply = await edge.http.post("/v1/jobs", content=body, headers={"content-type": "application/json"} | edge.bearer)
    assert reply.status_code == 400, reply.text[:300]
    assert reply.headers["content-type"] == "application/json"
    status = reply.json()
    assert status["code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert isinstance(status["message"], str)
    assert isinstance(status["details"], list)


@pytest.mark.parametrize("query", ["states=STATE_NONE", "pageSize=many", "unknown=1", "access_token=x"])
async def test_bad_query_is_refused_in_json(edge: Edge, query: str) -> None:
    reply = await edge.http.get(f"/v1/jobs?{query}", headers=edge.bearer)
    assert (reply.status_code, reply.json()["code"]) == (400, 3)


async def test_body_over_the_limit(edge: Edge) -> None:
    refusal = refusal_of_rest(await edge.http.post("/v1/jobs", content=json.dumps(_create("x" * 3_000_000)), headers=edge.bearer))
    assert (refusal.http_status, refusal.code, refusal.reason) == (413, 8, "ERROR_REASON_REQUEST_TOO_LARGE")


# A path that could be of the contract, one that could not.
UNKNOWN = {True: ["/v1/nothing", "/v1/", "/genmesh.jobs.v1.JobsService/Nope"], False: ["/v2/jobs", "/favicon.ico", "/v1", "/foo.Bar/Nope"]}


@pytest.mark.parametrize("method", ["GET", "PUT", "POST"])
@pytest.mark.parametrize(("guarded", "path"), [(guarded, path) for guarded, paths in UNKNOWN.items() for path in paths])
async def test_unknown_resource(edge: Edge, method: str, guarded: bool, path: str) -> None:
    refusal = refusal_of_rest(await edge.http.request(method, path, headers=edge.bearer))
    assert (refusal.http_status, refusal.code, refusal.reason) == (404, 5, "ERROR_REASON_NOT_FOUND")
    stranger = refusal_of_rest(await edge.http.request(method, path))
    assert stranger.reason == ("ERROR_REASON_TOKEN_MISSING" if guarded else "ERROR_REASON_NOT_FOUND")
    assert stranger.http_status == (401 if guarded else 404)


@pytest.mark.parametrize(("path", "code"), [("/foo.Bar/Nope", 12), ("/genmesh.jobs.v1.JobsService/Nope", 16), ("/v1/jobs", 16)])
async def test_unknown_methods_of_grpc_web(edge: Edge, path: str, code: int) -> None:
    assert refusal_of_grpc_web(await edge.http.post(path, content=frame(b""), headers=GRPC_WEB)).code == code


async def test_the_front_door_leads_to_the_pages(edge: Edge) -> None:
    for method in ("GET", "HEAD"):
        reply = await edge.http.request(method, "/?utm=x")
        assert (reply.status_code, reply.headers["location"]) == (307, "/docs/")
    assert (await edge.http.get("/docs/")).status_code == 200
    assert (await edge.http.post("/")).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v1/jobs", "GET, POST"),
        ("POST", f"/v1/jobs/{JOB_ID}", "DELETE, GET"),
        ("GET", f"/v1/jobs/{JOB_ID}:cancel", "POST"),
        ("GET", "/v1/sessions", "POST"),
        ("DELETE", "/v1/users", "POST"),
        ("POST", "/v1/signInOptions", "GET"),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(edge: Edge, method: str, path: str, allowed: str) -> None:
    for headers in (edge.bearer, {}):
        reply = await edge.http.request(method, path, headers=headers)
        assert (reply.status_code, reply.headers["allow"]) == (405, allowed)
        refusal = refusal_of_rest(reply)
        assert (refusal.code, refusal.reason, edge.backend.seen) == (12, "ERROR_REASON_NOT_OFFERED", [])


UNREADABLE = {
    "unknown method": ("QUERY", "/v1/credits", {}, 400),
    "escaped slash": ("GET", "/v1/jobs/x%2fy", {}, 400),
    "underscore in a name": ("GET", "/v1/models", {"x_user_id": "forged"}, 400),
    "two lengths": ("POST", "/v1/jobs", {"transfer-encoding": "chunked"}, 400),
    "unknown encoding": ("POST", "/v1/jobs", {"transfer-encoding": "gzip", "content-length": ""}, 501),
    "large headers": ("GET", "/v1/models", {"x-long": "x" * 40_000}, 431),
}


@pytest.mark.parametrize("unreadable", UNREADABLE.values(), ids=UNREADABLE.keys())
async def test_what_cannot_be_read_is_refused_with_a_text(edge: Edge, unreadable: tuple[str, str, dict[str, str], int]) -> None:
    method, path, headers, expected = unreadable
    status, _, body = await _raw(edge, method, path, headers | edge.bearer)
    answer = json.loads(body)
    assert (status, answer["code"], answer["details"][0]["reason"]) == (expected, 3, "ERROR_REASON_MALFORMED_REQUEST")
    assert answer["message"].startswith("the ")


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE])
async def test_when_to_come_back_is_a_header_too(edge: Edge, code: grpc.StatusCode) -> None:
    edge.backend.refusal = MeshError(code, errors_pb2.ERROR_REASON_LIMIT_REACHED, "not now", retry_after_s=2.5)
    # These look at the header.
    for transport, refusal in (await refusals(edge, edge.bearer)).items():
        assert (refusal.code, refusal.retry_after_s) == (code.value[0], 2.5), transport
    for accept in ("application/json", "text/event-stream"):
        stream = await edge.http.get("/v1/jobs:watch", headers=edge.bearer | {"accept": accept, "origin": ORIGIN})
        assert (stream.headers["retry-after"], stream.json()["code"]) == ("3", code.value[0])
        assert "retry-after" in stream.headers["access-control-expose-headers"]
    edge.backend.refusal = MeshError(code, errors_pb2.ERROR_REASON_LIMIT_REACHED, "never")
    assert "retry-after" not in (await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=edge.bearer)).headers


async def test_what_the_transcoder_says_is_told(edge: Edge) -> None:
    assert "unknown" in refusal_of_rest(await edge.http.get("/v1/jobs?unknown=1", headers=edge.bearer)).message
    assert "expected" in refusal_of_rest(await edge.http.post("/v1/jobs", content="{", headers=edge.bearer)).message.lower()


# --- a payment provider's notices --------------------------------------------------------------------------------------------

# What JSON may be and no two writers write alike: nothing on the way may read it and write it again.
NOTICE = '{\r\n  "id" : "evt_1",\t"amount": 1.50e2, "amount": 150,\n"name":"Zo\\u00eb Zoë 🙂","escaped":"\\/" , "none":null}\n\n '.encode()
NOTICES = {
    "unusual spacing": NOTICE,
    "no JSON": b"\x00\xff not JSON",
    "large": b'{"padding": "' + b"x" * 1_500_000 + b'"}',
}
NOTICE_HEADERS = {
    "content-type": "application/json; charset=utf-8",
    "accept": "*/*; q=0.5, application/xml",
    "stripe-signature": "t=1492774577,v1=5257a869,v0=6ffbb59b",
}


@pytest.mark.parametrize("body", NOTICES.values(), ids=NOTICES.keys())
async def test_a_payment_notice_arrives_byte_for_byte_with_its_signature_and_needs_no_token(edge: Edge, body: bytes) -> None:
    reply = await edge.http.post("/v1/payments:notify", content=body, headers=NOTICE_HEADERS)
    assert (reply.status_code, reply.json()) == (200, {})
    [notice] = edge.backend.notices
    assert notice.body.data == body
    assert notice.body.content_type == NOTICE_HEADERS["content-type"]
    assert edge.backend.seen[0]["stripe-signature"] == NOTICE_HEADERS["stripe-signature"]


async def test_a_payment_notice_over_the_limit_is_refused(edge: Edge) -> None:
    refusal = refusal_of_rest(await edge.http.post("/v1/payments:notify", content=b"x" * 3_000_000, headers=NOTICE_HEADERS))
    assert (refusal.http_status, refusal.code, refusal.reason) == (413, 8, "ERROR_REASON_REQUEST_TOO_LARGE")
    assert edge.backend.notices == []


# --- tokens ------------------------------------------------------------------------------------------------------------------


def _bad_tokens(issuer: Issuer) -> dict[str, tuple[str | None, str]]:
    """Authorization header and reason of the refusal, by what is wrong."""
    now = int(time.time())
    unsigned = jwt.encode({"iss": ISSUER, "aud": AUDIENCE, "sub": USER_ID, "exp": now + 900}, None, algorithm="none")  # pyright: ignore[reportArgumentType]  # what PyJWT itself asks for
    return {
        "missing": (None, "TOKEN_MISSING"),
        "no token": ("Bearer x", "TOKEN_INVALID"),
        "basic": ("Basic eDp5", "TOKEN_MISSING"),
        "expired": (f"Bearer {issuer.token(exp=now - 60, iat=now - 960)}", "TOKEN_EXPIRED"),
        "without expiry": (f"Bearer {issuer.token(exp=None)}", "TOKEN_INVALID"),
        "wrong issuer": (f"Bearer {issuer.token(iss='https://elsewhere')}", "TOKEN_INVALID"),
        "wrong audience": (f"Bearer {issuer.token(aud='elsewhere')}", "TOKEN_INVALID"),
        "wrong key": (f"Bearer {issuer.token(key=Ed25519PrivateKey.generate())}", "TOKEN_INVALID"),
        "unknown key id": (f"Bearer {issuer.token(key=Ed25519PrivateKey.generate(), kid='k2')}", "TOKEN_INVALID"),
        "alg none": (f"Bearer {unsigned}", "TOKEN_INVALID"),
    }


@pytest.mark.parametrize("wrong", list(_bad_tokens(Issuer())))
async def test_bad_token(edge: Edge, wrong: str) -> None:
    authorization, reason = _bad_tokens(edge.issuer)[wrong]
    headers = {} if authorization is None else {"authorization": authorization}
    for transport, refusal in (await refusals(edge, headers)).items():
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED.value[0], f"ERROR_REASON_{reason}"), transport
        assert refusal.http_status == (401 if transport == "rest" else None)
    stream = await edge.http.get("/v1/jobs:watch", headers=headers | {"accept": "text/event-stream"})
    assert refusal_of_rest(stream).reason == f"ERROR_REASON_{reason}"
    assert stream.headers["www-authenticate"] == 'Bearer realm="genmesh"'
    assert edge.backend.seen == []


async def test_whoever_lacks_a_token_is_told_both_ways_in(edge: Edge) -> None:
    for transport, refusal in (await refusals(edge, {})).items():
        assert "authorization: Bearer" in refusal.message, transport
        assert "x-api-key" in refusal.message, transport


async def test_token_in_the_query_is_no_token(edge: Edge) -> None:
    reply = await edge.http.get(f"/v1/jobs/{JOB_ID}?access_token={edge.issuer.token()}")
    assert reply.status_code == 401
    assert reply.headers["www-authenticate"] == 'Bearer realm="genmesh"'


async def test_public_methods_need_no_token(edge: Edge) -> None:
    user = {"email": "a@example.org", "password": "correct horse battery"}
    registered = await edge.http.post("/v1/users", json=user)
    assert registered.json()["user"]["userId"] == USER_ID
    signed_in = await edge.http.post("/v1/sessions", json={"password": user})
    assert signed_in.json()["accessToken"] == "access"
    offered = await edge.http.get("/v1/signInOptions")
    assert offered.json()["firebase"] == {"projectId": "canned"}
    refreshed = await edge.http.post("/v1/sessions:refresh", json={"refreshToken": "r" * 43})
    assert refreshed.status_code == 200, refreshed.text
    stub = identity_pb2_grpc.IdentityServiceStub(edge.channel)
    assert (await stub.RegisterUser(identity_pb2.RegisterUserRequest(**user))).user.user_id == USER_ID
    web = await edge.http.post(
        "/genmesh.identity.v1.IdentityService/SignIn",
        content=frame(identity_pb2.SignInRequest(password=identity_pb2.PasswordCredential(**user)).SerializeToString()),
        headers=GRPC_WEB,
    )
    assert trailers(web.content)["grpc-status"] == "0"


CONTRACT = public_methods(ENVOY_DIR / "descriptors.binpb")
# Other spellings of a path: each has to end as the path itself, or nowhere.
SPELLINGS = (
    "{path}",
    "{path}/",
    "{path}?access_token=x",
    "/{path}",
    "/docs/..{path}",
    "/healthz/..{path}",
    "{encoded}",
    "{upper}",
    "{path};x",
)


async def _asked_for_a_token(edge: Edge, headers: Mapping[str, str]) -> bool:
    """Whether it was Envoy that refused: services look at tokens as well, and say the same."""
    return (await _log_line(edge, headers["x-request-id"]))["details"] == "jwt_authn_access_denied{Jwt_is_missing}"


@pytest.mark.parametrize("method", CONTRACT, ids=[f"{one.service}/{one.name}" for one in CONTRACT])
async def test_a_stranger_reaches_public_methods_alone(edge: Edge, method: PublicMethod) -> None:
    refused = "ERROR_REASON_TOKEN_MISSING"
    web = await edge.http.post(method.path, content=frame(b""), headers=GRPC_WEB)
    assert await _asked_for_a_token(edge, web.headers) == method.needs_token
    if method.needs_token:
        assert refusal_of_grpc_web(web).reason == refused
    for binding in method.bindings:
        path = re.sub(r"\{[^}]*\}", JOB_ID, binding.path)
        reply = await edge.http.request(binding.http_method, path)
        assert await _asked_for_a_token(edge, reply.headers) == method.needs_token
        if method.needs_token:
            assert refusal_of_rest(reply).reason == refused
    if method.needs_token:
        assert edge.backend.seen == []


async def test_no_spelling_of_a_path_gets_a_stranger_in(edge: Edge) -> None:
    async def attempt(http_method: str, path: str, spelling: str) -> None:
        target = spelling.format(path=path, encoded=f"/%76{path.removeprefix('/v')}", upper=path.upper())
        status, headers, _ = await _raw(edge, http_method, target, {})
        assert status in (400, 404) or (status == 401 and await _asked_for_a_token(edge, headers)), target

    paths = {
        (binding.http_method, re.sub(r"\{[^}]*\}", JOB_ID, binding.path))
        for method in CONTRACT
        if method.needs_token
        for binding in method.bindings
    }
    await asyncio.gather(*(attempt(*path, spelling) for path in paths for spelling in SPELLINGS))
    assert edge.backend.seen == []


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/users/x"), ("POST", "/v1/sessions:signOut"), ("POST", "/v1/sessions/"), ("GET", "/v1/me")]
)
async def test_next_to_public_paths_a_token_is_needed(edge: Edge, method: str, path: str) -> None:
    assert (await edge.http.request(method, path)).status_code == 401


async def test_a_token_once_verified_ends_when_it_says(edge: Edge) -> None:
    # Within the clock skew, hence not for long.
    headers = {"authorization": f"Bearer {edge.issuer.token(exp=int(time.time()) - 2)}"}
    reply = await edge.http.get("/v1/models", headers=headers)
    assert reply.status_code == 200
    async with asyncio.timeout(START_TIMEOUT_S):
        # The services look at it as well; it has to be Envoy that says no in the end.
        while (await _logged(edge, reply))["details"] != "jwt_authn_access_denied{Jwt_is_expired}":
            await asyncio.sleep(0.1)  # a token gives no sign of its end
            reply = await edge.http.get("/v1/models", headers=headers)
    assert refusal_of_rest(reply).reason == "ERROR_REASON_TOKEN_EXPIRED"


# --- what must not be reached ------------------------------------------------------------------------------------------------

INTERNAL = [
    "/genmesh.credits.v1.LedgerService/GetReservation",
    "/genmesh.inference.v1.InferenceService/LoadModel",
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]
# INVALID_ARGUMENT, NOT_FOUND, UNIMPLEMENTED, INTERNAL (what a malformed HTTP request is to gRPC)
REFUSALS = {"3", "5", "12", "13"}
TRICKS = [
    "{path}",
    "/{path}",
    "{path}/",
    "{path}.",
    "{path}?x",
    "{path}%00",
    "{path};x",
    "/v1{path}",
    "/v1/..{path}",
    "/v1/%2e%2e{path}",
    "/v1/models/../../{path}",
    "/v1/jobs/x{escaped}",
    "{escaped}",
    "{backslashed}",
    "{upper}",
    "http://credit-service.genmesh.internal{path}",
]


async def _raw(edge: Edge, method: str, target: str, headers: Mapping[str, str], body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    """One HTTP/1.1 exchange with the request target exactly as given: clients would tidy it up. Empty headers are left out."""
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    lines = {"host": "edge", "content-length": str(len(body)), "connection": "close"} | dict(headers)
    head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in lines.items() if value)
    writer.write(head.encode() + b"\r\n" + body)
    await writer.drain()
    async with asyncio.timeout(START_TIMEOUT_S):
        reply = await reader.read()
    writer.close()
    await writer.wait_closed()
    start, _, rest = reply.partition(b"\r\n\r\n")
    status, *fields = start.decode().split("\r\n")
    return int(status.split()[1]), {key.lower(): value.strip() for key, _, value in (one.partition(":") for one in fields)}, rest


@pytest.mark.parametrize("internal", INTERNAL)
async def test_internal_services_are_not_reached(edge: Edge, internal: str) -> None:
    async def attempt(content_type: str, trick: str, method: str) -> None:
        target = trick.format(
            path=internal, escaped=internal.replace("/", "%2f"), backslashed=internal.replace("/", "\\"), upper=internal.upper()
        )
        body = b"{}" if content_type == "application/json" else frame(b"")
        status, headers, rest = await _raw(edge, method, target, {"content-type": content_type, "te": "trailers"} | edge.bearer, body)
        grpc_status = headers.get("grpc-status") or _chunked_status(rest)
        assert status in (400, 404) or grpc_status in REFUSALS, (method, target, content_type, status, headers, rest)

    content_types = ("application/grpc", "application/grpc-web+proto", "application/json")
    await asyncio.gather(*(attempt(*one) for one in itertools.product(content_types, TRICKS, ("POST", "GET"))))
    assert edge.backend.internal_calls == 0


def _chunked_status(body: bytes) -> str:
    _, found, after = body.partition(b"grpc-status:")
    return after.split(b"\r\n")[0].decode().strip() if found else ""


async def test_internal_services_by_stub(edge: Edge) -> None:
    health: Any = health_pb2_grpc.HealthStub(edge.channel)
    calls: list[Any] = [
        credits_pb2_grpc.LedgerServiceStub(edge.channel).GetReservation(
            credits_pb2.GetReservationRequest(reservation_id=JOB_ID), metadata=edge.metadata
        ),
        inference_pb2_grpc.InferenceServiceStub(edge.channel).LoadModel(inference_pb2.LoadModelRequest(), metadata=edge.metadata),
        health.Check(health_pb2.HealthCheckRequest(), metadata=edge.metadata),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(edge.channel)  # pyright: ignore[reportArgumentType]
    while True:
        question = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await reflection.ServerReflectionInfo(question, metadata=edge.metadata).read()
        if not answered_too_early(error.value):
            break
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_grpc_path_with_a_json_body_is_not_transcoded(edge: Edge) -> None:
    reply = await edge.http.post("/genmesh.jobs.v1.JobsService/GetJob", json={"jobId": JOB_ID}, headers=edge.bearer)
    assert reply.status_code == 404


async def test_identity_headers_do_not_get_in(edge: Edge, jobs: "jobs_pb2_grpc.JobsServiceAsyncStub") -> None:
    await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=IDENTITY_HEADERS | edge.bearer)
    await edge.http.post("/v1/users", json={"email": "a@example.org", "password": "correct horse battery"}, headers=IDENTITY_HEADERS)
    await jobs.GetJob(jobs_pb2.GetJobRequest(job_id=JOB_ID), metadata=(*IDENTITY_HEADERS.items(), *edge.metadata))
    assert len(edge.backend.seen) == 3
    for seen in edge.backend.seen:
        assert not set(IDENTITY_HEADERS.values()) & set(seen.values())
    assert edge.backend.seen[0]["authorization"].startswith("Bearer ")


async def test_a_forged_original_path_does_not_change_the_form_of_errors(edge: Edge) -> None:
    web = await edge.http.post(
        "/genmesh.jobs.v1.JobsService/GetJob", content=frame(b""), headers=GRPC_WEB | {"x-envoy-original-path": "/v1/jobs"}
    )
    assert "details" not in (web.headers.get("grpc-message") or trailers(web.content).get("grpc-message", ""))


# --- CORS, ids, logs ---------------------------------------------------------------------------------------------------------

PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type,x-grpc-web"}


@pytest.mark.parametrize("path", ["/v1/jobs", "/genmesh.jobs.v1.JobsService/WatchJobs"])
async def test_preflight(edge: Edge, path: str) -> None:
    reply = await edge.http.options(path, headers=PREFLIGHT | {"origin": ORIGIN})
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] == ORIGIN
    assert {"authorization", "x-grpc-web"} <= set(reply.headers["access-control-allow-headers"].split(","))
    stranger = await edge.http.options(path, headers=PREFLIGHT | {"origin": "https://evil.example.org"})
    assert "access-control-allow-origin" not in stranger.headers


async def test_cors_headers_on_answers_and_refusals(edge: Edge) -> None:
    for headers in (edge.bearer, {}):
        reply = await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=headers | {"origin": ORIGIN})
        assert reply.headers["access-control-allow-origin"] == ORIGIN
        assert "grpc-status-details-bin" in reply.headers["access-control-expose-headers"]
    stranger = await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=edge.bearer | {"origin": "https://evil.example.org"})
    assert "access-control-allow-origin" not in stranger.headers


async def test_request_id_is_made_here_and_given_back(edge: Edge) -> None:
    reply = await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=edge.bearer | {"x-request-id": "chosen-by-client"})
    assert uuid.UUID(reply.headers["x-request-id"])
    assert edge.backend.seen[0]["x-request-id"] == reply.headers["x-request-id"]


async def test_healthz_needs_nothing(edge: Edge) -> None:
    for headers in ({}, {"authorization": "Bearer x"}, {"x-api-key": "gmk_wrong"}):
        reply = await edge.http.get("/healthz", headers=headers)
        assert (reply.status_code, reply.text) == (200, "ok\n")
    # No place to try keys at.
    assert edge.backend.checks == []


async def _logged(edge: Edge, reply: httpx.Response) -> dict[str, Any]:
    """The line of the access log about a request."""
    return await _log_line(edge, reply.headers["x-request-id"])


async def _log_line(edge: Edge, request_id: str) -> dict[str, Any]:
    async with asyncio.timeout(START_TIMEOUT_S):
        while request_id not in (text := edge.access_log.read_text()):  # noqa: ASYNC110  # a file another process writes
            await asyncio.sleep(0.02)
    return next(json.loads(line) for line in text.splitlines() if request_id in line)


async def test_access_log_has_no_query_and_no_token(edge: Edge) -> None:
    secret = edge.issuer.token()
    reply = await edge.http.get(f"/v1/jobs?pageToken=do-not-log&states=STATE_FAILED&access_token={secret}", headers=edge.bearer)
    entry = await _logged(edge, reply)
    text = edge.access_log.read_text()
    assert "do-not-log" not in text
    assert secret not in text
    assert (entry["path"], entry["method"], entry["status"]) == ("/v1/jobs", "GET", 400)


@pytest.mark.parametrize("header", [{"x-long": "x" * 40_000}, {"x_user_id": "forged"}])
async def test_headers_over_the_limits(edge: Edge, header: dict[str, str]) -> None:
    status, _, _ = await _raw(edge, "GET", "/v1/models", header | edge.bearer)
    assert status in (400, 431)


# --- what Envoy adds, takes away and does not obey -----------------------------------------------------------------------------


async def test_the_clients_address_is_envoys_word(edge: Edge) -> None:
    forged = {"x-client-address": "10.9.8.7", "x-forwarded-for": "10.9.8.6"}
    await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=edge.bearer | forged)
    await edge.jobs.GetJob(GET_JOB, metadata=(*edge.metadata, *forged.items()))
    assert [seen["x-client-address"] for seen in edge.backend.seen] == ["127.0.0.1"] * 2


async def test_nobody_outside_steers_envoy(edge: Edge) -> None:
    orders = {
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-envoy-max-retries": "9",
        "x-envoy-retry-on": "5xx",
        "x-envoy-retry-grpc-on": "failed-precondition",
        "x-envoy-internal": "true",
        "x-envoy-force-trace": "true",
    }
    await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=edge.bearer | orders)
    assert not set(orders) & set(edge.backend.seen[0])


SAFE_HEADERS = {
    "strict-transport-security": "max-age=31536000",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}


@pytest.mark.parametrize(
    ("path", "status"), [(f"/v1/jobs/{JOB_ID}", 200), ("/healthz", 200), ("/v1/nothing", 404), ("/v1/jobs/x%2fy", 400)]
)
async def test_every_answer_has_safe_headers(edge: Edge, path: str, status: int) -> None:
    reply = await edge.http.get(path, headers=edge.bearer)
    assert reply.status_code == status
    if status != 400:  # such a path is refused before there are filters
        assert SAFE_HEADERS.items() <= dict(reply.headers).items()
    assert not [name for name in reply.headers if name.startswith("x-envoy")]
    refused = await edge.http.get("/v1/me")
    assert SAFE_HEADERS.items() <= dict(refused.headers).items()


async def test_cookies_pass_both_ways_untouched(edge: Edge) -> None:
    cookie = "__Host-genmesh_refresh=token; Path=/; Secure; HttpOnly; SameSite=Strict"
    edge.backend.set_cookie = cookie
    reply = await edge.http.post("/v1/sessions:refresh", json={}, headers={"cookie": "__Host-genmesh_refresh=old", "origin": ORIGIN})
    assert reply.headers["set-cookie"] == cookie
    assert edge.backend.seen[0]["cookie"] == "__Host-genmesh_refresh=old"
    assert reply.headers["access-control-allow-credentials"] == "true"


async def test_cookies_go_to_identity_alone(edge: Edge) -> None:
    cookie = {"cookie": "__Host-genmesh_refresh=secret"}
    await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=edge.bearer | cookie)
    await edge.http.get("/v1/credits", headers=edge.bearer | cookie)
    await edge.http.post("/v1/payments:notify", content=b"{}", headers=cookie)
    await edge.jobs.GetJob(GET_JOB, metadata=(*edge.metadata, *cookie.items()))
    web = GRPC_WEB | edge.bearer | cookie
    await edge.http.post("/genmesh.jobs.v1.JobsService/GetJob", content=frame(GET_JOB.SerializeToString()), headers=web)
    assert len(edge.backend.seen) == 5
    assert not [seen for seen in edge.backend.seen if "cookie" in seen]


# --- pages that act for their visitors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["https://evil.example.org", "null", "https://console.example.org.evil.example", "http://127.0.0.1:1"])
async def test_a_strange_page_changes_nothing(edge: Edge, origin: str) -> None:
    headers = edge.bearer | {"origin": origin}
    refused = refusal_of_rest(await edge.http.post("/v1/sessions:refresh", json={"refreshToken": "r" * 43}, headers=headers))
    assert (refused.http_status, refused.code, refused.reason) == (403, 7, "ERROR_REASON_PERMISSION_DENIED")
    web = await edge.http.post(
        "/genmesh.jobs.v1.JobsService/GetJob", content=frame(GET_JOB.SerializeToString()), headers=GRPC_WEB | headers
    )
    assert refusal_of_grpc_web(web).reason == "ERROR_REASON_PERMISSION_DENIED"
    assert edge.backend.seen == []


@pytest.mark.parametrize("origin", [ORIGIN, "", None], ids=["listed", "own", "program"])
async def test_known_pages_and_programs_do(edge: Edge, origin: str | None) -> None:
    headers = {} if origin is None else {"origin": origin or str(edge.http.base_url)}
    reply = await edge.http.post("/v1/sessions:refresh", json={"refreshToken": "r" * 43}, headers=headers)
    assert reply.status_code == 200, reply.text


# --- API keys ------------------------------------------------------------------------------------------------------------------


async def test_a_key_is_changed_for_a_token_on_every_transport(edge: Edge) -> None:
    key = {"x-api-key": API_KEY}
    assert (await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=key)).json()["job"]["ownerId"] == USER_ID
    assert (await edge.jobs.GetJob(GET_JOB, metadata=tuple(key.items()))).job.owner_id == USER_ID
    web = await edge.http.post("/genmesh.jobs.v1.JobsService/GetJob", content=frame(GET_JOB.SerializeToString()), headers=GRPC_WEB | key)
    assert trailers(web.content)["grpc-status"] == "0"
    assert len(edge.backend.seen) == len(edge.backend.checks) == 3
    for seen in edge.backend.seen:
        assert "x-api-key" not in seen
        assert seen["authorization"].startswith("Bearer ")
        assert API_KEY not in seen.values()
    for check in edge.backend.checks:
        # Nothing but what the gateway needs: no body, no cookies.
        sent = check.attributes.request.http.headers
        assert set(sent) <= {"x-api-key", "x-request-id", "x-client-address", ":path", ":method", ":authority"}
        assert sent["x-client-address"] == "127.0.0.1"
        assert check.attributes.source.address.socket_address.address == "127.0.0.1"


async def test_without_a_key_nobody_is_asked(edge: Edge) -> None:
    await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=edge.bearer)
    await edge.http.get(f"/v1/jobs/{JOB_ID}")
    assert edge.backend.checks == []


@pytest.mark.parametrize("key", ["gmk_wrong", "", API_KEY + ","])
async def test_a_wrong_key(edge: Edge, key: str) -> None:
    for transport, refusal in (await refusals(edge, {"x-api-key": key})).items():
        assert (refusal.code, refusal.reason) == (16, "ERROR_REASON_API_KEY_INVALID"), transport
        assert "said by the gateway" not in refusal.message
    assert edge.backend.seen == []


async def test_two_keys_are_none(edge: Edge) -> None:
    reply = await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=[("x-api-key", API_KEY), ("x-api-key", API_KEY)])
    assert refusal_of_rest(reply).reason == "ERROR_REASON_API_KEY_INVALID"
    assert reply.headers["www-authenticate"] == 'Bearer realm="genmesh"'


async def test_no_challenge_repeats_the_address(edge: Edge) -> None:
    headers = {"content-type": "application/grpc", "te": "trailers"}
    for extra in ({}, {"authorization": "Bearer x.y.z"}):
        reply = await edge.http.post("/genmesh.jobs.v1.JobsService/ListJobs?secret=1", headers=headers | extra)
        assert reply.headers["grpc-status"] == "16"
        assert reply.headers["www-authenticate"] == 'Bearer realm="genmesh"'


async def test_a_key_beside_a_token_is_refused(edge: Edge) -> None:
    for transport, refusal in (await refusals(edge, edge.bearer | {"x-api-key": API_KEY})).items():
        assert (refusal.code, refusal.reason) == (3, "ERROR_REASON_INVALID_ARGUMENT"), transport
    assert edge.backend.seen == []


async def test_no_answer_about_a_key_is_a_no(edge: Edge) -> None:
    for transport, refusal in (await refusals(edge, {"x-api-key": SLOW_API_KEY})).items():
        assert (refusal.code, refusal.reason, refusal.retry_after_s) == (14, "ERROR_REASON_UNAVAILABLE", 1.0), transport
        assert refusal.http_status == (503 if transport == "rest" else None)
    assert edge.backend.seen == []


async def test_too_many_guesses_are_told_to_come_back_later(edge: Edge) -> None:
    for transport, refusal in (await refusals(edge, {"x-api-key": LIMITED_API_KEY})).items():
        assert (refusal.code, refusal.reason, refusal.retry_after_s) == (8, "ERROR_REASON_LIMIT_REACHED", 60.0), transport
        assert (refusal.metadata, [subject for subject, _ in refusal.quota]) == ({"limit": "api_keys"}, ["api_keys"])
        assert refusal.http_status == (429 if transport == "rest" else None)


async def test_pages_cannot_send_keys(edge: Edge) -> None:
    reply = await edge.http.options("/v1/jobs", headers=PREFLIGHT | {"access-control-request-headers": "x-api-key", "origin": ORIGIN})
    assert "x-api-key" not in reply.headers["access-control-allow-headers"]


async def test_access_log_names_the_user_and_no_key(edge: Edge) -> None:
    replies = [
        await edge.http.get(f"/v1/jobs/{JOB_ID}", headers={"x-api-key": key}) for key in (API_KEY, "gmk_abcdefghijkl_secret-of-a-wrong-key")
    ]
    entries = [await _logged(edge, reply) for reply in replies]
    assert [entry["user"] for entry in entries] == [USER_ID, None]
    assert entries[0]["client"] == "127.0.0.1"
    text = edge.access_log.read_text()
    assert API_KEY not in text
    assert "secret-of-a-wrong-key" not in text


# --- TLS, certificates, Envoy's own door ---------------------------------------------------------------------------------------


def _tls_context(edge: Edge, *alpn: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(edge.certificates / "ca.crt"))
    context.set_alpn_protocols(list(alpn))
    return context


async def _handshake(edge: Edge, context: ssl.SSLContext) -> tuple[str | None, str | None, str, int]:
    """Version, application protocol, cipher, serial number of the certificate."""
    async with asyncio.timeout(START_TIMEOUT_S):
        _, writer = await asyncio.open_connection("localhost", edge.tls_port, ssl=context)
    session = writer.get_extra_info("ssl_object")
    found = (session.version(), session.selected_alpn_protocol(), session.cipher()[0], int(session.getpeercert()["serialNumber"], 16))
    writer.transport.abort()
    return found


async def test_tls_is_modern(edge: Edge) -> None:
    version, protocol, _, _ = await _handshake(edge, _tls_context(edge, "h2", "http/1.1"))
    assert (version, protocol) == ("TLSv1.3", "h2")
    older = _tls_context(edge, "http/1.1")
    older.maximum_version = ssl.TLSVersion.TLSv1_2
    version, protocol, cipher, _ = await _handshake(edge, older)
    assert (version, protocol) == ("TLSv1.2", "http/1.1")
    assert cipher.startswith("ECDHE-")
    assert cipher.endswith(("GCM-SHA256", "GCM-SHA384", "POLY1305"))


async def test_old_tls_is_refused(edge: Edge) -> None:
    context = _tls_context(edge, "http/1.1")
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.deprecated_call():
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await _handshake(edge, context)


@pytest.mark.parametrize("cipher", ["AES128-SHA", "ECDHE-ECDSA-AES128-SHA"])
async def test_old_ciphers_are_refused(edge: Edge, cipher: str) -> None:
    context = _tls_context(edge, "http/1.1")
    context.set_ciphers(f"{cipher}:@SECLEVEL=0")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await _handshake(edge, context)


async def test_new_certificates_are_taken_without_a_restart(tmp_path: Path) -> None:
    certificates, authority, directory = (tmp_path / name for name in ("certificates", "authority", "envoy"))
    for path in (certificates, authority, directory):
        path.mkdir()
    ensure_certificates(certificates, authority)
    async with canned_mesh(certificates) as mesh, mesh.edge(directory) as edge, httpx.AsyncClient(base_url=edge.admin_url) as admin:
        before = (await _handshake(edge, _tls_context(edge, "h2")))[3]
        watch = edge.jobs.WatchJobs(jobs_pb2.WatchJobsRequest(), metadata=edge.metadata)
        assert isinstance(await watch.read(), jobs_pb2.WatchJobsResponse)
        for name in ("edge.crt", "envoy.crt"):
            (certificates / name).unlink()
        assert ensure_certificates(certificates, authority) == ["envoy", "edge"]
        new = {x509.load_pem_x509_certificate((certificates / name).read_bytes()).serial_number for name in ("edge.crt", "envoy.crt")}
        async with asyncio.timeout(START_TIMEOUT_S):
            while not new <= _serials((await admin.get("/certs")).json()):  # noqa: ASYNC110  # Envoy tells nobody that it has read a file
                await asyncio.sleep(0.05)
        after = (await _handshake(edge, _tls_context(edge, "h2")))[3]
        assert after in new - {before}
        # Nobody was cut off.
        edge.backend.go_on.set()
        assert isinstance(await watch.read(), jobs_pb2.WatchJobsResponse)


def _serials(page: dict[str, Any]) -> set[int]:
    return {int(one["serial_number"], 16) for entry in page["certificates"] for one in entry.get("cert_chain", ())}


# --- the description of the API --------------------------------------------------------------------------------------------------


async def test_the_api_is_described(edge: Edge) -> None:
    described = await edge.http.get("/openapi.json")
    assert described.json()["openapi"].startswith("3.1")
    page = await edge.http.get("/docs/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    # Its policy allows neither.
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=", page.text)


async def test_pages_are_served_to_everybody(certificates: Path, tmp_path: Path) -> None:
    pages = {"index.html": b"<!doctype html>" + b"x" * 100_000, "assets/page.js": b"fetch('/openapi.json')", "assets/page.css": b"p {}"}
    openapi, docs = tmp_path / "openapi.json", tmp_path / "docs"
    openapi.write_text('{"openapi": "3.1.0"}')
    (docs / "assets").mkdir(parents=True)
    for name, content in pages.items():
        (docs / name).write_bytes(content)
    async with canned_mesh(certificates) as mesh, mesh.edge(tmp_path, openapi=openapi, docs_dir=docs) as edge:
        described = await edge.http.get("/openapi.json")
        assert (described.json(), described.headers["content-type"]) == ({"openapi": "3.1.0"}, "application/json")
        for path, content in (("/docs/", pages["index.html"]), *((f"/docs/{name}", content) for name, content in pages.items())):
            reply = await edge.http.get(path)
            assert (reply.status_code, reply.content) == (200, content)
            assert "default-src 'none'; style-src 'self'; " in reply.headers["content-security-policy"]
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert reply.headers["cache-control"] == "public, max-age=300"
            assert (await edge.http.head(path)).content == b""
        redirected = await edge.http.get("/docs")
        assert (redirected.status_code, redirected.headers["location"]) == (308, "/docs/")
        assert (await edge.http.get("/docs/assets/../../envoy.yaml")).status_code == 404
        assert (await edge.http.post("/openapi.json")).status_code == 404


async def test_envoys_own_door_cannot_change_it(edge: Edge) -> None:
    async with httpx.AsyncClient(base_url=edge.admin_url) as admin:
        page = await admin.get("/stats/prometheus")
        assert "envoy_http_downstream_rq_total" in page.text
        for path in ("/quitquitquit", "/drain_listeners", "/healthcheck/fail", "/logging", "/runtime_modify", "/config_dump"):
            assert (await admin.post(path)).status_code in (403, 404), path
    assert (await edge.http.get("/stats/prometheus")).status_code == 404


# --- many watchers, bad answers, lost hosts --------------------------------------------------------------------------------------


async def test_watches_leave_room_for_calls(certificates: Path, tmp_path: Path) -> None:
    def narrow(text: str) -> str:
        assert "max_requests: 4096" in text
        return text.replace("max_requests: 4096", "max_requests: 3")

    async with canned_mesh(certificates) as mesh, mesh.edge(tmp_path, edit=narrow) as edge:
        watches: list[Any] = [edge.jobs.WatchJobs(jobs_pb2.WatchJobsRequest(), metadata=edge.metadata) for _ in range(3)]
        for watch in watches:
            await watch.read()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await edge.jobs.WatchJobs(jobs_pb2.WatchJobsRequest(), metadata=edge.metadata).read()
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (await edge.jobs.GetJob(GET_JOB, metadata=edge.metadata)).job.job_id == JOB_ID
        for watch in watches:
            watch.cancel()


SIGN_IN = "/genmesh.identity.v1.IdentityService/SignIn"
WAIT = "wait"


class Answers(grpc.GenericRpcHandler):
    """A gateway that is healthy and answers with the code that `x-answer` asks for."""

    def __init__(self) -> None:
        self.calls = 0

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        answer = self._health if handler_call_details.method == "/grpc.health.v1.Health/Check" else self._answer
        return grpc.unary_unary_rpc_method_handler(answer)

    async def _health(self, _request: bytes, _context: object) -> bytes:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING).SerializeToString()

    async def _answer(self, _request: bytes, context: Any) -> bytes:
        self.calls += 1
        answer = dict(context.invocation_metadata()).get("x-answer", "OK")
        if answer == WAIT:
            await asyncio.Event().wait()
        if answer != "OK":
            await context.abort(grpc.StatusCode[answer], "asked for")
        return b""


@asynccontextmanager
async def _two_gateways(certificates: Path, directory: Path) -> AsyncGenerator[tuple[Edge, list[Answers], list[grpc.aio.Server]]]:
    """An edge with two hosts for the gateway, whose health it does not look at again."""
    answers, servers = [Answers(), Answers()], [grpc.aio.server(), grpc.aio.server()]
    addresses: list[str] = []
    for server, answer in zip(servers, answers, strict=True):
        server.add_generic_rpc_handlers((answer,))
        credentials = server_credentials(TlsFiles.of(certificates, "gateway"))
        addresses.append(f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}")
        await server.start()

    def unhurried(text: str) -> str:
        assert "interval: 2s, no_traffic_interval: 2s" in text
        return text.replace("interval: 2s, no_traffic_interval: 2s", "interval: 3600s, no_traffic_interval: 3600s")

    async with (
        canned_mesh(certificates) as mesh,
        mesh.edge(directory, edit=unhurried, gateway_addresses=tuple(addresses), edge_requests_per_s_ip=0) as edge,
    ):
        yield edge, answers, servers
    for server in servers:
        await server.stop(None)


async def _ejected(edge: Edge) -> int:
    """Hosts of the gateway that were ejected so far."""
    async with httpx.AsyncClient(base_url=edge.admin_url) as admin:
        page = await admin.get("/stats", params={"filter": "cluster.gateway.outlier_detection.ejections_enforced_total", "format": "json"})
    [stat] = page.json()["stats"]
    return stat["value"]


PROVOCATIONS: dict[str, tuple[dict[str, str], float]] = {
    "not offered": ({"x-answer": "UNIMPLEMENTED"}, 20),
    "an error nobody foresaw": ({"x-answer": "INTERNAL"}, 20),
    "out of reach": ({"x-answer": "UNAVAILABLE"}, 20),
    "too late": ({"x-answer": "DEADLINE_EXCEEDED"}, 20),
    "a client in a hurry": ({"x-answer": WAIT}, 0.3),
}


@pytest.mark.parametrize("provocation", PROVOCATIONS.values(), ids=PROVOCATIONS.keys())
async def test_no_answer_ejects_a_host(certificates: Path, tmp_path: Path, provocation: tuple[dict[str, str], float]) -> None:
    metadata, timeout_s = provocation
    async with _two_gateways(certificates, tmp_path) as (edge, answers, _):
        sign_in: Any = edge.channel.unary_unary(SIGN_IN)
        for crowd in (1, 20):  # one after the other, and all at once
            for _ in range(20 // crowd):
                calls = [sign_in(b"", metadata=tuple(metadata.items()), timeout=timeout_s) for _ in range(crowd)]
                for result in await asyncio.gather(*calls, return_exceptions=True):
                    assert isinstance(result, grpc.aio.AioRpcError)
        assert await _ejected(edge) == 0
        for answer in answers:
            answer.calls = 0
        await asyncio.gather(*(sign_in(b"") for _ in range(40)))
        assert all(answer.calls for answer in answers)


async def test_a_host_that_is_gone_is_ejected(certificates: Path, tmp_path: Path) -> None:
    async with _two_gateways(certificates, tmp_path) as (edge, answers, servers):
        sign_in: Any = edge.channel.unary_unary(SIGN_IN)
        await servers[0].stop(None)
        async with asyncio.timeout(START_TIMEOUT_S):
            while not await _ejected(edge):
                await asyncio.gather(*(sign_in(b"") for _ in range(20)), return_exceptions=True)
        answers[1].calls = 0
        await asyncio.gather(*(sign_in(b"") for _ in range(20)))
        assert answers[1].calls == 20
