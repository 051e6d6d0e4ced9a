"""How the end-to-end tests call the mesh: the same request over gRPC, grpc-web and JSON, and refusals read alike on all three.

grpc-web frames are made and read by hand, so that no client library of ours or others can hide what is on the wire.
"""

import asyncio
import base64
import json
import struct
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import grpc
import httpx
from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cli.stack import Stack
from genmesh.credits.v1 import credits_pb2, payments_pb2
from genmesh.identity.v1 import identity_pb2
from genmesh.inference.v1 import inference_pb2
from genmesh.jobs.v1 import jobs_pb2

DEADLINE_S = 120.0
"""Bound of every wait: far more than a busy machine needs. No test waits for time to pass."""
POLL_S = 0.05
PASSWORD = "correct horse battery staple"
TERMINAL = frozenset({jobs_pb2.STATE_COMPLETED, jobs_pb2.STATE_FAILED, jobs_pb2.STATE_CANCELLED})
GRPC_WEB = {"content-type": "application/grpc-web+proto", "accept": "application/grpc-web+proto", "x-grpc-web": "1"}

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
Value = TypeVar("Value")


class Transport(StrEnum):
    """Ways in."""

    GRPC = "grpc"
    GRPC_WEB = "grpc-web"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Method(Generic[Request, Response]):
    """An RPC of the contract with its REST binding."""

    path: str
    request: type[Request]
    response: type[Response]
    http: str
    rest: str


