"""A watcher sees every event once and in order, by gRPC and by server-sent events, over any number of reconnects."""

import asyncio
import base64
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from itertools import pairwise

import grpc
import pytest

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import DEADLINE_S, Refusal, User, Watched, ended, image, refused
from tests.e2e.conftest import NewUser, Occupied

Messages = AsyncGenerator[jobs_pb2.WatchJobsResponse]
Watch = Callable[..., Messages]
WATCHES: dict[str, Callable[[User], Watch]] = {"gRPC": lambda user: user.watch, "SSE": lambda user: user.watch_sse}
STEPS = 12
SLOW = image(width=128, height=128, steps=STEPS)
"""Slow enough that a watcher can come and go while it runs."""


@pytest.fixture(params=WATCHES)
def watch_of(request: pytest.FixtureRequest) -> Callable[[User], Watch]:
    return WATCHES[request.param]


async def collect(messages: Messages, until: Callable[[jobs_pb2.WatchJobsResponse], bool], watched: Watched | None = None) -> Watched:
    """What a watch tells up to the first message that `until` accepts; then the watch is left."""
    watched = watched or Watched()
    async with asyncio.timeout(DEADLINE_S), aclosing(messages):
        async for message in messages:
            watched.messages.append(message)
            if until(message):
                return watched
    raise AssertionError(f"the watch ended before that, after {len(watched.messages)} messages")


def ends(message: jobs_pb2.WatchJobsResponse) -> bool:
    return message.HasField("event") and ended(message.event)


async def from_the_queue_on(
    user: User, occupied: Occupied, spec: jobs_pb2.JobSpec, watch: Watch | None = None
) -> tuple[jobs_pb2.Job, Watched]:
    """A job, and all that a watch of it tells: it waits until the watch has begun, so that nothing happens before."""
    async with occupied():
        job = await user.submit(spec)
        messages = (watch or user.watch)(job.job_id)
        first = await anext(messages)
    return job, Watched([first, *[message async for message in messages]])  # the server ends it after the job's end


def check_whole(events: list[jobs_pb2.JobEvent]) -> None:
    """Numbers without gap or repetition, one end, nothing after it."""
    assert all(after.sequence == before.sequence + 1 for before, after in pairwise(events)), [event.sequence for event in events]
    assert [ended(event) for event in events] == [False] * (len(events) - 1) + [True]


async def test_the_whole_way_of_a_job(alice: User, watch_of: Callable[[User], Watch], occupied: Occupied) -> None:
    job, watched = await from_the_queue_on(alice, occupied, SLOW, watch_of(alice))

    assert [snapshot.job_id for snapshot in watched.snapshots] == [job.job_id]
    assert watched.messages[0].HasField("snapshot")
    assert all(message.resume_token for message in watched.messages)
    check_whole(watched.events)
    last = watched.events[-1].state_change
    assert (last.state, last.job.state) == (jobs_pb2.STATE_COMPLETED, jobs_pb2.STATE_COMPLETED)
    assert last.job.cost_millicredits == job.estimated_cost_millicredits
    assert {asset.kind for asset in last.job.assets} == {jobs_pb2.Asset.KIND_IMAGE, jobs_pb2.Asset.KIND_THUMBNAIL}

    # Steps that end within 10 ms of each other are told together, which a stalled machine can make of two.
    assert watched.steps == sorted(set(watched.steps))
    assert watched.steps[-1] == STEPS
    assert len(watched.steps) >= STEPS - 2
    told = [event.progress for event in watched.events if event.HasField("progress")]
    assert all(progress.step_count in (0, STEPS) for progress in told)
    percents = [progress.percent for progress in told if progress.step_count]
    assert percents == sorted(percents)
    assert 0 <= percents[0] <= percents[-1] <= 100
    assert {jobs_pb2.STAGE_DENOISING, jobs_pb2.STAGE_ENCODING} <= {progress.stage for progress in told}
    assert {event.attempt for event in watched.events if event.HasField("progress")} == {1}
    assert [event.asset.kind for event in watched.events if event.HasField("asset")]
    previews = [event.preview for event in watched.events if event.HasField("preview")]
    assert all(0 < len(preview.inline_jpeg) <= 16 * 1024 and preview.blurhash for preview in previews)


