"""The dispatcher: takes jobs that its inference replica can run, drives them, writes how they end.

One stands beside each replica. A slot is free before a job is taken; the queue entry is renewed while the job runs; every
write is guarded by the attempt, so that a dispatcher that was thought dead changes nothing when it comes back.
"""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import Counter, Histogram
from redis import asyncio as redis
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from genmesh.inference.v1 import inference_pb2, inference_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2
from jobs_service import store
from jobs_service.delivery import FALLBACK_S, Delivery
from jobs_service.events import EventLog
from jobs_service.lifecycle import Job, State, failure, retry_delay_s, worker_lost
from jobs_service.messages import Presign, new_event, presigned
from jobs_service.queue import Entry, Hold, JobQueue
from jobs_service.settings import DispatchSettings
from servicekit.client import call_metadata
from servicekit.database import reading, transaction
from servicekit.errors import MeshError, Reason, from_rpc_error
from servicekit.process import end

OFFER_INTERVAL_S = 5.0
PROGRESS_RATE = 100.0
PROGRESS_BURST = 50.0
"""Events of steps a second that a job publishes in the long run, and at once; steps beyond that are told with the next one."""
TROUBLE_PAUSE_S = 0.5
FINISH_TRIES = 10
"""Tries to write how a job ended. If the first one was committed and its reply lost, the second finds itself fenced: the
duties are in the outbox, and the relay does them."""
ATTEMPTS = Counter("genmesh_attempts_total", "Attempts ended, by how", ["outcome"])
WAIT_SECONDS = Histogram(
    "genmesh_job_wait_seconds", "Time from submission to the first attempt", buckets=(0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 1800, 7200)
)

ESTIMATE_RATIO = Histogram(
    "genmesh_estimate_ratio",
    "Time from submission to completion over what was estimated at submission; 1 is a perfect estimate",
    buckets=(0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2, 4, 10),
)

_log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class Running:
    """A queue entry in a slot. Two slots may have entries of one job: one of them starts nothing."""

    job_id: uuid.UUID
    cancel: asyncio.Event = field(default_factory=asyncio.Event)
    """The owner wants it stopped."""
    lost: asyncio.Event = field(default_factory=asyncio.Event)
    """The lease is gone: somebody else has the job now."""
    announced: bool = False
    """Whether the start was published: progress of a start that nobody heard of is taken for stale."""


@dataclass(slots=True)
class Output:
    """What an attempt has made so far."""

    steps_done: int = 0
    assets: list[bytes] = field(default_factory=list)
    done: bool = False


