"""Watches over a real Redis: fan-out, replay, lag, loss, endings."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
from google.rpc import status_pb2

from genmesh.jobs.v1 import jobs_pb2
from jobs_service import store, tables, watch
from jobs_service.events import Token
from jobs_service.lifecycle import Failure, Job, State
from jobs_service.watch import SERIALISED, Hub, WatchRequest, WatchStream
from servicekit.database import transaction
from servicekit.errors import MeshError, Reason
from servicekit.identity import Principal
from tests.service.jobs.world import World, eventually, running, within


@pytest_asyncio.fixture
async def hub(world: World) -> AsyncIterator[Hub]:
    """A hub that reads."""
    hub = Hub(world.log)
    async with running(hub.run()):
        await within(hub.reading.wait())
        yield hub


def serialised() -> float:
    return next(sample.value for sample in next(iter(SERIALISED.collect())).samples if sample.name.endswith("_total"))


class Client:
    """One open watch, read message by message."""

    def __init__(self, stream: "AsyncIterator[bytes]") -> None:
        self._stream = stream

    async def next(self) -> jobs_pb2.WatchJobsResponse:
        return jobs_pb2.WatchJobsResponse.FromString(await within(anext(self._stream)))

    async def event(self) -> jobs_pb2.JobEvent:
        """The next event; snapshots and checkpoints are passed over."""
        while True:
            message = await self.next()
            if message.HasField("event"):
                return message.event

    async def rest(self) -> list[jobs_pb2.WatchJobsResponse]:
        """Everything up to the end."""

        async def read() -> list[jobs_pb2.WatchJobsResponse]:
            return [jobs_pb2.WatchJobsResponse.FromString(data) async for data in self._stream]

        return await within(read())


@asynccontextmanager
async def watching(
    world: World,
    hub: Hub,
    jobs: Sequence[Job] = (),
    *,
    token: str = "",
    expire_time: float | None = None,
    checkpoint_interval_s: float = 60,
    owner: uuid.UUID | None = None,
) -> AsyncGenerator[Client]:
    stream = WatchStream(hub, world.log, world.jobs().snapshots, checkpoint_interval_s=checkpoint_interval_s)
    request = WatchRequest(owner or world.owner, tuple(str(job.job_id) for job in jobs), token, Principal(expire_time=expire_time))
    messages = stream.run(request)
    try:
        yield Client(messages)
    finally:
        await messages.aclose()


async def progress(world: World, job: Job, *steps: int) -> None:
    for step in steps:
        event = jobs_pb2.JobEvent(job_id=str(job.job_id), attempt=job.attempt, progress=jobs_pb2.Progress(step=step))
        assert await world.log.publish(event, owner_id=job.owner_id, version=job.version)


async def start(world: World, **changes: Any) -> Job:
    """A job that runs, announced."""
    job = await world.submit(**changes)
    await world.delivery.publish(job)
    async with transaction(world.engine) as connection:
        started = await store.start_attempt(connection, job.job_id, worker_id="w", entry="s/1-0", takeover=False)
    assert started is not None
    await world.delivery.publish(started)
    return started


async def end(world: World, job: Job, state: State = State.COMPLETED) -> Job:
    failure = (
        Failure(status_pb2.Status(code=14).SerializeToString(), "ERROR_REASON_UNAVAILABLE", "0" * 16) if state is State.FAILED else None
    )
    async with transaction(world.engine) as connection:
        done = await store.finish(connection, job, state, failure=failure, fallback_s=60)
    assert done is not None
    await world.delivery.publish(done[0])
    return done[0]


async def run_again(world: World, job: Job) -> Job:
    """A failed job that was retried and runs, announced."""
    async with transaction(world.engine) as connection:
        await connection.execute(
            sa.update(tables.jobs)
            .where(tables.jobs.c.job_id == job.job_id)
            .values(
                state=State.PENDING, version=job.version + 1, cost=None, error=None, failure_reason=None, fingerprint=None, finish_time=None
            )
        )
    await world.delivery.publish(await world.job(job.job_id))
    async with transaction(world.engine) as connection:
        started = await store.start_attempt(connection, job.job_id, worker_id="w", entry="s/1-0", takeover=False)
    assert started is not None
    await world.delivery.publish(started)
    return started


async def test_a_watch_begins_with_snapshots_and_ends_with_its_last_job(world: World, hub: Hub):
    jobs = [await start(world), await start(world)]
    async with watching(world, hub, jobs) as client:
        snapshots = [(await client.next()).snapshot for _ in jobs]
        assert [(job.job_id, job.state) for job in snapshots] == [(str(job.job_id), jobs_pb2.STATE_PROCESSING) for job in jobs]
        await end(world, jobs[0])
        await progress(world, jobs[1], 1)
        await end(world, jobs[1], State.CANCELLED)
        events = [message.event for message in await client.rest()]
    assert [event.WhichOneof("payload") for event in events] == ["state_change", "progress", "state_change"]
    assert [events[0].state_change.state, events[2].state_change.state] == [jobs_pb2.STATE_COMPLETED, jobs_pb2.STATE_CANCELLED]


async def test_a_watch_of_ended_jobs_ends_after_their_snapshots(world: World, hub: Hub):
    job = await end(world, await start(world))
    async with watching(world, hub, [job]) as client:
        assert [message.snapshot.state for message in await client.rest()] == [jobs_pb2.STATE_COMPLETED]


async def test_a_watch_of_everything_hears_of_new_jobs_and_stays_open(world: World, hub: Hub):
    async with watching(world, hub) as client:
        assert (await client.next()).HasField("checkpoint")
        job = await start(world)
        await end(world, job)
        states = [(await client.event()).state_change.state for _ in range(3)]
        assert states == [jobs_pb2.STATE_PENDING, jobs_pb2.STATE_PROCESSING, jobs_pb2.STATE_COMPLETED]
        another = await start(world)
        assert (await client.event()).job_id == str(another.job_id)


async def test_anothers_job_does_not_exist(world: World, hub: Hub):
    job = await start(world)
    async with watching(world, hub, [job], owner=uuid.uuid4()) as client:
        with pytest.raises(MeshError) as raised:
            await client.next()
    assert raised.value.code is grpc.StatusCode.NOT_FOUND


async def test_an_event_is_serialised_once_for_all_its_watchers(world: World, hub: Hub):
    job = await start(world)
    clients: list[Client] = []
    async with asyncio.TaskGroup() as opened:  # all stay open until the last has read its end
        ready, done = asyncio.Semaphore(0), asyncio.Event()

        async def watch_it() -> None:
            async with watching(world, hub, [job]) as client:
                await client.next()
                clients.append(client)
                ready.release()
                await done.wait()

        for _ in range(40):
            opened.create_task(watch_it())
        for _ in range(40):
            await within(ready.acquire())
        # A watcher registers before its snapshot: every one of them is offered what comes now.
        before = serialised()
        await progress(world, job, *range(1, 11))
        await end(world, job)
        received = await asyncio.gather(*[client.rest() for client in clients])
        assert serialised() - before == 11
        done.set()
    assert all(messages == received[0] for messages in received)
    assert [message.event.progress.step for message in received[0][:-1]] == list(range(1, 11))


async def test_nothing_is_missed_or_repeated_over_reconnects_while_events_are_published(world: World, hub: Hub):
    job = await start(world)
    last = 400

    async def publish() -> None:
        for step in range(1, last):
            await progress(world, job, step)
        await end(world, job)

    seen: list[jobs_pb2.JobEvent] = []
    token = ""
    async with watching(world, hub, [job]) as client:
        token = (await client.next()).resume_token
    publishing = asyncio.create_task(publish())
    connections = 0
    while not (seen and seen[-1].HasField("state_change")):
        connections += 1
        async with watching(world, hub, [job], token=token) as client:
            for _ in range(23):
                message = await client.next()
                token = message.resume_token
                assert not message.HasField("snapshot")
                if message.HasField("event"):
                    seen.append(message.event)
                    if message.event.HasField("state_change"):
                        assert await client.rest() == []
                        break
    await publishing
    assert connections > 10
    assert [event.progress.step for event in seen[:-1]] == list(range(1, last))
    assert [event.sequence for event in seen] == list(range(seen[0].sequence, seen[0].sequence + last))


async def test_who_resumes_after_the_end_is_told_nothing_twice(world: World, hub: Hub):
    job = await start(world)
    async with watching(world, hub, [job]) as client:
        await client.next()
        await end(world, job)
        [final] = await client.rest()
    async with watching(world, hub, [job], token=final.resume_token) as client:
        assert [message.WhichOneof("message") for message in await client.rest()] == ["checkpoint"]


ROUNDS = ["FAILED", "PENDING", "PROCESSING", "COMPLETED"]


def told(events: Sequence[jobs_pb2.JobEvent]) -> list[str]:
    """States of the events, which are numbered without a hole."""
    assert [event.sequence for event in events] == list(range(events[0].sequence, events[0].sequence + len(events)))
    return [jobs_pb2.State.Name(event.state_change.state).removeprefix("STATE_") for event in events]


async def test_a_watch_of_a_job_ends_with_its_round_and_one_of_everything_hears_of_the_next(world: World, hub: Hub):
    job = await start(world)
    async with watching(world, hub, [job]) as one, watching(world, hub) as all_of_them:
        await one.next()
        await all_of_them.next()
        failed = await end(world, job, State.FAILED)
        assert told([message.event for message in await one.rest()]) == ["FAILED"]
        await end(world, await run_again(world, failed))
        assert told([await all_of_them.event() for _ in ROUNDS]) == ROUNDS


async def test_who_resumes_before_the_end_of_a_round_gets_everything_up_to_now(world: World, hub: Hub):
    job = await start(world)
    async with watching(world, hub, [job]) as client:
        token = (await client.next()).resume_token
    running_again = await run_again(world, await end(world, job, State.FAILED))
    async with watching(world, hub, [job], token=token) as client:
        events = [await client.event() for _ in ROUNDS[:-1]]
        await end(world, running_again)
        assert told(events + [message.event for message in await client.rest()]) == ROUNDS
    async with watching(world, hub, [job], token=token) as client:
        assert told([message.event for message in await client.rest()]) == ROUNDS


async def test_who_saw_a_job_fail_and_resumes_after_its_retry_hears_of_the_new_round(world: World, hub: Hub):
    job = await start(world)
    async with watching(world, hub, [job]) as client:
        await client.next()
        failed = await end(world, job, State.FAILED)
        [final] = await client.rest()
    running_again = await run_again(world, failed)
    async with watching(world, hub, [job], token=final.resume_token) as client:
        events = [await client.event() for _ in ROUNDS[1:-1]]
        await end(world, running_again)
        assert told(events + [message.event for message in await client.rest()]) == ROUNDS[1:]


async def test_a_watch_of_everything_that_starts_over_passes_over_what_was_deleted(world: World, hub: Hub):
    kept, deleted = await start(world), await start(world)
    async with watching(world, hub) as client:
        for _ in range(2):
            await client.next()
        before = hub.epoch
        await world.client.flushdb()
        await eventually(lambda: _changed(hub, before))
        for job in (kept, deleted):
            async with transaction(world.engine) as connection:
                assert await store.finish(connection, job, State.COMPLETED, fallback_s=60) is not None
        async with transaction(world.engine) as connection:
            await connection.execute(sa.delete(tables.jobs).where(tables.jobs.c.job_id == deleted.job_id))
        snapshot = (await client.next()).snapshot
        assert (snapshot.job_id, snapshot.state) == (str(kept.job_id), jobs_pb2.STATE_COMPLETED)
        another = await start(world)
        assert (await client.event()).job_id == str(another.job_id)


async def test_a_watch_of_everything_remembers_nothing_of_ended_jobs(world: World, hub: Hub):
    stream = WatchStream(hub, world.log, world.jobs().snapshots, checkpoint_interval_s=60)
    messages = stream.run(WatchRequest(world.owner, (), "", Principal()))
    client = Client(messages)
    try:
        await client.next()
        for state in (State.COMPLETED, State.FAILED, State.CANCELLED):
            await end(world, await start(world), state)
            for _ in range(3):
                await client.event()
        alive = await start(world)
        for _ in range(2):
            await client.event()
        # What a stream keeps would add up over the weeks that it may stay open.
        assert stream.known == {str(alive.job_id)}
    finally:
        await messages.aclose()


async def test_what_a_watch_of_everything_remembers_is_bounded(world: World, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "KNOWN_MAX", 2)
    stream = WatchStream(hub, world.log, world.jobs().snapshots, checkpoint_interval_s=60)
    messages = stream.run(WatchRequest(world.owner, (), "", Principal()))
    client = Client(messages)
    try:
        await client.next()
        jobs = [await start(world) for _ in range(4)]
        for _ in range(8):
            await client.event()
        assert stream.known == {str(job.job_id) for job in jobs[2:]}
        await end(world, jobs[0])
        assert (await client.event()).state_change.state == jobs_pb2.STATE_COMPLETED
    finally:
        await messages.aclose()


async def test_who_resumes_to_an_end_that_redis_does_not_know_gets_a_snapshot(world: World, hub: Hub):
    job = await start(world)
    async with watching(world, hub, [job]) as client:
        token = (await client.next()).resume_token
    async with transaction(world.engine) as connection:  # ended, not announced
        assert await store.finish(connection, job, State.COMPLETED, fallback_s=60) is not None
    async with watching(world, hub, [job], token=token) as client:
        messages = await client.rest()
    assert [message.snapshot.state for message in messages if message.HasField("snapshot")] == [jobs_pb2.STATE_COMPLETED]


async def test_an_old_or_foreign_life_of_redis_means_snapshots_again(world: World, hub: Hub):
    job = await start(world)
    async with watching(world, hub, [job]) as client:
        token = (await client.next()).resume_token
    before = hub.epoch
    await world.client.flushdb()
    await eventually(lambda: _changed(hub, before))
    async with watching(world, hub, [job], token=token) as client:
        assert (await client.next()).snapshot.state == jobs_pb2.STATE_PROCESSING


async def test_a_watch_of_everything_learns_what_ended_since_a_token_that_is_too_old(world: World, hub: Hub):
    job, long_ended = await start(world), await end(world, await start(world))
    async with watching(world, hub) as client:
        token = (await client.next()).resume_token
    before = hub.epoch
    await end(world, job)
    await world.client.flushdb()
    await eventually(lambda: _changed(hub, before))
    async with transaction(world.engine) as connection:  # by more than the grain of tokens, a millisecond
        await connection.execute(
            sa.update(tables.jobs)
            .where(tables.jobs.c.job_id == long_ended.job_id)
            .values(finish_time=tables.jobs.c.finish_time - timedelta(hours=1))
        )
    async with watching(world, hub, token=token) as client:
        snapshot = (await client.next()).snapshot
        assert (snapshot.job_id, snapshot.state) == (str(job.job_id), jobs_pb2.STATE_COMPLETED)
        another = await start(world)
        assert (await client.event()).job_id == str(another.job_id), "and nothing of what ended long before"


async def test_a_job_that_ended_before_the_newest_token_but_was_announced_after_it_is_told(world: World, hub: Hub):
    job = await start(world)
    async with transaction(world.engine) as connection:
        assert await store.finish(connection, job, State.COMPLETED, fallback_s=60) is not None
    async with watching(world, hub, checkpoint_interval_s=0.05) as client:
        token = (await client.next()).resume_token
        finish_time = (await world.job(job.job_id)).finish_time
        assert finish_time is not None
        while Token.decode(token, owner_id=world.owner).time < finish_time:
            token = (await client.next()).resume_token
    before = hub.epoch
    await world.client.flushdb()  # the announcement is lost before anybody read it
    await eventually(lambda: _changed(hub, before))
    async with watching(world, hub, token=token) as client:
        snapshot = (await client.next()).snapshot
        assert (snapshot.job_id, snapshot.state) == (str(job.job_id), jobs_pb2.STATE_COMPLETED)


async def test_a_job_that_began_and_ended_in_what_was_lost_is_told(world: World, hub: Hub):
    async with watching(world, hub) as client:
        assert (await client.next()).HasField("checkpoint")
        job = await world.submit()
        async with transaction(world.engine) as connection:
            started = await store.start_attempt(connection, job.job_id, worker_id="w", entry="s/1-0", takeover=False)
            assert started is not None
            assert await store.finish(connection, started, State.COMPLETED, fallback_s=60) is not None
        await world.client.flushdb()
        snapshot = (await client.next()).snapshot
        assert (snapshot.job_id, snapshot.state) == (str(job.job_id), jobs_pb2.STATE_COMPLETED)


async def _changed(hub: Hub, epoch: str) -> bool:
    return hub.epoch != epoch


async def test_redis_emptied_under_a_watch_means_snapshots_and_then_the_end(world: World, hub: Hub):
    job, other = await start(world), await start(world)
    async with watching(world, hub) as client:
        assert {(await client.next()).snapshot.job_id for _ in range(2)} == {str(job.job_id), str(other.job_id)}
        await progress(world, job, *range(1, 30))
        assert [(await client.event()).progress.step for _ in range(29)] == list(range(1, 30))
        # The end of one job gets lost with Redis, unread.
        async with transaction(world.engine) as connection:
            assert await store.finish(connection, other, State.COMPLETED, fallback_s=60) is not None
        await world.client.flushdb()
        again = {message.snapshot.job_id: message.snapshot.state for message in [await client.next() for _ in range(2)]}
        assert again == {str(job.job_id): jobs_pb2.STATE_PROCESSING, str(other.job_id): jobs_pb2.STATE_COMPLETED}
        await progress(world, job, 30)
        await end(world, job)
        assert (await client.event()).progress.step == 30
        assert (await client.event()).state_change.state == jobs_pb2.STATE_COMPLETED


async def test_a_slow_watcher_gets_the_newest_progress_and_the_end(world: World, hub: Hub):
    job = await start(world)
    async with watching(world, hub, [job]) as slow, watching(world, hub, [job]) as brisk:
        await slow.next()
        await brisk.next()
        for step in range(1, 1001):
            await progress(world, job, step)
            assert (await brisk.event()).progress.step == step  # is not held up
        await end(world, job)
        assert (await brisk.event()).state_change.state == jobs_pb2.STATE_COMPLETED
        events = [message.event for message in await slow.rest()]
    assert len(events) <= watch.BACKLOG_SOFT + 2
    assert [event.sequence for event in events] == sorted({event.sequence for event in events})
    assert events[-2].progress.step == 1000
    assert events[-1].state_change.state == jobs_pb2.STATE_COMPLETED


async def test_a_watcher_that_lags_beyond_measure_starts_over_and_learns_every_end(world: World, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "BACKLOG_SOFT", 2)
    monkeypatch.setattr(watch, "BACKLOG_HARD", 4)
    jobs = [await start(world) for _ in range(6)]
    async with watching(world, hub) as slow, watching(world, hub) as brisk:
        for _ in jobs:
            await slow.next()
            await brisk.next()
        for job in jobs:
            await end(world, job)
            await brisk.event()  # read by the hub, so offered to the slow one too
        states = {message.snapshot.job_id: message.snapshot.state for message in [await slow.next() for _ in jobs]}
    assert states == {str(job.job_id): jobs_pb2.STATE_COMPLETED for job in jobs}


async def test_silence_is_broken_by_checkpoints_that_can_be_resumed(world: World, hub: Hub):
    job = await start(world)
    async with watching(world, hub, [job], checkpoint_interval_s=0.05) as client:
        await client.next()
        checkpoint = await client.next()
        assert checkpoint.HasField("checkpoint")
    await progress(world, job, 1)
    async with watching(world, hub, [job], token=checkpoint.resume_token) as client:
        assert (await client.next()).event.progress.step == 1


async def test_a_watch_ends_with_its_access_token(world: World, hub: Hub):
    job = await start(world)
    async with watching(world, hub, [job], expire_time=time.time() + 0.2) as client:
        await client.next()
        with pytest.raises(MeshError) as raised:
            await client.next()
    assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_TOKEN_EXPIRED)


async def test_a_busy_watch_ends_with_its_access_token_too(world: World, hub: Hub):
    job = await start(world)
    async with watching(world, hub, [job], expire_time=time.time() + 0.2) as client:

        async def read_and_publish() -> None:
            for step in range(1, 100_000):
                await client.next()
                await progress(world, job, step)

        with pytest.raises(MeshError) as raised:
            await read_and_publish()
    assert raised.value.code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_server_that_goes_away_sends_its_watchers_elsewhere(world: World, hub: Hub):
    job = await start(world)
    async with watching(world, hub, [job]) as client:
        await client.next()
        waiting = asyncio.create_task(client.next())
        await asyncio.sleep(0)
        hub.drain()
        with pytest.raises(MeshError) as raised:
            await waiting
    assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_UNAVAILABLE)


async def test_without_redis_a_watch_is_to_be_tried_again(world: World, no_redis: Any):
    hub = Hub(world.event_log(no_redis))
    async with running(hub.run()), watching(world, hub) as client:
        with pytest.raises(MeshError) as raised:
            await client.next()
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE


async def test_a_closed_watch_leaves_nothing_behind(world: World, hub: Hub):
    job = await start(world)
    before = watch.WATCHERS._value.get()  # pyright: ignore[reportPrivateUsage]
    async with watching(world, hub, [job]) as client:
        await client.next()
        assert watch.WATCHERS._value.get() == before + 1  # pyright: ignore[reportPrivateUsage]
    assert watch.WATCHERS._value.get() == before  # pyright: ignore[reportPrivateUsage]


async def test_one_process_takes_so_many_watches_and_takes_others_when_they_end(world: World):
    hub = Hub(world.log, watches_max=2)
    async with running(hub.run()):
        await within(hub.reading.wait())
        async with watching(world, hub) as one, watching(world, hub) as two:
            await one.next()
            await two.next()
            await refused_as_too_many(world, hub)
        async with watching(world, hub) as client:
            await client.next()


async def test_watches_that_wait_for_redis_are_counted_too(world: World, no_redis: Any):
    hub = Hub(world.event_log(no_redis), watches_max=1)
    hub.reading.clear()
    async with watching(world, hub, token=hub.token(world.owner).encode()) as client:
        waiting = asyncio.create_task(client.next())
        await asyncio.sleep(0)
        await refused_as_too_many(world, hub)
        with pytest.raises(MeshError) as raised:
            await waiting
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    async with hub.place():  # a refused watch leaves its place
        pass


async def refused_as_too_many(world: World, hub: Hub) -> None:
    async with watching(world, hub, owner=uuid.uuid4()) as client:
        with pytest.raises(MeshError) as raised:
            await client.next()
    assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED)
    assert raised.value.retry_after_s == watch.FULL_RETRY_S
