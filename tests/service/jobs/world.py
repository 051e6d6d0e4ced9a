"""The parts around jobs_service in its tests: jobs to work with, a scripted inference_service, stores that are away."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import grpc
import pytest
import sqlalchemy as sa
import uuid_utils
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from redis import asyncio as redis
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from genmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2
from jobs_service import store
from jobs_service.dead_letters import DeadLetters
from jobs_service.deletion import Deletions
from jobs_service.delivery import Delivery
from jobs_service.events import EventLog, Position, StoredEvent
from jobs_service.jobs import Jobs
from jobs_service.ledger import Ledger
from jobs_service.lifecycle import Job, Priority, State
from jobs_service.limits import Limits, WatchLeases
from jobs_service.queue import JobQueue
from jobs_service.quotes import Quotes
from jobs_service.relay import Relay
from jobs_service.settings import DispatchSettings, PlanLimits
from servicekit.database import transaction
from servicekit.errors import MeshError
from servicekit.limits import RateLimiter
from servicekit.objects import ObjectStore
from servicekit.process import end

DEADLINE_S = 15.0
"""For what has to happen soon: never waited for where it does happen."""
HOLD_TTL_S = 3600
POOL = "pictures"
MODEL = inference_pb2.Model(
    model_id="small",
    kind=jobs_pb2.KIND_IMAGE,
    is_default=True,
    pool=POOL,
    image=inference_pb2.ImageModel(
        default_width=64,
        default_height=64,
        default_steps=10,
        default_guidance_scale=6,
        min_size=32,
        max_size=128,
        size_multiple=8,
        max_steps=50,
    ),
    price=inference_pb2.Price(step_millicredits=10),
)
SPEC = jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger", seed=1))
T = TypeVar("T")


def presign(key: str, content_type: str) -> tuple[str, datetime]:
    """A URL that nobody opens."""
    return f"https://media.test/{key}", datetime.now(UTC)


async def within(awaitable: Awaitable[T]) -> T:
    """What is awaited, or a failed test."""
    async with asyncio.timeout(DEADLINE_S):
        return await awaitable


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return once the condition holds; a failed test if it never does."""
    end = time.monotonic() + DEADLINE_S
    while not await condition():
        assert time.monotonic() < end, "did not come true in time"
        await asyncio.sleep(0.01)


@asynccontextmanager
async def running(*tasks: Coroutine[Any, Any, None]) -> AsyncGenerator[list["asyncio.Task[None]"]]:
    """Background tasks of a process, cancelled after the block; one that died by itself fails the test."""
    started = [asyncio.create_task(task) for task in tasks]
    try:
        yield started
    finally:
        await end(started)
        for task in started:
            if not task.cancelled():
                task.result()


def new_job(owner_id: uuid.UUID, **changes: Any) -> Job:
    """A job that is about to be submitted."""
    job = Job(
        job_id=uuid.UUID(bytes=uuid_utils.uuid7().bytes),
        owner_id=owner_id,
        kind=jobs_pb2.KIND_IMAGE,
        state=State.PENDING,
        version=1,
        priority=Priority.FREE,
        model="small",
        pool=POOL,
        spec=SPEC.SerializeToString(),
        steps_agreed=10,
        estimated_cost=100,
    )
    return replace(job, **changes)


async def note(connection: AsyncConnection, job: Job, request_id: uuid.UUID, *, intent: bytes = b"{}") -> bool:
    """Note that a job is about to be submitted; False when the request is known."""
    one = store.Note(request_id, b"d", job.job_id, intent, job.estimated_cost)
    return (await store.note_requests(connection, job.owner_id, [one])).noted == frozenset({request_id})


async def submit(connection: AsyncConnection, job: Job) -> Job:
    """Commit a job as a submit does."""
    request_id = uuid.uuid4()
    await note(connection, job, request_id)
    committed = await store.commit_job(connection, job, request_id, fallback_s=0)
    assert committed is not None
    return committed[0]