_JOBS, _CREDITS = "/genmesh.jobs.v1.JobsService/", "/genmesh.credits.v1.CreditsService/"
ESTIMATE_JOB = Method(_JOBS + "EstimateJob", jobs_pb2.EstimateJobRequest, jobs_pb2.EstimateJobResponse, "POST", "/v1/jobs:estimate")
CREATE_JOB = Method(_JOBS + "CreateJob", jobs_pb2.CreateJobRequest, jobs_pb2.CreateJobResponse, "POST", "/v1/jobs")
GET_JOB = Method(_JOBS + "GetJob", jobs_pb2.GetJobRequest, jobs_pb2.GetJobResponse, "GET", "/v1/jobs/{jobId}")
LIST_JOBS = Method(_JOBS + "ListJobs", jobs_pb2.ListJobsRequest, jobs_pb2.ListJobsResponse, "GET", "/v1/jobs")
CANCEL_JOB = Method(_JOBS + "CancelJob", jobs_pb2.CancelJobRequest, jobs_pb2.CancelJobResponse, "POST", "/v1/jobs/{jobId}:cancel")
BATCH_CREATE_JOBS = Method(
    _JOBS + "BatchCreateJobs", jobs_pb2.BatchCreateJobsRequest, jobs_pb2.BatchCreateJobsResponse, "POST", "/v1/jobs:batchCreate"
)
RETRY_JOB = Method(_JOBS + "RetryJob", jobs_pb2.RetryJobRequest, jobs_pb2.RetryJobResponse, "POST", "/v1/jobs/{jobId}:retry")
DELETE_JOB = Method(_JOBS + "DeleteJob", jobs_pb2.DeleteJobRequest, jobs_pb2.DeleteJobResponse, "DELETE", "/v1/jobs/{jobId}")
WATCH_JOBS = Method(_JOBS + "WatchJobs", jobs_pb2.WatchJobsRequest, jobs_pb2.WatchJobsResponse, "GET", "/v1/jobs:watch")
_JOBS_ADMIN = "/genmesh.jobs.v1.JobsAdminService/"
GET_QUEUE_STATS = Method(
    _JOBS_ADMIN + "GetQueueStats", jobs_pb2.GetQueueStatsRequest, jobs_pb2.GetQueueStatsResponse, "GET", "/v1/admin/queue"
)
LIST_DEAD_LETTERS = Method(
    _JOBS_ADMIN + "ListDeadLetters", jobs_pb2.ListDeadLettersRequest, jobs_pb2.ListDeadLettersResponse, "GET", "/v1/admin/deadLetters"
)
REQUEUE_DEAD_LETTER = Method(
    _JOBS_ADMIN + "RequeueDeadLetter",
    jobs_pb2.RequeueDeadLetterRequest,
    jobs_pb2.RequeueDeadLetterResponse,
    "POST",
    "/v1/admin/deadLetters:requeue",
)
GET_BALANCE = Method(_CREDITS + "GetBalance", credits_pb2.GetBalanceRequest, credits_pb2.GetBalanceResponse, "GET", "/v1/credits")
LIST_ENTRIES = Method(
    _CREDITS + "ListEntries", credits_pb2.ListEntriesRequest, credits_pb2.ListEntriesResponse, "GET", "/v1/credits/entries"
)
WATCH_BALANCE = Method(
    _CREDITS + "WatchBalance", credits_pb2.WatchBalanceRequest, credits_pb2.WatchBalanceResponse, "GET", "/v1/credits:watch"
)
LIST_CEILINGS = Method(
    _CREDITS + "ListCeilings", credits_pb2.ListCeilingsRequest, credits_pb2.ListCeilingsResponse, "GET", "/v1/credits/ceilings"
)
SET_KEY_CEILING = Method(
    _CREDITS + "SetKeyCeiling", credits_pb2.SetKeyCeilingRequest, credits_pb2.SetKeyCeilingResponse, "POST", "/v1/credits/ceilings"
)
_LEDGER_ADMIN = "/genmesh.credits.v1.LedgerAdminService/"
GRANT_CREDITS = Method(
    _LEDGER_ADMIN + "GrantCredits", credits_pb2.GrantCreditsRequest, credits_pb2.GrantCreditsResponse, "POST", "/v1/admin/credits:grant"
)
CLAWBACK_CREDITS = Method(
    _LEDGER_ADMIN + "ClawbackCredits",
    credits_pb2.ClawbackCreditsRequest,
    credits_pb2.ClawbackCreditsResponse,
    "POST",
    "/v1/admin/credits:clawback",
)
GET_ACCOUNT = Method(
    _LEDGER_ADMIN + "GetAccount", credits_pb2.GetAccountRequest, credits_pb2.GetAccountResponse, "GET", "/v1/admin/accounts/{userId}"
)
SET_USER_CEILING = Method(
    _LEDGER_ADMIN + "SetUserCeiling", credits_pb2.SetUserCeilingRequest, credits_pb2.SetUserCeilingResponse, "POST", "/v1/admin/ceilings"
)
LIST_ACCOUNT_ENTRIES = Method(
    _LEDGER_ADMIN + "ListAccountEntries",
    credits_pb2.ListAccountEntriesRequest,
    credits_pb2.ListAccountEntriesResponse,
    "GET",
    "/v1/admin/accounts/{userId}/entries",
)
AUDIT_LEDGER = Method(
    _LEDGER_ADMIN + "AuditLedger", credits_pb2.AuditLedgerRequest, credits_pb2.AuditLedgerResponse, "GET", "/v1/admin/ledger:audit"
)
_PAYMENTS = "/genmesh.credits.v1.PaymentsService/"
LIST_PRICES = Method(_PAYMENTS + "ListPrices", payments_pb2.ListPricesRequest, payments_pb2.ListPricesResponse, "GET", "/v1/prices")
CREATE_TOP_UP = Method(_PAYMENTS + "CreateTopUp", payments_pb2.CreateTopUpRequest, payments_pb2.CreateTopUpResponse, "POST", "/v1/topUps")
GET_TOP_UP = Method(_PAYMENTS + "GetTopUp", payments_pb2.GetTopUpRequest, payments_pb2.GetTopUpResponse, "GET", "/v1/topUps/{topUpId}")
LIST_TOP_UPS = Method(_PAYMENTS + "ListTopUps", payments_pb2.ListTopUpsRequest, payments_pb2.ListTopUpsResponse, "GET", "/v1/topUps")
REGISTER_USER = Method(
    "/genmesh.identity.v1.IdentityService/RegisterUser",
    identity_pb2.RegisterUserRequest,
    identity_pb2.RegisterUserResponse,
    "POST",
    "/v1/users",
)
SIGN_IN = Method(
    "/genmesh.identity.v1.IdentityService/SignIn", identity_pb2.SignInRequest, identity_pb2.SignInResponse, "POST", "/v1/sessions"
)
_IDENTITY = "/genmesh.identity.v1.IdentityService/"
GET_SIGN_IN_OPTIONS = Method(
    _IDENTITY + "GetSignInOptions",
    identity_pb2.GetSignInOptionsRequest,
    identity_pb2.GetSignInOptionsResponse,
    "GET",
    "/v1/signInOptions",
)
REFRESH_SESSION = Method(
    _IDENTITY + "RefreshSession",
    identity_pb2.RefreshSessionRequest,
    identity_pb2.RefreshSessionResponse,
    "POST",
    "/v1/sessions:refresh",
)
SIGN_OUT = Method(_IDENTITY + "SignOut", identity_pb2.SignOutRequest, identity_pb2.SignOutResponse, "POST", "/v1/sessions:signOut")
LINK_IDENTITY = Method(
    _IDENTITY + "LinkIdentity", identity_pb2.LinkIdentityRequest, identity_pb2.LinkIdentityResponse, "POST", "/v1/me/identities"
)
LIST_IDENTITIES = Method(
    _IDENTITY + "ListIdentities", identity_pb2.ListIdentitiesRequest, identity_pb2.ListIdentitiesResponse, "GET", "/v1/me/identities"
)
UNLINK_IDENTITY = Method(
    _IDENTITY + "UnlinkIdentity",
    identity_pb2.UnlinkIdentityRequest,
    identity_pb2.UnlinkIdentityResponse,
    "DELETE",
    "/v1/me/identities/{identityId}",
)
CREATE_API_KEY = Method(
    _IDENTITY + "CreateApiKey", identity_pb2.CreateApiKeyRequest, identity_pb2.CreateApiKeyResponse, "POST", "/v1/apiKeys"
)
LIST_API_KEYS = Method(_IDENTITY + "ListApiKeys", identity_pb2.ListApiKeysRequest, identity_pb2.ListApiKeysResponse, "GET", "/v1/apiKeys")
REVOKE_API_KEY = Method(
    _IDENTITY + "RevokeApiKey", identity_pb2.RevokeApiKeyRequest, identity_pb2.RevokeApiKeyResponse, "DELETE", "/v1/apiKeys/{apiKeyId}"
)
GET_ME = Method("/genmesh.identity.v1.IdentityService/GetMe", identity_pb2.GetMeRequest, identity_pb2.GetMeResponse, "GET", "/v1/me")
LIST_USERS = Method(
    "/genmesh.identity.v1.IdentityAdminService/ListUsers",
    identity_pb2.ListUsersRequest,
    identity_pb2.ListUsersResponse,
    "GET",
    "/v1/admin/users",
)
UPDATE_USER = Method(
    "/genmesh.identity.v1.IdentityAdminService/UpdateUser",
    identity_pb2.UpdateUserRequest,
    identity_pb2.UpdateUserResponse,
    "PATCH",
    "/v1/admin/users/{userId}",
)
LIST_AUDIT_ENTRIES = Method(
    "/genmesh.identity.v1.IdentityAdminService/ListAuditEntries",
    identity_pb2.ListAuditEntriesRequest,
    identity_pb2.ListAuditEntriesResponse,
    "GET",
    "/v1/admin/auditEntries",
)
CREATE_UPLOAD = Method(_JOBS + "CreateUpload", jobs_pb2.CreateUploadRequest, jobs_pb2.CreateUploadResponse, "POST", "/v1/uploads")
COMPLETE_UPLOAD = Method(
    _JOBS + "CompleteUpload", jobs_pb2.CompleteUploadRequest, jobs_pb2.CompleteUploadResponse, "POST", "/v1/uploads/{uploadId}:complete"
)
GET_UPLOAD = Method(_JOBS + "GetUpload", jobs_pb2.GetUploadRequest, jobs_pb2.GetUploadResponse, "GET", "/v1/uploads/{uploadId}")
LIST_MODELS = Method(
    "/genmesh.inference.v1.ModelCatalogService/ListModels",
    inference_pb2.ListModelsRequest,
    inference_pb2.ListModelsResponse,
    "GET",
    "/v1/models",
)


