"""The dispatcher with a scripted inference_service, and the relay behind it: how attempts end, and who cleans up."""

import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import sqlalchemy as sa

from genmesh.jobs.v1 import jobs_pb2
from jobs_service import dispatch, lifecycle, relay, store
from jobs_service.dispatch import Dispatcher
from jobs_service.lifecycle import Job, State
from jobs_service.queue import Entry
from jobs_service.store import Duty
from jobs_service.tables import jobs, outbox
from servicekit.database import transaction
from servicekit.errors import MeshError, Reason, ReasonValue
from tests.service.jobs.world import POOL, Generation, ScriptedInference, World, eventually, presign, running, within

Inference = tuple[ScriptedInference, grpc.aio.Channel]
Balance = Callable[[uuid.UUID], Awaitable[tuple[int, int]]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TROUBLE_PAUSE_S", 0.02)
    monkeypatch.setattr(lifecycle, "BACKOFFS", {reason: lifecycle.Backoff(0.02, 0.02) for reason in lifecycle.BACKOFFS})
    for name in ("OUTBOX_INTERVAL_S", "SWEEP_INTERVAL_S", "POSITIONS_INTERVAL_S"):
        monkeypatch.setattr(relay, name, 0.02)


@asynccontextmanager
async def dispatching(world: World, inference: Inference, *, worker_id: str = "worker-1", slots: int = 1) -> AsyncGenerator[Dispatcher]:
    dispatcher = Dispatcher(
        world.settings.model_copy(update={"worker_id": worker_id, "dispatch_slots": slots}),
        engine=world.engine,
        blocking=world.client,
        queue=world.worker_queue(worker_id),
        log=world.log,
        delivery=world.delivery,
        presign=presign,
        inference=inference[1],
    )
    async with running(dispatcher.run(), dispatcher.offer(), dispatcher.listen_for_cancels()):
        yield dispatcher


async def queued(world: World, **changes: Any) -> Job:
    job = await world.submit(**changes)
    async with transaction(world.engine) as connection:
        await store.delete_duties(connection, [row.outbox_id for row in await store.due_duties(connection, limit=99, again_after_s=9)])
    await world.delivery.announce(job)
    return job


async def generation(inference: Inference) -> Generation:
    return await within(inference[0].calls.get())


async def settled(world: World, balance: Balance, available: int) -> None:
    async def there() -> bool:
        return await balance(world.owner) == (available, 0)

    await eventually(there)


def refusal(code: grpc.StatusCode, reason: ReasonValue) -> MeshError:
    return MeshError(code, reason, "scripted")


async def test_a_job_runs_to_its_end(world: World, inference: Inference, balance: Balance):
    job = await queued(world)
    async with dispatching(world, inference):
        call = await generation(inference)
        assert (call.request.job_id, call.request.attempt) == (str(job.job_id), 1)
        assert call.request.output_prefix == f"{world.owner}/{job.job_id}/"
        call.step(10)
        call.asset()
        call.complete()
        done = await world.reaches(job.job_id, State.COMPLETED)
        await settled(world, balance, 900)
    assert (done.cost, done.attempt, done.worker_id, len(done.assets)) == (100, 1, "worker-1", 1)
    events = [jobs_pb2.JobEvent.FromString(event.event) for event in await world.events(job.job_id)]
    assert [event.WhichOneof("payload") for event in events] == ["state_change", "state_change", "progress", "asset", "state_change"]
    assert await world.count(outbox) == 0


async def test_a_running_job_is_cancelled_within_a_step_and_costs_its_steps(world: World, inference: Inference, balance: Balance):
    job = await queued(world)
    async with dispatching(world, inference):
        call = await generation(inference)
        call.step(3)

        async def seen() -> bool:
            progress = await world.log.progress([job.job_id])
            return bool(progress) and progress[job.job_id].step == 3

        await eventually(seen)
        await world.jobs().cancel(world.owner, job.job_id)
        await within(call.stopped.wait())
        done = await world.reaches(job.job_id, State.CANCELLED)
        await settled(world, balance, 970)
    assert (done.cost, done.steps_done, done.assets) == (30, 3, ())


async def test_a_job_its_model_cannot_do_fails_and_costs_nothing(world: World, inference: Inference, balance: Balance):
    job = await queued(world)
    async with dispatching(world, inference):
        (await generation(inference)).fail(refusal(grpc.StatusCode.ABORTED, Reason.ERROR_REASON_MODEL_FAILED))
        done = await world.reaches(job.job_id, State.FAILED)
        await settled(world, balance, 1000)
    assert (done.cost, done.attempt) == (0, 1)
    assert done.error is not None
    assert b"ERROR_REASON_MODEL_FAILED" in done.error


@pytest.mark.parametrize("reason", [Reason.ERROR_REASON_STORE_FAILED, Reason.ERROR_REASON_UNAVAILABLE])
async def test_trouble_is_tried_again_up_to_the_limit(world: World, inference: Inference, balance: Balance, reason: ReasonValue):
    job = await queued(world)
    async with dispatching(world, inference), running(world.relay().outbox()):
        for attempt in (1, 2):
            call = await generation(inference)
            assert call.request.attempt == attempt
            call.fail(refusal(grpc.StatusCode.UNAVAILABLE, reason))
        done = await world.reaches(job.job_id, State.FAILED)
        await settled(world, balance, 1000)
    assert (done.attempt, done.cost) == (2, 0)


async def test_two_entries_of_one_job_in_two_slots_are_one_run(world: World, inference: Inference, balance: Balance):
    job = await queued(world)
    async with dispatching(world, inference, slots=2):
        call = await generation(inference)
        await world.queue.put(job)
        await eventually(lambda: _length(world, job, 1))  # the second slot found nothing to start
        await world.jobs().cancel(world.owner, job.job_id)
        await within(call.stopped.wait())
        await world.reaches(job.job_id, State.CANCELLED)
        await eventually(lambda: _length(world, job, 0))
    assert inference[0].calls.empty()


async def _length(world: World, job: Job, expected: int) -> bool:
    return await world.client.xlen(f"{{{world.prefix}:queue:{POOL}}}:{int(job.priority)}") == expected


async def test_a_worker_that_lost_its_lease_changes_nothing(world: World, inference: Inference, balance: Balance):
    job = await queued(world)
    thief = world.worker_queue("thief")
    async with dispatching(world, inference):
        call = await generation(inference)
        running_job = await world.job(job.job_id)
        stream, _, entry_id = running_job.queue_entry.rpartition("/")
        await world.client.xclaim(stream, "dispatch", "thief", 0, [entry_id])
        async with transaction(world.engine) as connection:
            taken = await store.start_attempt(connection, job.job_id, worker_id="thief", entry=running_job.queue_entry, takeover=True)
        assert taken is not None
        await within(call.stopped.wait())
        assert await thief.holder(stream, entry_id) == "thief"
        call.complete()
    stored = await world.job(job.job_id)
    assert (stored.state, stored.attempt, stored.worker_id) == (State.PROCESSING, 2, "thief")
    assert await balance(world.owner) == (900, 100)


async def test_a_worker_that_stops_hands_its_job_back_to_another(world: World, inference: Inference, balance: Balance):
    job = await queued(world)
    async with dispatching(world, inference):
        call = await generation(inference)
    await within(call.stopped.wait())
    assert (await world.job(job.job_id)).state is State.PENDING
    async with dispatching(world, inference, worker_id="worker-2"), running(world.relay().outbox()):
        second = await generation(inference)
        assert second.request.attempt == 2
        second.complete()
        await world.reaches(job.job_id, State.COMPLETED)
        await settled(world, balance, 900)


async def test_redis_emptied_under_a_job_neither_repeats_nor_loses_it(world: World, inference: Inference, balance: Balance):
    job = await queued(world)
    waiting = await queued(world)
    tending = world.relay()
    async with dispatching(world, inference), running(tending.outbox(), tending.sweep()):
        call = await generation(inference)
        await world.client.flushdb()
        call.step(5)
        call.complete()
        await world.reaches(job.job_id, State.COMPLETED)
        second = await generation(inference)  # the queue came back
        assert second.request.job_id == str(waiting.job_id)
        second.complete()
        await world.reaches(waiting.job_id, State.COMPLETED)
        await settled(world, balance, 800)
    assert (await world.job(job.job_id)).attempt == 1


async def test_a_live_workers_job_outlasts_redis_by_leases(world: World, inference: Inference):
    job = await queued(world)
    tending = world.relay()
    async with dispatching(world, inference), running(tending.sweep()):
        call = await generation(inference)
        await world.client.flushdb()
        await eventually(lambda: world.queue.settled(POOL))
        assert (await world.job(job.job_id)).attempt == 1
        call.complete()
        done = await world.reaches(job.job_id, State.COMPLETED)
    assert done.attempt == 1


async def test_a_job_whose_worker_and_entry_are_both_gone_starts_again(world: World, inference: Inference):
    job = await world.submit()
    async with transaction(world.engine) as connection:
        stray = f"{{{world.prefix}:queue:{POOL}}}:1/1-0"
        assert await store.start_attempt(connection, job.job_id, worker_id="dead", entry=stray, takeover=False) is not None
    tending = world.relay()
    async with dispatching(world, inference), running(tending.outbox(), tending.sweep()):
        call = await generation(inference)
        assert (call.request.job_id, call.request.attempt) == (str(job.job_id), 2)
        call.complete()
        await world.reaches(job.job_id, State.COMPLETED)


async def test_a_late_job_is_cancelled_free_of_charge(world: World, balance: Balance):
    job = await world.submit(start_deadline=datetime.now(UTC) - timedelta(seconds=1))
    async with running(world.relay().sweep()):
        done = await world.reaches(job.job_id, State.CANCELLED)
        await settled(world, balance, 1000)
    assert (done.cost, done.attempt) == (0, 0)


async def test_a_rebuild_that_failed_is_made_up_for(world: World, monkeypatch: pytest.MonkeyPatch):
    job = await queued(world)
    await world.client.flushdb()
    pending = store.pending_jobs
    failures = [OSError("the database is away")]

    async def flaky(*args: Any, **kwargs: Any) -> list[Job]:
        if failures:
            raise failures.pop()
        return await pending(*args, **kwargs)

    monkeypatch.setattr(store, "pending_jobs", flaky)
    async with running(world.relay().sweep()):
        entries: list[Entry] = []
        while not entries:
            entries = await within(world.worker_queue("w").take([POOL]))
    assert [entry.job_id for entry in entries] == [job.job_id]
    assert not failures


async def test_a_pending_job_that_the_queue_does_not_know_is_found(world: World, inference: Inference, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(relay, "MISSING_AFTER_S", 0.0)
    job = await world.submit()
    async with transaction(world.engine) as connection:  # as if somebody had done its duty, and Redis lost it alone
        await store.delete_duties(connection, await store.duties_of(connection, job.job_id, Duty.ANNOUNCE))
    await world.queue.rebuilt(POOL)
    async with dispatching(world, inference), running(world.relay().sweep()):
        (await generation(inference)).complete()
        await world.reaches(job.job_id, State.COMPLETED)


async def test_a_worker_that_is_told_to_stop_costs_its_job_no_attempt(world: World, inference: Inference):
    job = await queued(world)
    for start in range(1, 4):  # more often than attempts may fail
        async with dispatching(world, inference):
            call = await generation(inference)
            assert call.request.attempt == start
        await within(call.stopped.wait())
    back = await world.job(job.job_id)
    assert (back.state, back.attempt, back.failures) == (State.PENDING, 3, 0)


async def test_a_failed_attempt_of_a_job_nobody_wants_any_more_is_its_last(world: World, inference: Inference, balance: Balance):
    job = await queued(world)
    async with dispatching(world, inference):
        call = await generation(inference)
        call.step(4)
        async with transaction(world.engine) as connection:  # a wish that nobody told the worker of
            assert await store.request_cancel(connection, job.job_id, world.owner) is not None
        call.fail(refusal(grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_UNAVAILABLE))
        done = await world.reaches(job.job_id, State.CANCELLED)
        await settled(world, balance, 960)
    assert (done.attempt, done.steps_done, done.cost) == (1, 4, 40)


async def test_a_job_that_silences_its_workers_fails_without_another_start(world: World, inference: Inference, balance: Balance):
    job = await queued(world)
    poisoned = world.worker_queue("worker-0")
    entries = await within(poisoned.take([POOL]))
    async with transaction(world.engine) as connection:
        assert await store.start_attempt(connection, job.job_id, worker_id="worker-0", entry=entries[0].name, takeover=False) is not None
        await connection.execute(sa.update(jobs).values(failures=world.settings.max_attempts - 1))
    neighbour = await queued(world)
    async with dispatching(world, inference):
        call = await generation(inference)
        assert call.request.job_id == str(neighbour.job_id)
        call.complete()
        done = await world.reaches(job.job_id, State.FAILED)
        await settled(world, balance, 900)
    assert (done.attempt, done.worker_id, done.failure_reason) == (1, "worker-0", "ERROR_REASON_WORKER_LOST")
    assert done.fingerprint == lifecycle.failure(lifecycle.worker_lost(), "small").fingerprint


async def test_a_stray_job_without_an_attempt_left_fails_for_the_same_cause(world: World, balance: Balance):
    job = await world.submit()
    async with transaction(world.engine) as connection:
        stray = f"{{{world.prefix}:queue:{POOL}}}:1/1-0"
        assert await store.start_attempt(connection, job.job_id, worker_id="dead", entry=stray, takeover=False) is not None
        await connection.execute(sa.update(jobs).values(failures=world.settings.max_attempts - 1))
    async with running(world.relay().sweep()):
        done = await world.reaches(job.job_id, State.FAILED)
        await settled(world, balance, 1000)
    assert (done.attempt, done.cost) == (1, 0)
    assert done.fingerprint == lifecycle.failure(lifecycle.worker_lost(), "small").fingerprint


async def test_an_owner_runs_no_more_jobs_at_once_than_allowed(world: World, inference: Inference):
    world.settings = world.settings.model_copy(update={"owner_concurrency_free": 2})
    world.queue = world.worker_queue("")
    world.delivery = world.delivery_over(world.client)
    submitted = [await queued(world) for _ in range(3)]
    async with dispatching(world, inference, slots=3):
        calls = [await generation(inference), await generation(inference)]
        assert [call.request.job_id for call in calls] == [str(job.job_id) for job in submitted[:2]]
        waiting = await world.jobs().get(world.owner, submitted[2].job_id)
        assert waiting.waiting.reason == jobs_pb2.Waiting.REASON_OWNER_LIMIT
        assert (waiting.waiting.owner_running, waiting.waiting.owner_limit) == (2, 2)
        assert inference[0].calls.empty()
        calls[0].complete()
        third = await generation(inference)
        assert third.request.job_id == str(submitted[2].job_id)
        for call in (calls[1], third):
            call.complete()
        for job in submitted:
            await world.reaches(job.job_id, State.COMPLETED)


async def test_waiting_jobs_hear_of_their_place(world: World):
    jobs = [await queued(world) for _ in range(3)]

    async def told() -> bool:
        updates = [jobs_pb2.JobEvent.FromString(event.event) for job in jobs for event in await world.events(job.job_id)]
        return [event.queue_update.queue_position for event in updates if event.HasField("queue_update")] == [1, 2, 3]

    async with running(world.relay().positions()):
        await eventually(told)