async def test_a_watcher_that_comes_and_goes_sees_what_one_that_stays_sees(new_user: NewUser, watch_of: Callable[[User], Watch]) -> None:
    user = await new_user(1_000_000)
    watch = watch_of(user)
    opened = [asyncio.Event(), asyncio.Event()]

    async def stays() -> list[jobs_pb2.JobEvent]:
        def until(message: jobs_pb2.WatchJobsResponse) -> bool:
            opened[0].set()
            return ends(message)

        return (await collect(user.watch(), until)).events

    async def goes() -> tuple[list[jobs_pb2.JobEvent], int]:
        seen, reconnects = Watched(), 0
        await collect(watch(), lambda _: True, seen)
        opened[1].set()
        while not ends(seen.messages[-1]):
            start = len(seen.messages)
            # Three messages a time, so that it leaves in the middle of things, again and again.
            await collect(watch(token=seen.token), lambda message: ends(message) or len(seen.messages) >= start + 3, seen)  # noqa: B023
            reconnects += 1
        return seen.events, reconnects

    async def submit() -> None:
        for event in opened:
            await event.wait()
        await user.submit(SLOW)

    whole, (pieces, reconnects), _ = await asyncio.gather(stays(), goes(), submit())
    check_whole(whole)
    assert whole[0].state_change.state == jobs_pb2.STATE_PENDING, "from the very beginning"
    assert pieces == whole
    assert reconnects >= 4


