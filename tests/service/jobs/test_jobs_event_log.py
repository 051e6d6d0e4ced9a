"""The publish script and resume tokens over a real Redis."""

import asyncio
import shutil
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from genmesh.jobs.v1 import jobs_pb2
from jobs_service.events import TRIM_SLACK_S, EventLog, Newest, Position, Token, owner_tag, shard_of
from jobs_service.lifecycle import Job, State
from jobs_service.watch import Hub, WatchRequest, WatchStream
from servicekit import streams
from servicekit.errors import not_found
from servicekit.identity import Principal
from tests.service.jobs.redis_servers import RedisProcess
from tests.service.jobs.world import World, eventually, new_job, running, within


def state(job_id: uuid.UUID, of: jobs_pb2.State.ValueType) -> jobs_pb2.JobEvent:
    return jobs_pb2.JobEvent(job_id=str(job_id), state_change=jobs_pb2.StateChange(state=of))


def progress(job_id: uuid.UUID, step: int) -> jobs_pb2.JobEvent:
    return jobs_pb2.JobEvent(job_id=str(job_id), progress=jobs_pb2.Progress(step=step))


class Course:
    """A job whose events are published by hand."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.job_id = uuid.uuid4()

    async def state(self, version: int, of: jobs_pb2.State.ValueType = jobs_pb2.STATE_PENDING, *, final: bool = False) -> int:
        return await self.world.log.publish(state(self.job_id, of), owner_id=self.world.owner, version=version, final=final)

    async def progress(self, version: int, step: int = 1) -> int:
        return await self.world.log.publish(progress(self.job_id, step), owner_id=self.world.owner, version=version)

    async def place(self, version: int) -> int:
        event = jobs_pb2.JobEvent(job_id=str(self.job_id), queue_update=jobs_pb2.QueueUpdate(queue_position=1))
        return await self.world.log.publish(event, owner_id=self.world.owner, version=version)


async def test_sequence_numbers_have_no_holes(world: World):
    course = Course(world)
    sequences = [await course.state(1), await course.place(1), await course.state(2)]
    sequences += await asyncio.gather(*[course.progress(2, step) for step in range(20)])
    sequences.append(await course.state(3, final=True))
    assert sorted(sequences) == list(range(sequences[0], sequences[0] + 24))
    assert [event.sequence for event in await world.events(course.job_id)] == sorted(sequences)


async def test_what_is_stale_or_a_repetition_is_not_published(world: World):
    course = Course(world)
    assert await course.state(1)
    assert await course.state(1) == 0
    assert await course.state(3)
    assert await course.state(2) == 0
    assert await course.progress(2) == 0  # of a worker that lost the job
    assert await course.progress(4) == 0  # of a state nobody was told of
    assert await course.progress(3)
    assert await course.state(4, final=True)
    assert await course.progress(4) == 0  # after the end
    assert len(await world.events(course.job_id)) == 4


async def test_a_place_in_the_queue_is_no_first_event(world: World):
    course = Course(world)
    assert await course.place(1) == 0
    assert await course.state(1)
    assert await course.place(1)


async def test_after_a_loss_of_redis_numbers_only_grow_also_of_a_job_that_waits(world: World):
    course = Course(world)
    last = 0
    for _ in range(3):
        numbers = [await course.state(1), *[await course.place(1) for _ in range(50)]]
        assert numbers == list(range(numbers[0], numbers[0] + 51))
        assert numbers[0] > last
        last = numbers[-1]
        await world.client.flushdb()
    assert await course.progress(2) > last  # of a worker that goes on as if nothing had happened


async def test_the_newest_progress_is_remembered_until_the_state_changes(world: World):
    course = Course(world)
    await course.state(1)
    await course.state(2)
    await course.progress(2, 3)
    await course.progress(2, 4)
    assert await world.log.progress([course.job_id, uuid.uuid4()]) == {course.job_id: jobs_pb2.Progress(step=4)}
    await course.state(3)
    assert await world.log.progress([course.job_id]) == {}


async def test_what_was_published_last_is_remembered(world: World):
    course = Course(world)
    key = str(course.job_id)
    assert await world.log.newest([key]) == {}
    for version, of, final in ((1, jobs_pb2.STATE_PENDING, False), (2, jobs_pb2.STATE_FAILED, True), (3, jobs_pb2.STATE_PENDING, False)):
        await course.state(version, of, final=final)
        last = (await world.events(course.job_id))[-1]
        assert await world.log.newest([key]) == {key: Newest(last.position, version, final)}


async def test_a_retried_job_goes_on_where_its_numbers_ended(world: World):
    course = Course(world)
    numbers = [await course.state(1), await course.state(2), await course.state(3, jobs_pb2.STATE_FAILED, final=True)]
    assert await course.state(3, jobs_pb2.STATE_FAILED, final=True) == 0
    assert await course.progress(4) == 0  # nobody was told of the retry yet
    numbers += [await course.state(4), await course.place(4), await course.state(5), await course.progress(5)]
    numbers.append(await course.state(6, jobs_pb2.STATE_COMPLETED, final=True))
    assert numbers == list(range(numbers[0], numbers[0] + 8))


async def test_of_a_deleted_job_nothing_is_kept_but_that_nothing_comes_any_more(world: World):
    course = Course(world)
    await course.state(1, final=True)
    await world.log.forget(course.job_id)
    await world.log.forget(course.job_id)
    assert await world.log.newest([str(course.job_id)]) == {}
    key = world.log.keys.job(course.job_id)
    assert await world.client.hkeys(key) == [b"version", b"final"]
    assert await world.client.pttl(key) > 0
    # An attempt that was thought dead comes back.
    assert [await course.progress(1), await course.state(2), await course.progress(2)] == [0, 0, 0]


async def test_old_events_are_trimmed_and_young_ones_kept(world: World):
    course = Course(world)
    stream = world.log.keys.stream(shard_of(world.owner))
    old_ms = int((time.time() - 600 - TRIM_SLACK_S - 5) * 1000)
    fields: dict[Any, Any] = {"o": "x", "j": "x", "e": b"", "s": 1, "v": 1, "k": 0, "f": 0}
    # Redis trims whole nodes of a hundred entries.
    for number in range(300):
        await world.client.xadd(stream, fields, id=f"{old_ms}-{number + 1}")
    await world.client.xadd(stream, fields, id=f"{old_ms + 10_000}-1")
    assert await course.state(1)
    entries: Any = await world.client.xrange(stream)
    left = [Position.parse(entry_id.decode()) for entry_id, _ in entries]
    assert len(left) <= 102
    assert Position(old_ms + 10_000, 1) in left


async def test_a_token_is_honoured_in_its_epoch_while_events_are_kept(world: World):
    epoch, position = await world.log.epoch()
    token = Token(epoch, owner_tag(world.owner), position)
    assert world.log.honours(token, epoch)
    old = Token(epoch, token.owner, Position(int((time.time() - 601) * 1000), 0))
    assert not world.log.honours(old, epoch)
    await world.client.flushdb()
    after, _ = await world.log.epoch()
    assert after != epoch
    assert not world.log.honours(token, after)


async def test_a_position_is_before_all_that_is_yet_to_come(world: World):
    course = Course(world)
    for version in range(1, 20):
        _, before = await world.log.epoch()
        await course.state(version)
        assert (await world.events(course.job_id))[-1].position > before


# --- a Redis of the test's own: killed, started on older data, three of them as a cluster -------------------------------


class Shelf:
    """Jobs as the store would tell of them."""

    def __init__(self) -> None:
        self.owner = uuid.uuid4()
        self.jobs: dict[str, Job] = {}

    def put(self, job: Job) -> Job:
        self.jobs[str(job.job_id)] = job
        return job

    async def snapshots(self, request: WatchRequest) -> list[tuple[Job, jobs_pb2.Job]]:
        if any(job_id not in self.jobs for job_id in request.job_ids):
            raise not_found("job")
        found = [self.jobs[job_id] for job_id in request.job_ids] or [job for job in self.jobs.values() if not job.state.terminal]
        return [(job, jobs_pb2.Job(job_id=str(job.job_id), state=jobs_pb2.State.ValueType(job.state))) for job in found]


@asynccontextmanager
async def watching(
    shelf: Shelf, log: EventLog, hub: Hub, *job_ids: uuid.UUID, token: str = ""
) -> AsyncGenerator[AsyncIterator[jobs_pb2.WatchJobsResponse]]:
    stream = WatchStream(hub, log, shelf.snapshots, checkpoint_interval_s=60)
    messages = stream.run(WatchRequest(shelf.owner, tuple(map(str, job_ids)), token, Principal()))

    async def parsed() -> AsyncGenerator[jobs_pb2.WatchJobsResponse]:
        async for data in messages:
            yield jobs_pb2.WatchJobsResponse.FromString(data)

    responses = parsed()
    try:
        yield responses
    finally:
        await responses.aclose()
        await messages.aclose()


async def test_redis_that_comes_back_with_older_data_repeats_nothing(own_redis: RedisProcess, tmp_path: Path):
    shelf = Shelf()
    job = shelf.put(new_job(shelf.owner, state=State.PROCESSING, version=2))
    client = streams.connect(own_redis.settings(), blocking=True)
    log = EventLog(client, "t", retention_s=600)
    hub = Hub(log)
    sequences: list[int] = []

    async def publish(event: jobs_pb2.JobEvent, version: int, *, final: bool = False) -> int:
        return await log.publish(event, owner_id=shelf.owner, version=version, final=final)

    async with AsyncExitStack() as stack:
        stack.push_async_callback(client.aclose)
        await publish(state(job.job_id, jobs_pb2.STATE_PROCESSING), 2)
        await stack.enter_async_context(running(hub.run()))
        watch = await stack.enter_async_context(watching(shelf, log, hub, job.job_id))
        before = (await within(anext(watch))).resume_token
        await publish(progress(job.job_id, 1), 2)
        sequences.append((await within(anext(watch))).event.sequence)
        epoch = hub.epoch

        shutil.copytree(own_redis.directory, tmp_path / "aside")
        lost = [await publish(progress(job.job_id, step), 2) for step in range(2, 50)]
        sequences += [(await within(anext(watch))).event.sequence for _ in lost]
        own_redis.kill()
        shutil.rmtree(own_redis.directory)
        shutil.copytree(tmp_path / "aside", own_redis.directory)
        await own_redis.start()

        async def publish_again(event: jobs_pb2.JobEvent, version: int) -> None:
            async def published() -> bool:
                with suppress(RedisError, OSError):
                    return await publish(event, version, final=event.state_change.state == jobs_pb2.STATE_COMPLETED) > 0
                return False

            await eventually(published)

        await publish_again(progress(job.job_id, 50), 2)
        newest = (await log.range(shard_of(shelf.owner), Position(0, 0), Position(2**63, 0), 1000))[-1]
        assert newest.sequence > lost[-1], "no number is given out twice"

        async def noticed() -> bool:
            return hub.epoch != epoch

        await eventually(noticed)
        messages = [await within(anext(watch))]
        while not messages[-1].HasField("snapshot"):  # the first event may have come before the loss was noticed
            messages.append(await within(anext(watch)))
        await publish_again(progress(job.job_id, 51), 2)
        shelf.put(new_job(shelf.owner, job_id=job.job_id, state=State.COMPLETED, version=3))
        await publish_again(state(job.job_id, jobs_pb2.STATE_COMPLETED), 3)
        messages += [message async for message in watch]
        events = [message.event for message in messages if message.HasField("event")]
        assert [event.progress.step for event in events][-2:] == [51, 0]
        assert events[-1].state_change.state == jobs_pb2.STATE_COMPLETED
        sequences += [event.sequence for event in events]
        assert sequences == sorted(set(sequences))

        again = await stack.enter_async_context(watching(shelf, log, hub, job.job_id, token=before))
        assert [message.snapshot.state async for message in again] == [jobs_pb2.STATE_COMPLETED]


async def test_after_a_restart_the_progress_of_a_state_that_was_lost_is_told(own_redis: RedisProcess, tmp_path: Path):
    job_id, owner = uuid.uuid4(), uuid.uuid4()
    client = streams.connect(own_redis.settings(), blocking=True)
    log = EventLog(client, "t", retention_s=600)
    try:
        first = await log.publish(state(job_id, jobs_pb2.STATE_PENDING), owner_id=owner, version=1)
        epoch, _ = await log.epoch()
        assert (await log.epoch())[0] == epoch
        shutil.copytree(own_redis.directory, tmp_path / "aside")
        lost = await log.publish(state(job_id, jobs_pb2.STATE_PROCESSING), owner_id=owner, version=2)
        own_redis.kill()
        shutil.rmtree(own_redis.directory)
        shutil.copytree(tmp_path / "aside", own_redis.directory)
        await own_redis.start()
        place = jobs_pb2.JobEvent(job_id=str(job_id), queue_update=jobs_pb2.QueueUpdate(queue_position=1))
        assert await log.publish(place, owner_id=owner, version=2) == 0
        numbers = [await log.publish(progress(job_id, step), owner_id=owner, version=2) for step in (1, 2)]
        assert first < lost < numbers[0]
        assert numbers[1] == numbers[0] + 1
        assert await log.publish(progress(job_id, 1), owner_id=owner, version=1) == 0
        assert (await log.epoch())[0] != epoch
    finally:
        await client.aclose()


async def test_events_in_a_cluster(redis_cluster: list[RedisProcess]):
    shelf = Shelf()
    for node in redis_cluster:  # whichever node the URL names
        client = streams.connect(node.settings(cluster=True), blocking=True)
        log = EventLog(client, f"t{node.port}", retention_s=600)
        hub = Hub(log)
        job = shelf.put(new_job(shelf.owner, state=State.PROCESSING, version=2))
        async with AsyncExitStack() as stack:
            stack.push_async_callback(client.aclose)
            await log.publish(state(job.job_id, jobs_pb2.STATE_PROCESSING), owner_id=shelf.owner, version=2)
            await stack.enter_async_context(running(hub.run()))
            watch = await stack.enter_async_context(watching(shelf, log, hub, job.job_id))
            token = (await within(anext(watch))).resume_token
            published = [await log.publish(progress(job.job_id, step), owner_id=shelf.owner, version=2) for step in range(1, 20)]
            assert await log.progress([job.job_id]) == {job.job_id: jobs_pb2.Progress(step=19)}
            published.append(await log.publish(state(job.job_id, jobs_pb2.STATE_COMPLETED), owner_id=shelf.owner, version=3, final=True))
            assert [message.event.sequence async for message in watch] == published
            resumed = await stack.enter_async_context(watching(shelf, log, hub, job.job_id, token=token))
            assert [message.event.sequence async for message in resumed] == published
            listener = streams.connect(node.settings(cluster=True), blocking=True)
            stack.push_async_callback(listener.aclose)
            await listener.initialize()  # until then a cluster's client does not know where a channel is
            pubsub = await stack.enter_async_context(listener.pubsub())
            await pubsub.subscribe(log.keys.cancel)
            await within(pubsub.get_message(timeout=2.0))
            await log.ask_to_cancel(job.job_id)
            heard: Any = await within(pubsub.get_message(ignore_subscribe_messages=True, timeout=2.0))
            assert heard["data"] == str(job.job_id).encode()
            await log.forget(job.job_id)
            assert await log.newest([str(job.job_id)]) == {}