class Refusal(Exception):  # noqa: N818  # what a client is told, not a fault of the test
    """A call that was refused, and everything its caller was told."""

    def __init__(self, status: status_pb2.Status, http_status: int | None = None) -> None:
        self.code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
        self.message = status.message
        self.http_status = http_status
        """Of JSON calls."""
        self.infos: list[error_details_pb2.ErrorInfo] = []
        self.fields: list[str] = []
        for detail in status.details:
            info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            if detail.Unpack(info):
                self.infos.append(info)
            elif detail.Unpack(bad_request):
                self.fields += [violation.field for violation in bad_request.field_violations]
        super().__init__(f"{self.code.name} {self.reason} {self.fields} {self.message[:200]} (HTTP {http_status})")

    @property
    def reason(self) -> str:
        """Name of the ErrorReason without its prefix; empty when it is Envoy or gRPC that refuses."""
        return self.infos[0].reason.removeprefix("ERROR_REASON_") if self.infos else ""

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata of the ErrorInfo."""
        return dict(self.infos[0].metadata) if self.infos else {}


def frame(message: bytes) -> bytes:
    """A grpc-web data frame."""
    return struct.pack(">BI", 0, len(message)) + message


def frames(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Flag and payload of each grpc-web frame; a body that ends within a frame is a failure."""
    while body:
        flag, size = struct.unpack(">BI", body[:5])
        assert len(body) >= 5 + size, "the body ends within a frame"
        yield flag, body[5 : 5 + size]
        body = body[5 + size :]


