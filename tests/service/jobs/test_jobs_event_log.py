"""The publish script and resume tokens over a real Redis."""

import asyncio
import time
import uuid
from typing import Any

from genmesh.jobs.v1 import jobs_pb2
from jobs_service.events import TRIM_SLACK_S, Position, Token, owner_tag, shard_of
from tests.service.jobs.world import World


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


async def test_the_position_of_the_end_is_remembered(world: World):
    course = Course(world)
    await course.state(1)
    assert await world.log.final_positions([str(course.job_id)]) == {}
    await course.state(2, final=True)
    last = (await world.events(course.job_id))[-1]
    assert last.final
    assert await world.log.final_positions([str(course.job_id)]) == {str(course.job_id): last.position}


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