@dataclass(slots=True)
class Generation:
    """One call of Generate, driven by the test."""

    request: inference_pb2.GenerateRequest
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    """The caller cancelled it."""
    _script: "asyncio.Queue[inference_pb2.GenerateResponse | MeshError | None]" = field(default_factory=asyncio.Queue)

    def step(self, number: int, of: int = 10) -> None:
        """A step was done."""
        progress = jobs_pb2.Progress(step=number, step_count=of, percent=100 * number / of, stage=jobs_pb2.STAGE_DENOISING)
        self._script.put_nowait(inference_pb2.GenerateResponse(progress=progress))

    def asset(self, name: str = "one.png") -> None:
        """A file was stored."""
        asset = jobs_pb2.Asset(asset_id=name, object_key=f"{self.request.output_prefix}{name}", content_type="image/png")
        self._script.put_nowait(inference_pb2.GenerateResponse(asset=asset))

    def complete(self, steps_done: int = 10) -> None:
        """All is done."""
        self._script.put_nowait(inference_pb2.GenerateResponse(done=inference_pb2.Done(steps_done=steps_done)))
        self._script.put_nowait(None)

    def fail(self, refusal: MeshError) -> None:
        """The attempt ends with an error."""
        self._script.put_nowait(refusal)

    async def responses(self) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """What the test says, as it says it."""
        while (item := await self._script.get()) is not None:
            if isinstance(item, MeshError):
                raise item
            yield item