def bearer(token: str) -> dict[str, str]:
    """The header that proves a user; none for an empty token."""
    return {"authorization": f"Bearer {token}"} if token else {}


@dataclass(frozen=True, slots=True)
class Edge:
    """The public door of a running stack."""

    stack: Stack
    channel: grpc.aio.Channel
    http: httpx.AsyncClient
    """HTTP/1.1, for grpc-web and JSON."""

    async def call(
        self,
        method: Method[Request, Response],
        request: Request,
        token: str = "",
        transport: Transport = Transport.GRPC,
        headers: Mapping[str, str] = {},
    ) -> Response:
        """A unary call. Raises Refusal."""
        headers = {**bearer(token), **headers}
        if transport is Transport.JSON:
            return await self.rest(method, *rest_form(method, request), headers)
        send = self.grpc if transport is Transport.GRPC else self.grpc_web
        return method.response.FromString(await send(method.path, request.SerializeToString(), headers))

    async def grpc(self, path: str, request: bytes, headers: Mapping[str, str]) -> bytes:
        """A unary gRPC call with the request's bytes as they are."""
        call = self.channel.unary_unary(path)
        while True:
            try:
                response: bytes = await call(request, metadata=tuple(headers.items()), timeout=DEADLINE_S)
            except grpc.aio.AioRpcError as error:
                if not answered_too_early(error):
                    raise refusal_of(error) from None
            else:
                return response

    async def grpc_web(self, path: str, request: bytes, headers: Mapping[str, str]) -> bytes:
        """A unary grpc-web call with the request's bytes as they are."""
        reply = await self.http.post(path, content=frame(request), headers={**GRPC_WEB, **headers})
        found = list(frames(reply.content)) if reply.headers["content-type"].startswith("application/grpc-web") else []
        trailers = {key.lower(): value for key, value in reply.headers.items()}
        for flag, payload in found:
            if flag & 0x80:
                for line in payload.decode().split("\r\n"):
                    key, _, value = line.partition(":")
                    trailers[key.strip().lower()] = value.strip()
        if trailers.get("grpc-status") != "0":
            status = status_pb2.Status(code=int(trailers["grpc-status"]), message=trailers.get("grpc-message", ""))
            if details := trailers.get("grpc-status-details-bin"):
                status = status_pb2.Status.FromString(base64.b64decode(details + "=" * (-len(details) % 4)))
            raise Refusal(status)
        assert (reply.status_code, [flag for flag, _ in found]) == (200, [0, 0x80]), "one message, then the trailers"
        return found[0][1]

    async def rest(
        self,
        method: Method[Request, Response],
        path: str,
        query: Sequence[tuple[str, str]],
        body: str | bytes | None,
        headers: Mapping[str, str],
    ) -> Response:
        """A JSON call. The answer has to be what the contract says, field by field."""
        sent = {"content-type": "application/json", **headers} if body is not None else dict(headers)
        reply = await self.http.request(method.http, path, params=list(query) or None, content=body, headers=sent)
        assert reply.headers["content-type"] == "application/json", (reply.status_code, reply.text[:300])
        if not reply.is_success:
            raise Refusal(json_format.ParseDict(reply.json(), status_pb2.Status()), reply.status_code)
        return json_format.ParseDict(reply.json(), method.response())


