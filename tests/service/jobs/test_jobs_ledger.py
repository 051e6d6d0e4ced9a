"""What jobs_service tells credit_service: model, API key and receipt lines; and how a refusal of it reaches whoever asked."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from jwt.algorithms import OKPAlgorithm
from redis import asyncio as redis
from sqlalchemy.ext.asyncio import AsyncEngine

from genmesh.credits.v1 import credits_pb2, credits_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from jobs_service import store
from jobs_service.deletion import Deletions
from jobs_service.ledger import Ledger
from jobs_service.lifecycle import Job, State, failure
from jobs_service.queue_stats import queue_stats
from jobs_service.servicer import JobsAdminServicer, JobsServicer
from jobs_service.settings import DispatchSettings
from jobs_service.store import Duty
from jobs_service.tables import jobs as jobs_table
from jobs_service.tables import outbox, requests, retries
from jobs_service.watch import Hub
from servicekit.audit import AuditEntry, Recorder
from servicekit.database import transaction
from servicekit.errors import MeshError, Reason, unavailable
from servicekit.identity import ALGORITHM, TokenVerifier
from servicekit.interceptors import Audit, Authentication, Errors, Interceptor, Validation
from servicekit.limits import RateLimiter
from servicekit.objects import ObjectStore
from tests.service.jobs.world import HOLD_TTL_S, World, new_job, refused, request, submit

KEY, OTHER_KEY = uuid.UUID(int=7), uuid.UUID(int=8)
PLAN = "PLAN_FREE"
CEILING = MeshError(
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.ERROR_REASON_CEILING_REACHED,
    "the daily ceiling leaves no room for this",
    metadata={"period": "day", "ceiling_millicredits": "150", "spent_millicredits": "100", "required_millicredits": "100"},
    quota=[(f"api_key:{KEY}", "150 millicredits a day")],
    retry_after_s=3600,
)
LOST = failure(MeshError(grpc.StatusCode.ABORTED, Reason.ERROR_REASON_WORKER_LOST, "its worker was lost"), "small")


@dataclass
class Books(credits_pb2_grpc.LedgerServiceServicer):
    """A credit_service that notes what it is asked for, and refuses holds when told to."""

    refusal: MeshError | None = None
    holds: list[credits_pb2.ReserveCreditsRequest] = field(default_factory=list)
    captures: list[credits_pb2.CaptureReservationRequest] = field(default_factory=list)
    releases: list[str] = field(default_factory=list)

    async def ReserveCredits(self, request: credits_pb2.ReserveCreditsRequest, context: Any) -> credits_pb2.ReserveCreditsResponse:  # noqa: N802
        self.holds.append(request)
        if self.refusal is not None:
            await context.abort_with_status(rpc_status.to_status(self.refusal.to_status()))
        return credits_pb2.ReserveCreditsResponse(reservation=credits_pb2.Reservation(state=credits_pb2.Reservation.STATE_HELD))

    async def CaptureReservation(  # noqa: N802
        self, request: credits_pb2.CaptureReservationRequest, context: Any
    ) -> credits_pb2.CaptureReservationResponse:
        self.captures.append(request)
        return credits_pb2.CaptureReservationResponse()

    async def ReleaseReservation(self, request: credits_pb2.ReleaseReservationRequest, context: Any) -> Any:  # noqa: N802
        self.releases.append(request.reservation_id)
        return credits_pb2.ReleaseReservationResponse()


@pytest.fixture(scope="session")
def credits_address() -> str:
    """The real one has no part in this."""
    return "127.0.0.1:1"


@pytest.fixture
def books() -> Books:
    """What credit_service is asked for."""
    return Books()  # pyright: ignore[reportAbstractUsage]


@pytest_asyncio.fixture
async def world(
    engine: AsyncEngine, client: "redis.Redis", media: ObjectStore, settings: DispatchSettings, rates: RateLimiter, books: Books
) -> AsyncIterator[World]:
    """jobs_service over real stores and those books."""
    server = grpc.aio.server()
    credits_pb2_grpc.add_LedgerServiceServicer_to_server(books, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        world = World(engine, client, Ledger(channel, timeout_s=5, hold_ttl_s=HOLD_TTL_S), media, settings, rates)
        await world.offer()
        yield world
    await server.stop(0)


async def ended(world: World, state: State, *, steps_done: int = 10, **changes: Any) -> Job:
    """A job that ran and ended, its bill settled."""
    async with transaction(world.engine) as connection:
        job = await submit(connection, new_job(world.owner, **changes))
        running = await store.start_attempt(connection, job.job_id, worker_id="w", entry="s/1-0", takeover=False)
        assert running is not None
        why = LOST if state is State.FAILED else None
        done = await store.finish(connection, running, state, fallback_s=60, steps_done=steps_done, failure=why)
    assert done is not None
    await world.delivery.fulfil(done[0], Duty.SETTLE)
    return done[0]


# --- holds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "told"), [(KEY, str(KEY)), (None, "")], ids=["an API key", "signed in"])
async def test_a_hold_names_model_and_key_and_the_job_keeps_the_key(world: World, books: Books, key: uuid.UUID | None, told: str):
    job = await world.jobs().create(world.owner, PLAN, request(), key)
    [hold] = books.holds
    assert (hold.reservation_id, hold.job_id, hold.user_id) == (job.job_id, job.job_id, str(world.owner))
    assert (hold.model, hold.api_key_id, hold.amount_millicredits) == ("small", told, 100)
    assert (await world.job(job.job_id)).api_key_id == key


async def test_all_jobs_of_a_batch_are_held_for_under_its_key(world: World, books: Books):
    jobs = await world.jobs().create_batch(world.owner, PLAN, [request(), request()], KEY)
    assert {hold.api_key_id for hold in books.holds} == {str(KEY)}
    assert [(await world.job(job.job_id)).api_key_id for job in jobs] == [KEY] * 2


@pytest.mark.parametrize(("first", "second"), [(KEY, OTHER_KEY), (KEY, None), (None, KEY)])
async def test_a_repeat_goes_on_with_the_key_of_the_first_request(
    world: World, books: Books, first: uuid.UUID | None, second: uuid.UUID | None
):
    body = request()
    books.refusal = unavailable("away")
    assert (await refused(world.jobs().create(world.owner, PLAN, body, first))).code is grpc.StatusCode.UNAVAILABLE
    books.refusal = None
    job = await world.jobs().create(world.owner, PLAN, body, second)
    assert books.holds[0] == books.holds[1]
    assert (await world.job(job.job_id)).api_key_id == first


# --- holds of retries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [OTHER_KEY, None])
async def test_a_retry_of_its_owner_counts_under_the_key_they_used(world: World, books: Books, key: uuid.UUID | None):
    job = await ended(world, State.FAILED, api_key_id=KEY)
    back = await world.dead_letters().retry(job.job_id, world.owner, key)
    [hold] = books.holds
    assert (hold.reservation_id, hold.job_id, hold.model) == (str(back.hold_id), str(job.job_id), "small")
    assert hold.api_key_id == (str(key) if key else "")
    assert back.api_key_id == key


async def test_a_job_put_back_by_an_administrator_keeps_its_key(world: World, books: Books):
    one, other = await ended(world, State.FAILED, api_key_id=KEY), await ended(world, State.FAILED)
    assert (await world.dead_letters().retry(one.job_id)).api_key_id == KEY
    [outcome] = await world.dead_letters().requeue(LOST.fingerprint, limit=9)
    assert (outcome.job_id, outcome.refusal) == (other.job_id, None)
    assert [hold.api_key_id for hold in books.holds] == [str(KEY), ""]


async def test_a_repeated_retry_goes_on_with_the_key_that_was_noted(world: World, books: Books):
    job = await ended(world, State.FAILED)
    books.refusal = unavailable("away")
    await refused(world.dead_letters().retry(job.job_id, world.owner, KEY))
    books.refusal = None
    back = await world.dead_letters().retry(job.job_id, world.owner, OTHER_KEY)
    assert books.holds[0] == books.holds[1]
    assert (books.holds[1].api_key_id, back.api_key_id) == (str(KEY), KEY)


# --- bills ------------------------------------------------------------------------------------------------------------


def picture_of(count: int) -> bytes:
    image = jobs_pb2.ImageSpec(model="small", prompt="a tiger", width=64, height=48, steps=5, image_count=count)
    return jobs_pb2.JobSpec(image=image).SerializeToString()


@pytest.mark.parametrize(("state", "steps_done", "cost"), [(State.COMPLETED, 10, 99), (State.CANCELLED, 4, 39)])
async def test_a_capture_says_what_was_paid_for(world: World, books: Books, state: State, steps_done: int, cost: int):
    job = await ended(world, state, steps_done=steps_done, estimated_cost=99, spec=picture_of(2))
    [capture] = books.captures
    assert (capture.reservation_id, capture.amount_millicredits) == (str(job.hold_id), cost)
    description = "small, 64×48, 2 pictures"  # noqa: RUF001
    assert list(capture.lines) == [
        credits_pb2.ReceiptLine(description=description, quantity=steps_done, unit="step", amount_millicredits=cost)
    ]


@pytest.mark.parametrize("state", [State.FAILED, State.CANCELLED])
async def test_what_costs_nothing_is_released(world: World, books: Books, state: State):
    job = await ended(world, state, steps_done=0)
    assert (books.captures, books.releases) == ([], [str(job.hold_id)])


# --- refusals ---------------------------------------------------------------------------------------------------------


async def test_a_ceiling_is_asked_about_once_and_nothing_is_left(world: World, books: Books):
    books.refusal = CEILING
    error = await refused(world.jobs().create(world.owner, PLAN, request(), KEY))
    assert (error.code, error.reason, error.metadata) == (CEILING.code, CEILING.reason, CEILING.metadata)
    assert len(books.holds) == 1
    await refused(world.jobs().create_batch(world.owner, PLAN, [request(), request()], KEY))
    assert len(books.holds) == 3
    assert sorted(books.releases) == sorted(hold.reservation_id for hold in books.holds[1:])  # those that were asked for at once
    assert [await world.count(table) for table in (jobs_table, requests, outbox)] == [0, 0, 0]


async def test_a_retry_that_a_ceiling_refuses_leaves_the_job_failed(world: World, books: Books):
    job = await ended(world, State.FAILED)
    books.refusal = CEILING
    await refused(world.dead_letters().retry(job.job_id, world.owner, KEY))
    assert len(books.holds) == 1
    assert await world.count(retries) == 0
    assert await world.job(job.job_id) == job
    books.refusal = None
    back = await world.dead_letters().retry(job.job_id, world.owner, OTHER_KEY)  # another key may have room
    assert (back.state, back.api_key_id, books.holds[1].api_key_id) == (State.PENDING, OTHER_KEY, str(OTHER_KEY))


class MemoryTrail:
    """Keeps how acts ended."""

    def __init__(self) -> None:
        self.finished: list[AuditEntry] = []

    async def begin(self, entry: AuditEntry) -> None:
        """See AuditTrail."""

    async def finish(self, entry: AuditEntry) -> None:
        """See AuditTrail."""
        self.finished.append(entry)


class Door:
    """The RPCs of jobs_service, called with tokens as the gateway makes them."""

    def __init__(self) -> None:
        self._private = Ed25519PrivateKey.generate()
        jwk: dict[str, Any] = OKPAlgorithm.to_jwk(self._private.public_key(), as_dict=True)
        self._key = jwt.PyJWK.from_dict({**jwk, "kid": "key", "alg": ALGORITHM})
        self.channel: grpc.aio.Channel | None = None
        self.trail = MemoryTrail()

    async def get(self, key_id: str) -> jwt.PyJWK | None:
        return self._key if key_id == "key" else None

    async def call(
        self, method: str, message: Message, response: type[Message], user_id: uuid.UUID, roles: Sequence[str] = (), **claims: Any
    ) -> Any:
        assert self.channel is not None
        now = int(time.time())
        signed = {"iss": "i", "aud": "a", "sub": str(user_id), "iat": now, "exp": now + 900, "roles": list(roles), "plan": PLAN, **claims}
        token = jwt.encode(signed, self._private, algorithm=ALGORITHM, headers={"kid": "key"})
        rpc = self.channel.unary_unary(method, type(message).SerializeToString, response.FromString)
        return await rpc(message, metadata=(("authorization", f"Bearer {token}"),))


@pytest_asyncio.fixture
async def door(world: World, books: Books) -> AsyncIterator[Door]:
    door = Door()
    layers = [Errors(), Authentication(TokenVerifier(door, issuer="i", audience="a")), Validation(), Audit(Recorder(door.trail))]
    server = grpc.aio.server(interceptors=[Interceptor(layers)])
    deletions = Deletions(world.engine, world.media, world.log, world.delivery)
    limits = world.limits()
    servicer = JobsServicer(
        world.jobs(), world.dead_letters(), deletions, Hub(world.log), world.log, limits=limits, checkpoint_interval_s=60
    )
    jobs_pb2_grpc.add_JobsServiceServicer_to_server(servicer, server)
    jobs_pb2_grpc.add_JobsAdminServiceServicer_to_server(JobsAdminServicer(world.dead_letters(), queue_stats(world.engine)), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as door.channel:
        yield door
    await server.stop(0)


CREATE = "/genmesh.jobs.v1.JobsService/CreateJob"
BATCH = "/genmesh.jobs.v1.JobsService/BatchCreateJobs"
RETRY = "/genmesh.jobs.v1.JobsService/RetryJob"
REQUEUE = "/genmesh.jobs.v1.JobsAdminService/RequeueDeadLetter"


async def test_the_key_of_the_token_is_the_key_of_the_hold(world: World, books: Books, door: Door):
    claims = {"api_key_id": str(KEY), "scopes": ["submit"]}
    await door.call(CREATE, request(), jobs_pb2.CreateJobResponse, world.owner, **claims)
    await door.call(BATCH, jobs_pb2.BatchCreateJobsRequest(requests=[request()]), jobs_pb2.BatchCreateJobsResponse, world.owner, **claims)
    await door.call(CREATE, request(), jobs_pb2.CreateJobResponse, world.owner)
    job = await ended(world, State.FAILED, api_key_id=OTHER_KEY)
    await door.call(RETRY, jobs_pb2.RetryJobRequest(job_id=str(job.job_id)), jobs_pb2.RetryJobResponse, world.owner, **claims)
    assert [hold.api_key_id for hold in books.holds] == [str(KEY), str(KEY), "", str(KEY)]


async def test_the_audit_trail_says_what_was_put_back(world: World, books: Books, door: Door):
    jobs = [await ended(world, State.FAILED, api_key_id=OTHER_KEY) for _ in range(4)]
    one = jobs_pb2.RequeueDeadLetterRequest(job_id=str(jobs[0].job_id))
    await door.call(REQUEUE, one, jobs_pb2.RequeueDeadLetterResponse, uuid.uuid4(), ["operator"])
    alike = jobs_pb2.RequeueDeadLetterRequest(fingerprint=LOST.fingerprint, max_count=2)
    await door.call(REQUEUE, alike, jobs_pb2.RequeueDeadLetterResponse, uuid.uuid4(), ["operator"])
    books.refusal = CEILING
    await door.call(REQUEUE, alike, jobs_pb2.RequeueDeadLetterResponse, uuid.uuid4(), ["operator"])
    asked = {"fingerprint": LOST.fingerprint, "max_count": "2"}
    assert [(entry.subject, entry.details) for entry in door.trail.finished] == [
        (str(jobs[0].job_id), {}),
        ("", {**asked, "requeued_count": "2", "refused_count": "0"}),
        ("", {**asked, "requeued_count": "0", "refused_count": "1"}),
    ]


async def test_an_administrators_own_key_pays_for_nobody(world: World, books: Books, door: Door):
    job = await ended(world, State.FAILED, api_key_id=OTHER_KEY)
    one = jobs_pb2.RequeueDeadLetterRequest(job_id=str(job.job_id))
    await door.call(REQUEUE, one, jobs_pb2.RequeueDeadLetterResponse, uuid.uuid4(), ["admin"], api_key_id=str(KEY), scopes=["admin"])
    assert [hold.api_key_id for hold in books.holds] == [str(OTHER_KEY)]


async def test_a_token_with_a_key_that_is_none_is_refused(world: World, books: Books, door: Door):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await door.call(CREATE, request(), jobs_pb2.CreateJobResponse, world.owner, api_key_id="mine")
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert books.holds == []


async def status_of(call: Any) -> status_pb2.Status:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    status = rpc_status.from_call(raised.value)  # pyright: ignore[reportArgumentType]
    assert status is not None
    return status


def read(status: status_pb2.Status) -> list[Any]:
    """A status with its details as messages: packed, the entries of a map may come in any order."""
    known = (error_details_pb2.ErrorInfo, error_details_pb2.QuotaFailure, error_details_pb2.RetryInfo)
    details = [message for packed in status.details for message in (kind() for kind in known) if packed.Unpack(message)]
    assert len(details) == len(status.details)
    return [status.code, status.message, *details]


async def test_a_ceiling_reaches_the_client_whole(world: World, books: Books, door: Door):
    job = await ended(world, State.FAILED)
    books.refusal = CEILING
    whole = read(CEILING.to_status())
    batch = jobs_pb2.BatchCreateJobsRequest(requests=[request()])
    retry = jobs_pb2.RetryJobRequest(job_id=str(job.job_id))
    requeue = jobs_pb2.RequeueDeadLetterRequest(job_id=str(job.job_id))
    alike = jobs_pb2.RequeueDeadLetterRequest(fingerprint=LOST.fingerprint)
    assert read(await status_of(door.call(CREATE, request(), jobs_pb2.CreateJobResponse, world.owner))) == whole
    assert read(await status_of(door.call(BATCH, batch, jobs_pb2.BatchCreateJobsResponse, world.owner))) == whole
    assert read(await status_of(door.call(RETRY, retry, jobs_pb2.RetryJobResponse, world.owner))) == whole
    assert read(await status_of(door.call(REQUEUE, requeue, jobs_pb2.RequeueDeadLetterResponse, uuid.uuid4(), ["admin"]))) == whole
    answer = await door.call(REQUEUE, alike, jobs_pb2.RequeueDeadLetterResponse, uuid.uuid4(), ["admin"])
    assert [(refusal.job_id, read(refusal.error)) for refusal in answer.refusals] == [(str(job.job_id), whole)]
    assert len(books.holds) == 5