class ScriptedInference(inference_pb2_grpc.InferenceServiceServicer, inference_pb2_grpc.ModelCatalogServiceServicer):
    """The remote end of a dispatcher: offers one model, and leaves every call of Generate to the test."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[Generation] = asyncio.Queue()

    async def ListModels(self, request: inference_pb2.ListModelsRequest, context: Any) -> inference_pb2.ListModelsResponse:  # noqa: N802
        return inference_pb2.ListModelsResponse(models=[MODEL])

    async def Generate(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        call = Generation(request)
        self.calls.put_nowait(call)
        try:
            async for response in call.responses():
                yield response
        except asyncio.CancelledError:
            call.stopped.set()
            raise
        except MeshError as refusal:
            status = refusal.to_status()
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            await context.abort(refusal.code, refusal.message)

    async def LoadModel(self, request: inference_pb2.LoadModelRequest, context: Any) -> inference_pb2.LoadModelResponse:  # noqa: N802
        return inference_pb2.LoadModelResponse(model=MODEL)

    async def UnloadModel(self, request: inference_pb2.UnloadModelRequest, context: Any) -> inference_pb2.UnloadModelResponse:  # noqa: N802
        return inference_pb2.UnloadModelResponse(model=MODEL)

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[grpc.aio.Channel]:
        """A channel to it while the block runs."""
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, server)
        inference_pb2_grpc.add_ModelCatalogServiceServicer_to_server(self, server)
        healthy = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        await healthy.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                yield channel
        finally:
            await server.stop(0)


class World:
    """jobs_service over real stores, with keys of its own in Redis and an owner nobody has heard of."""

    def __init__(
        self,
        engine: AsyncEngine,
        client: "redis.Redis",
        ledger: Ledger,
        media: ObjectStore,
        dispatch_settings: DispatchSettings,
        rates: RateLimiter,
    ) -> None:
        self.engine = engine
        self.client = client
        self.media = media
        self.ledger = ledger
        self.settings = dispatch_settings
        self.prefix = dispatch_settings.redis_prefix
        self.lease_s = dispatch_settings.lease_seconds
        self.owner = uuid.uuid4()
        self.rates = rates
        self.log = self.event_log(client)
        self.queue = self.worker_queue("")
        self.delivery = self.delivery_over(client)

    def event_log(self, client: "redis.Redis", *, retention_s: int = 600) -> EventLog:
        return EventLog(client, self.prefix, retention_s=retention_s)

    def worker_queue(self, worker_id: str, *, lease_s: float | None = None) -> JobQueue:
        limits = self.settings.owner_limits
        return JobQueue(
            self.client,
            self.prefix,
            lease_s=lease_s or self.lease_s,
            blocking=self.client,
            worker_id=worker_id,
            owner_limits=limits,
        )

    def delivery_over(self, client: "redis.Redis", ledger: Ledger | None = None) -> Delivery:
        queue = JobQueue(client, self.prefix, lease_s=self.lease_s, blocking=client, owner_limits=self.settings.owner_limits)
        return Delivery(self.engine, queue, self.event_log(client), ledger or self.ledger, presign)

    def limits(self, *, client: "redis.Redis | None" = None, rates: RateLimiter | None = None, **changes: int) -> Limits:
        """Limits that nobody meets but those that a test sets."""
        plan = PlanLimits(**({"submits_per_minute": 0, "open_jobs": 500, "queued_millicredits": 10**9, "watches": 500} | changes))
        leases = WatchLeases(client or self.client, self.prefix, lease_s=self.lease_s)
        return Limits(dict.fromkeys(Priority, plan), rates or self.rates, leases)

    def jobs(self, *, client: "redis.Redis | None" = None, ledger: Ledger | None = None, limits: Limits | None = None) -> Jobs:
        client, ledger = client or self.client, ledger or self.ledger
        return Jobs(
            self.engine,
            self.event_log(client),
            ledger,
            self.delivery_over(client, ledger),
            presign,
            Quotes(b"s" * 32),
            quote_ttl_s=60,
            hold_ttl_s=HOLD_TTL_S,
            owner_limits=self.settings.owner_limits,
            limits=limits or self.limits(),
        )

    def dead_letters(self, *, ledger: Ledger | None = None, limits: Limits | None = None) -> DeadLetters:
        ledger = ledger or self.ledger
        return DeadLetters(self.engine, ledger, self.delivery_over(self.client, ledger), limits or self.limits())

    def relay(self, *, lease_s: float | None = None) -> Relay:
        return Relay(
            engine=self.engine,
            queue=self.worker_queue("", lease_s=lease_s),
            log=self.log,
            ledger=self.ledger,
            delivery=self.delivery,
            deletions=Deletions(self.engine, self.media, self.log, self.delivery),
            lease_s=lease_s or self.lease_s,
            max_attempts=self.settings.max_attempts,
            job_retention_s=0,
            orphan_media_s=24 * 3600,
        )

    async def offer(self) -> None:
        """A worker offers the model."""
        async with transaction(self.engine) as connection:
            await store.offer_models(connection, [(MODEL.model_id, MODEL.SerializeToString())])
            await store.offer_worker(connection, "worker-1", pools=[POOL], slot_count=1, loaded_models=[MODEL.model_id])

    async def submit(self, **changes: Any) -> Job:
        """A pending job, held for, committed, not announced."""
        job = new_job(self.owner, **changes)
        await self.ledger.reserve(job)
        async with transaction(self.engine) as connection:
            return await submit(connection, job)

    async def job(self, job_id: uuid.UUID | str) -> Job:
        async with transaction(self.engine) as connection:
            job = await store.get_job(connection, uuid.UUID(str(job_id)))
        assert job is not None
        return job

    async def reaches(self, job_id: uuid.UUID | str, state: State) -> Job:
        """The job, once it is in that state."""

        async def there() -> bool:
            return (await self.job(job_id)).state is state

        await eventually(there)
        return await self.job(job_id)

    async def count(self, table: sa.Table) -> int:
        async with transaction(self.engine) as connection:
            return (await connection.execute(sa.select(sa.func.count()).select_from(table))).scalar_one()

    async def events(self, job_id: uuid.UUID | str) -> list[StoredEvent]:
        """Every event of a job that Redis has."""
        found: list[StoredEvent] = []
        for shard in await self.log.ends():
            found += await self.log.range(shard, Position(0, 0), Position(2**63, 0), 10_000)
        return [event for event in found if event.job_id == str(job_id)]


def request(**changes: Any) -> jobs_pb2.CreateJobRequest:
    """A request that was never made."""
    fields: dict[str, Any] = {"request_id": str(uuid.uuid4()), "spec": SPEC} | changes
    return jobs_pb2.CreateJobRequest(**fields)


async def refused(call: Awaitable[object]) -> MeshError:
    """The refusal of a call."""
    with pytest.raises(MeshError) as raised:
        await call
    return raised.value