def rest_form(method: Method[Any, Any], request: Message) -> tuple[str, list[tuple[str, str]], str | None]:
    """Path, query and body of a request by the method's REST binding."""
    values: dict[str, Any] = json_format.MessageToDict(request)
    path = method.rest
    for name in [name for name in values if f"{{{name}}}" in path]:
        path = path.replace(f"{{{name}}}", quote(values.pop(name), safe=""))
    if method.http in ("GET", "DELETE"):
        return path, [(key, str(one)) for key, value in values.items() for one in (value if isinstance(value, list) else [value])], None
    return path, [], json.dumps(values)


def answered_too_early(error: grpc.aio.AioRpcError) -> bool:
    """Whether grpc.aio lost an answer that came before the request was sent, as Envoy's refusals may: it tells an INTERNAL of its own."""
    return error.code() is grpc.StatusCode.INTERNAL and error.details() == "Internal error from Core"


def refusal_of(error: grpc.RpcError) -> Refusal:
    """What a refused gRPC call tells."""
    assert isinstance(error, (grpc.aio.AioRpcError, grpc.Call))
    status = rpc_status.from_call(error)  # pyright: ignore[reportArgumentType]
    if status is None:
        number: int = error.code().value[0]
        status = status_pb2.Status(code=number, message=error.details() or "")
    return Refusal(status)


async def refused(call: Awaitable[object]) -> Refusal:
    """Await a call that has to be refused."""
    try:
        response = await call
    except Refusal as refusal:
        return refusal
    raise AssertionError(f"was not refused, but answered {response}")


async def eventually(probe: Callable[[], Awaitable[Value]], wanted: Callable[[Value], bool]) -> Value:
    """Ask until the answer is the wanted one: for what no stream tells. Fails with the last answer at the deadline."""
    answer = await probe()
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not wanted(answer):
                await asyncio.sleep(POLL_S)
                answer = await probe()
    except TimeoutError:
        raise AssertionError(f"never came; the last answer is {answer}") from None
    return answer


def image(prompt: str = "a tiger face", **values: Any) -> jobs_pb2.JobSpec:
    """A spec; four steps where nothing is said, because most tests need a picture and not a good one."""
    chosen: dict[str, Any] = {"steps": 4, "seed": 7, **values}
    return jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt=prompt, **chosen))


def submission(spec: jobs_pb2.JobSpec | None = None, request_id: str = "") -> jobs_pb2.CreateJobRequest:
    """A request for a job."""
    return jobs_pb2.CreateJobRequest(request_id=request_id or str(uuid.uuid4()), spec=spec or image())


@dataclass(slots=True)
class Watched:
    """What one watcher has seen."""

    messages: list[jobs_pb2.WatchJobsResponse] = field(default_factory=list)

    @property
    def snapshots(self) -> list[jobs_pb2.Job]:
        """Snapshots in order."""
        return [message.snapshot for message in self.messages if message.HasField("snapshot")]

    @property
    def events(self) -> list[jobs_pb2.JobEvent]:
        """Events in order."""
        return [message.event for message in self.messages if message.HasField("event")]

    @property
    def token(self) -> str:
        """Where to resume."""
        return self.messages[-1].resume_token

    @property
    def steps(self) -> list[int]:
        """Steps told while denoising, in order."""
        told = (event.progress for event in self.events if event.HasField("progress"))
        return [progress.step for progress in told if progress.stage == jobs_pb2.STAGE_DENOISING and progress.step]