class Dispatcher:
    """Runs jobs on one inference replica."""

    def __init__(
        self,
        settings: DispatchSettings,
        *,
        engine: AsyncEngine,
        blocking: "redis.Redis",
        queue: JobQueue,
        log: EventLog,
        delivery: Delivery,
        presign: Presign,
        inference: grpc.aio.Channel,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._blocking = blocking
        self._queue = queue
        self._log = log
        self._delivery = delivery
        self._presign = presign
        self._inference: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(inference)  # pyright: ignore[reportAttributeAccessIssue]
        self._catalog: inference_pb2_grpc.ModelCatalogServiceAsyncStub = inference_pb2_grpc.ModelCatalogServiceStub(inference)  # pyright: ignore[reportAttributeAccessIssue]
        self._health: Any = health_pb2_grpc.HealthStub(inference)
        self._running: set[Running] = set()
        self._pools: tuple[str, ...] = ()
        self._warm: frozenset[str] = frozenset()
        """Models that the replica has in memory: their jobs come first."""
        self._stopping = asyncio.Event()

    # --- tasks of the process ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take jobs as slots become free, run them, again. Trouble with a store is a pause, and no reason to die; a slot that dies
        of anything else takes the process with it."""
        slots: set[asyncio.Task[None]] = set()
        stopping = asyncio.create_task(self._stopping.wait())
        taking: asyncio.Task[list[Entry]] | None = None
        try:
            while not stopping.done():
                if len(slots) >= self._settings.dispatch_slots:
                    await asyncio.wait({stopping, *slots}, return_when=asyncio.FIRST_COMPLETED)
                for slot in [slot for slot in slots if slot.done()]:
                    slots.remove(slot)
                    slot.result()
                # A slot first, then a job: what is taken runs at once.
                taking = asyncio.create_task(self._take(self._settings.dispatch_slots - len(slots)))
                await asyncio.wait({stopping, taking}, return_when=asyncio.FIRST_COMPLETED)
                if not taking.done():
                    await end({taking})  # what it is about to get goes back to the queue
                if not taking.cancelled():
                    slots |= {asyncio.create_task(self._slot(entry), name=f"slot {entry.job_id}") for entry in taking.result()}
            while slots:
                ended, slots = await asyncio.wait(slots)
                for slot in ended:
                    slot.result()
        finally:
            await end({task for task in (stopping, taking, *slots) if task is not None})

    async def _take(self, count: int) -> list[Entry]:
        try:
            if count > 0 and await self._ready():
                return await self._queue.take(self._pools, count=count, warm=self._warm)
        except (RedisError, OSError) as error:
            _log.warning("dispatch.trouble", error=repr(error)[:300])
        await asyncio.sleep(TROUBLE_PAUSE_S)
        return []

    async def _slot(self, entry: Entry) -> None:
        try:
            await self._handle(entry)
        except (RedisError, SQLAlchemyError, OSError, MeshError) as error:  # the entry is claimed again after a lease
            _log.warning("dispatch.trouble", job_id=str(entry.job_id), error=repr(error)[:300])
            await asyncio.sleep(TROUBLE_PAUSE_S)

    async def offer(self) -> None:
        """Tell the store every few seconds that this worker is there and which models it offers."""
        while not self._stopping.is_set():
            try:
                listed = await self._catalog.ListModels(inference_pb2.ListModelsRequest(), timeout=self._settings.rpc_timeout_s)
                pools = tuple(sorted({model.pool for model in listed.models}))
                loaded = frozenset(model.model_id for model in listed.models if model.loaded)
                async with transaction(self._engine) as connection:
                    await store.offer_models(connection, [(model.model_id, model.SerializeToString()) for model in listed.models])
                    await store.offer_worker(
                        connection,
                        self._settings.worker_id,
                        pools=pools,
                        slot_count=self._settings.dispatch_slots,
                        loaded_models=sorted(loaded),
                    )
                self._pools, self._warm = pools, loaded
            except (grpc.aio.AioRpcError, SQLAlchemyError, OSError) as error:
                _log.warning("dispatch.offer_failed", error=repr(error)[:300])
                await asyncio.sleep(TROUBLE_PAUSE_S)
                continue
            await asyncio.sleep(OFFER_INTERVAL_S)
        await asyncio.Event().wait()

    async def withdraw(self) -> None:
        """Tell the store that this worker stops: what waits need not reckon with it."""
        try:
            async with transaction(self._engine) as connection:
                await store.withdraw_worker(connection, self._settings.worker_id)
        except (SQLAlchemyError, OSError) as error:  # its silence tells the same a little later
            _log.warning("dispatch.not_withdrawn", error=repr(error)[:300])

    async def listen_for_cancels(self) -> None:
        """Hear at once when an owner cancels a job that runs here."""
        while True:
            try:
                await self._blocking.initialize()  # a cluster client knows no node before, and pubsub() does not ask
                async with self._blocking.pubsub() as pubsub:
                    await pubsub.subscribe(self._log.keys.cancel)
                    while True:
                        message: Any = await pubsub.get_message(ignore_subscribe_messages=True, timeout=2.0)
                        if message is not None:
                            job_id = uuid.UUID(message["data"].decode())
                            for running in self._running:
                                if running.job_id == job_id:
                                    running.cancel.set()
            except (RedisError, OSError) as error:
                _log.warning("dispatch.cancels_unheard", error=repr(error))
                await asyncio.sleep(TROUBLE_PAUSE_S)

    def drain(self) -> None:
        """Take no more jobs; `run` returns when the running ones have ended."""
        self._stopping.set()

    async def _ready(self) -> bool:
        if not self._pools:
            return False
        try:
            answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=self._settings.rpc_timeout_s)
        except grpc.aio.AioRpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    # --- one job ----------------------------------------------------------------------------------------------------

    async def _handle(self, entry: Entry) -> None:
        # Registered before the attempt starts: a cancel that comes with the start must find the job here.
        running = Running(entry.job_id)
        self._running.add(running)
        try:
            if entry.taken_over and await self._give_up(entry):
                return
            async with transaction(self._engine) as connection:
                job = await store.start_attempt(
                    connection, entry.job_id, worker_id=self._settings.worker_id, entry=entry.name, takeover=entry.taken_over
                )
            if job is not None:
                with structlog.contextvars.bound_contextvars(job_id=str(job.job_id), attempt=job.attempt):
                    outcome = await self._attempt(job, entry, running)
                if outcome in ("lost", "fenced"):
                    return  # the entry may be all that leads to the job: whoever has or claims it removes it
                if outcome == "retried":
                    return  # its entry is gone already
            await self._queue.done(entry)
        finally:
            self._running.discard(running)

    async def _give_up(self, entry: Entry) -> bool:
        """Whether the job of a silent worker has no attempt left; it has failed then: it may well be what silenced them."""
        async with reading(self._engine) as connection:
            job = await store.get_job(connection, entry.job_id)
        if job is None or job.state is not State.PROCESSING or job.queue_entry != entry.name:
            return False
        if job.cancel_requested_time is not None or job.failures + 1 < self._settings.max_attempts:
            return False
        with structlog.contextvars.bound_contextvars(job_id=str(job.job_id), attempt=job.attempt):
            outcome = await self._finish(job, State.FAILED, Output(), worker_lost())
            ATTEMPTS.labels("gave_up").inc()
            _log.warning("job.gave_up", worker_id=job.worker_id, outcome=outcome)
        if outcome != "fenced":
            await self._queue.done(entry)
        return True

    async def _attempt(self, job: Job, entry: Entry, running: Running) -> str:
        _log.info("attempt.started", taken_over=entry.taken_over)
        if job.attempt == 1 and job.start_time and job.create_time:
            WAIT_SECONDS.observe((job.start_time - job.create_time).total_seconds())
        running.announced = await self._publish_state(job)
        output = Output()
        async with self._lease(entry, running):
            if job.cancel_requested_time is not None:
                outcome = await self._finish(job, State.CANCELLED, output)
            else:
                outcome = await self._run(job, entry, running, output)
        ATTEMPTS.labels(outcome).inc()
        _log.info("attempt.ended", outcome=outcome, steps_done=output.steps_done)
        return outcome

    async def _run(self, job: Job, entry: Entry, running: Running, output: Output) -> str:
        generation = asyncio.create_task(self._generate(job, running, output))
        stops = [asyncio.create_task(event.wait()) for event in (running.cancel, running.lost)]
        try:
            await asyncio.wait([generation, *stops], return_when=asyncio.FIRST_COMPLETED)
            # Not `await generation`: a cancellation of this slot could not be told from that of the generation.
            await end({generation})
        except asyncio.CancelledError:
            # The process is told to stop: the job goes back to the queue, for another worker to start over.
            generation.cancel()
            handing_back = asyncio.create_task(self._hand_back(job, entry, output))
            while not handing_back.done():  # whoever stops us asks again every second
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([handing_back])
            raise
        finally:
            for stop in stops:
                stop.cancel()
        refusal = None if generation.cancelled() else generation.exception()
        if running.lost.is_set():
            return "lost"
        if output.done:
            return await self._finish(job, State.COMPLETED, output)
        if running.cancel.is_set():
            return await self._finish(job, State.CANCELLED, output)
        if isinstance(refusal, MeshError):
            return await self._failed(job, entry, output, refusal)
        generation.result()
        raise RuntimeError("a generation ends done, refused or cancelled")

    async def _generate(self, job: Job, running: Running, output: Output) -> None:
        """Drive Generate to its end; raises MeshError for what went wrong."""
        request = inference_pb2.GenerateRequest(
            job_id=str(job.job_id),
            attempt=job.attempt,
            spec=jobs_pb2.JobSpec.FromString(job.spec),
            output_prefix=job.media_prefix,
        )
        call = self._inference.Generate(request, metadata=call_metadata())
        try:
            allowance, refilled = PROGRESS_BURST, time.monotonic()
            async for response in call:
                kind = response.WhichOneof("message")
                event = new_event(job.job_id, job.attempt)
                if response.HasField("event_time"):
                    event.event_time.CopyFrom(response.event_time)
                if kind == "progress":
                    progress = response.progress
                    output.steps_done = max(output.steps_done, progress.step)
                    last = progress.step == progress.step_count
                    now = time.monotonic()
                    allowance, refilled = min(PROGRESS_BURST, allowance + PROGRESS_RATE * (now - refilled)), now
                    if not last and allowance < 1:
                        continue
                    allowance -= 1
                    event.progress.CopyFrom(progress)
                elif kind == "preview":
                    event.preview.CopyFrom(response.preview)
                elif kind == "asset":
                    output.assets.append(response.asset.SerializeToString())
                    event.asset.CopyFrom(presigned(response.asset, self._presign))
                elif kind == "loading":
                    event.progress.stage = jobs_pb2.STAGE_LOADING
                elif kind == "queued":
                    event.progress.stage = jobs_pb2.STAGE_QUEUED
                else:
                    output.steps_done = response.done.steps_done
                    output.done = True
                    continue
                await self._publish(job, running, event)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()
        if not output.done:
            raise MeshError(grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_WORKER_LOST, "the model stopped before it was done")

    # --- how it ends ------------------------------------------------------------------------------------------------

    async def _finish(self, job: Job, state: State, output: Output, refusal: MeshError | None = None) -> str:
        reason = None if refusal is None else failure(refusal, job.model)
        assets = output.assets if state is State.COMPLETED else ()
        tries_left = FINISH_TRIES
        while True:
            try:
                async with transaction(self._engine) as connection:
                    ended = await store.finish(
                        connection, job, state, fallback_s=FALLBACK_S, steps_done=output.steps_done, assets=assets, failure=reason
                    )
                break
            except (SQLAlchemyError, OSError) as trouble:  # the work is done: worth some patience before it is done again
                tries_left -= 1
                _log.warning("finish.failed", error=repr(trouble)[:300], tries_left=tries_left)
                if not tries_left:
                    raise
                await asyncio.sleep(TROUBLE_PAUSE_S)
        if ended is None:
            return "fenced"
        if state is State.COMPLETED and ended[0].create_time and ended[0].finish_time and job.estimate_s and not job.retry_count:
            ESTIMATE_RATIO.observe((ended[0].finish_time - ended[0].create_time).total_seconds() / job.estimate_s)
        await self._delivery.now(*ended)
        return state.name.lower()

    async def _failed(self, job: Job, entry: Entry, output: Output, refusal: MeshError) -> str:
        _log.warning("attempt.failed", reason=Reason.Name(refusal.reason), error=refusal.message)
        delay_s = retry_delay_s(refusal.reason, job.failures + 1, max_attempts=self._settings.max_attempts, jitter=random.random())  # noqa: S311
        if delay_s is None:
            return await self._finish(job, State.FAILED, output, refusal)
        return await self._put_back(job, entry, output, delay_s=delay_s, failed=True)

    async def _hand_back(self, job: Job, entry: Entry, output: Output) -> None:
        try:
            await self._put_back(job, entry, output, delay_s=0.0, failed=False)
        except (RedisError, SQLAlchemyError, OSError) as error:  # others claim the entry when the lease is over
            _log.warning("hand_back.failed", job_id=str(job.job_id), error=repr(error)[:300])

    async def _put_back(self, job: Job, entry: Entry, output: Output, *, delay_s: float, failed: bool) -> str:
        async with transaction(self._engine) as connection:
            if await store.cancel_requested(connection, [job.job_id]):  # nobody wants another attempt
                moved = await store.finish(connection, job, State.CANCELLED, fallback_s=FALLBACK_S, steps_done=output.steps_done)
            else:
                moved = await store.requeue(connection, job, delay_s=delay_s, failed=failed, fallback_s=FALLBACK_S)
        if moved is None:
            return "fenced"
        # This entry first: it counts as a running job of its owner, who may have no room for another one beside it.
        await self._queue.done(entry)
        await self._delivery.now(*moved)
        return "retried"

    async def _publish_state(self, job: Job) -> bool:
        try:
            await self._delivery.publish(job)
        except (RedisError, OSError) as error:  # tried again with the next event; the state itself is in PostgreSQL
            _log.warning("publish.failed", error=repr(error))
            return False
        return True

    async def _publish(self, job: Job, running: Running, event: jobs_pb2.JobEvent) -> None:
        if not running.announced:
            running.announced = await self._publish_state(job)
        try:
            await self._log.publish(event, owner_id=job.owner_id, version=job.version)
        except (RedisError, OSError) as error:  # progress is a comfort: the job goes on without
            _log.warning("publish.failed", error=repr(error))

    @asynccontextmanager
    async def _lease(self, entry: Entry, running: Running) -> AsyncGenerator[None]:
        """Renew the queue entry while the block runs, and look for a cancel that was not heard."""

        async def renew() -> None:
            while True:
                try:
                    hold = await self._queue.renew(entry)
                    if hold is Hold.TAKEN:
                        _log.warning("lease.lost")
                        running.lost.set()
                        return
                    # GONE: Redis was emptied, but the job is still ours: PostgreSQL knows, and fences whoever else starts it.
                    async with transaction(self._engine) as connection:
                        if await store.cancel_requested(connection, [running.job_id]):
                            running.cancel.set()
                except (RedisError, SQLAlchemyError, OSError, MeshError) as error:
                    _log.warning("lease.renew_failed", error=repr(error))
                await asyncio.sleep(self._settings.lease_seconds / 3)

        task = asyncio.create_task(renew())
        try:
            yield
        finally:
            await end({task})  # `await task` would swallow a cancellation of this slot