async def test_resuming_after_the_end_gives_exactly_what_was_missed(
    alice: User, watch_of: Callable[[User], Watch], occupied: Occupied
) -> None:
    job, whole = await from_the_queue_on(alice, occupied, image(steps=6))
    check_whole(whole.events)
    first, last = 0, len(whole.messages) - 1
    for seen in (first, last // 2, last - 1, last):
        resumed = Watched([message async for message in watch_of(alice)(job.job_id, token=whole.messages[seen].resume_token)])
        assert not resumed.snapshots
        missed = [message.event for message in whole.messages[seen + 1 :] if message.HasField("event")]
        if whole.messages[seen].HasField("snapshot"):
            # A snapshot may be newer than its token, and then shows already what the first events tell.
            check_whole(resumed.events)
            assert resumed.events[-len(missed) :] == missed
        else:
            assert resumed.events == missed


async def test_a_watch_of_everything_sees_jobs_made_later(new_user: NewUser) -> None:
    user = await new_user(1_000_000)
    begun = await collect(user.watch(), lambda _: True)
    assert begun.messages[0].HasField("checkpoint"), "nothing to begin with, and the client is told so at once"

    ended_jobs: list[str] = []

    def until(message: jobs_pb2.WatchJobsResponse) -> bool:
        if ends(message):
            ended_jobs.append(message.event.job_id)
        return len(ended_jobs) == 2

    watching = asyncio.create_task(collect(user.watch(token=begun.token), until))
    made = [(await user.submit(image(steps=2))).job_id for _ in range(2)]
    watched = await watching
    assert ended_jobs == made, "one slot, first come first served"
    for job_id in made:
        events = [event for event in watched.events if event.job_id == job_id]
        check_whole(events)
        assert events[0].state_change.state == jobs_pb2.STATE_PENDING
    assert {event.job_id for event in watched.events} == set(made)


async def test_a_watch_of_one_job_tells_nothing_of_others(alice: User, occupied: Occupied) -> None:
    other = await alice.submit(image(steps=2))
    job, watched = await from_the_queue_on(alice, occupied, image(steps=2))
    assert {event.job_id for event in watched.events} == {job.job_id}
    assert [snapshot.job_id for snapshot in watched.snapshots] == [job.job_id]
    assert (await alice.job(other.job_id)).state == jobs_pb2.STATE_COMPLETED


async def test_a_watch_of_several_jobs_ends_with_the_last(alice: User, occupied: Occupied) -> None:
    async with occupied():
        jobs = [(await alice.submit(image(steps=2))).job_id for _ in range(3)]
        messages = alice.watch(*jobs)
        first = await anext(messages)
    watched = Watched([first, *[message async for message in messages]])
    assert {job.job_id for job in watched.snapshots} == set(jobs)
    assert [event.job_id for event in watched.events if ended(event)] == jobs
    assert ended(watched.events[-1])


async def test_a_finished_job_is_told_by_its_snapshot(alice: User, watch_of: Callable[[User], Watch]) -> None:
    job = await alice.submit(image(steps=1))
    await alice.watch_to_end(job.job_id)
    again = Watched([message async for message in watch_of(alice)(job.job_id)])
    assert [(snapshot.job_id, snapshot.state) for snapshot in again.snapshots] == [(job.job_id, jobs_pb2.STATE_COMPLETED)]
    assert again.snapshots[0].assets
    assert not again.events


async def test_a_waiting_job_is_told_its_place(alice: User, occupied: Occupied) -> None:
    async with occupied():
        jobs = [(await alice.submit(image(steps=1))).job_id for _ in range(2)]
        snapshots = [(await collect(alice.watch(job_id), lambda _: True)).snapshots[0] for job_id in jobs]
        assert [snapshot.queue_position for snapshot in snapshots] == [1, 2]
        assert all(snapshot.waiting.reason == jobs_pb2.Waiting.REASON_IN_QUEUE for snapshot in snapshots)
        watching = asyncio.create_task(
            collect(
                alice.watch(jobs[1]),
                lambda message: message.event.HasField("queue_update") and message.event.queue_update.queue_position == 1,
            )
        )
        await alice.cancel(jobs[0])  # the one behind moves up, and is told
        await watching
        await alice.cancel(jobs[1])


async def test_silence_is_broken_by_checkpoints(new_user: NewUser, watch_of: Callable[[User], Watch]) -> None:
    user = await new_user(0)
    told: list[jobs_pb2.WatchJobsResponse] = []

    def three(message: jobs_pb2.WatchJobsResponse) -> bool:
        told.append(message)
        return len(told) == 3

    await collect(watch_of(user)(), three)
    assert all(message.HasField("checkpoint") and message.resume_token for message in told)
    await collect(watch_of(user)(token=told[-1].resume_token), lambda message: message.HasField("checkpoint"))


# --- refused ---------------------------------------------------------------------------------------------------------


async def first_of(messages: Messages) -> jobs_pb2.WatchJobsResponse:
    async with aclosing(messages):
        return await anext(messages)


def encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


async def test_garbled_tokens_are_refused(alice: User, watch_of: Callable[[User], Watch]) -> None:
    token = (await collect(alice.watch(), lambda _: True)).token
    garbled = [
        "x",
        "%%%",
        "ÿ",
        "../..",
        token[: len(token) // 2],
        token + "AAAA",
        token.swapcase(),
        encoded("a.b.c"),
        encoded("0.0.0-0.0"),
        "=" * 4,
        "A" * 257,
    ]
    for one in garbled:
        refusal = await refused(first_of(watch_of(alice)(token=one)))
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["resume_token"]), one
        assert refusal.http_status in (None, 400)


async def test_tokens_of_others_are_refused(alice: User, new_user: NewUser) -> None:
    # Many others: events of users lie in a few streams, and somebody in the same stream is as much a stranger.
    strangers = await asyncio.gather(*(new_user(0) for _ in range(24)))
    for stranger in strangers:
        token = (await collect(stranger.watch(), lambda _: True)).token
        refusal = await refused(first_of(alice.watch(token=token)))
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["resume_token"])


@pytest.mark.parametrize(
    "job_ids", [["x"], [""], ["../../etc"], ["0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0001"] * 101], ids=["word", "empty", "path", "many"]
)
async def test_bad_job_ids_are_refused(alice: User, job_ids: list[str], watch_of: Callable[[User], Watch]) -> None:
    refusal = await refused(first_of(watch_of(alice)(*job_ids)))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields
    assert refusal.fields[0].startswith("job_ids")


async def test_one_job_that_is_not_there_refuses_the_watch(alice: User) -> None:
    job = await alice.submit(image(steps=1))
    with pytest.raises(Refusal) as raised:
        await first_of(alice.watch(job.job_id, "0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0001"))
    assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    await alice.watch_to_end(job.job_id)