@dataclass(frozen=True, slots=True)
class User:
    """A signed-in user, or a program with one of their keys."""

    edge: Edge
    user_id: str
    email: str
    token: str
    refresh_token: str = ""
    api_key: str = ""

    @property
    def credential(self) -> dict[str, str]:
        """The header that proves who it is."""
        return {"x-api-key": self.api_key} if self.api_key else bearer(self.token)

    async def call(self, method: Method[Request, Response], request: Request, transport: Transport = Transport.GRPC) -> Response:
        """A call as this user. Raises Refusal."""
        return await self.edge.call(method, request, transport=transport, headers=self.credential)

    async def submit(self, spec: jobs_pb2.JobSpec | None = None, transport: Transport = Transport.GRPC) -> jobs_pb2.Job:
        """Submit a job."""
        return (await self.call(CREATE_JOB, submission(spec), transport)).job

    async def job(self, job_id: str) -> jobs_pb2.Job:
        """A job as it stands."""
        return (await self.call(GET_JOB, jobs_pb2.GetJobRequest(job_id=job_id))).job

    async def jobs(self) -> list[jobs_pb2.Job]:
        """The newest jobs."""
        return list((await self.call(LIST_JOBS, jobs_pb2.ListJobsRequest())).jobs)

    async def cancel(self, job_id: str, transport: Transport = Transport.GRPC) -> jobs_pb2.Job:
        """Ask for a job to stop."""
        return (await self.call(CANCEL_JOB, jobs_pb2.CancelJobRequest(job_id=job_id), transport)).job

    async def balance(self) -> tuple[int, int]:
        """Available and reserved millicredits."""
        answer = await self.call(GET_BALANCE, credits_pb2.GetBalanceRequest())
        return answer.available_millicredits, answer.reserved_millicredits

    async def entries(self, job_id: str = "") -> list[credits_pb2.Entry]:
        """Ledger entries, oldest first."""
        answer = await self.call(LIST_ENTRIES, credits_pb2.ListEntriesRequest(job_id=job_id, page_size=200))
        return list(reversed(answer.entries))

    async def stream(self, method: Method[Request, Response], request: Request) -> AsyncGenerator[Response]:
        """Messages of a stream by gRPC until the server ends it; leaving early cancels it. Raises Refusal."""
        stub = self.edge.channel.unary_stream(
            method.path, request_serializer=method.request.SerializeToString, response_deserializer=method.response.FromString
        )
        while True:
            call = stub(request, metadata=tuple(self.credential.items()), timeout=DEADLINE_S)
            try:
                async for message in call:
                    yield message
            except grpc.aio.AioRpcError as error:
                if not answered_too_early(error):
                    raise refusal_of(error) from None
            else:
                return
            finally:
                call.cancel()

    async def stream_sse(self, method: Method[Request, Response], request: Request) -> AsyncGenerator[Response]:
        """The same by server-sent events."""
        path, query, _ = rest_form(method, request)
        headers = {"accept": "text/event-stream", **self.credential}
        async with self.edge.http.stream("GET", path, params=httpx.QueryParams(tuple(query)), headers=headers) as reply:
            if not reply.is_success:
                await reply.aread()
                raise Refusal(json_format.ParseDict(reply.json(), status_pb2.Status()), reply.status_code)
            assert reply.headers["content-type"] == "text/event-stream"
            async with aclosing(_events_of(reply)) as events:
                async for event in events:
                    yield json_format.ParseDict(event, method.response())

    def watch(self, *job_ids: str, token: str = "") -> AsyncGenerator[jobs_pb2.WatchJobsResponse]:
        """Messages of a watch by gRPC."""
        return self.stream(WATCH_JOBS, jobs_pb2.WatchJobsRequest(job_ids=job_ids, resume_token=token))

    def watch_sse(self, *job_ids: str, token: str = "") -> AsyncGenerator[jobs_pb2.WatchJobsResponse]:
        """Messages of a watch by server-sent events."""
        return self.stream_sse(WATCH_JOBS, jobs_pb2.WatchJobsRequest(job_ids=job_ids, resume_token=token))

    async def watch_to_end(self, *job_ids: str, token: str = "") -> Watched:
        """Everything a watch of these jobs tells, up to the end that the server sets."""
        return Watched([message async for message in self.watch(*job_ids, token=token)])

    async def finished(self, job_id: str) -> jobs_pb2.Job:
        """The job once it has ended and its bill is settled."""
        await self.watch_to_end(job_id)
        await self.settled()
        return await self.job(job_id)

    async def settled(self) -> tuple[int, int]:
        """The balance once nothing is held: settling follows the end of a job, and no stream tells."""
        return await eventually(self.balance, lambda balance: balance[1] == 0)


async def _events_of(reply: httpx.Response) -> AsyncGenerator[dict[str, Any]]:
    lines: AsyncIterator[str] = reply.aiter_lines()
    async for line in lines:
        if line:
            assert line.startswith("data: "), line
            yield json.loads(line.removeprefix("data: "))


def ended(event: jobs_pb2.JobEvent) -> bool:
    """Whether the event ends its job."""
    return event.HasField("state_change") and event.state_change.state in TERMINAL
