"""The store: guarded transitions, requests, outbox, places in the queue, pages."""

import asyncio
import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from genmesh.jobs.v1 import jobs_pb2
from jobs_service import store
from jobs_service.lifecycle import TRANSITIONS, Job, Priority, State, cost_of
from jobs_service.store import Duty
from jobs_service.tables import jobs, outbox
from servicekit.database import transaction
from tests.service.jobs.world import new_job, submit

OWNER = uuid.UUID(int=1)
ERROR = b"\x08\x0a"


async def pending(connection: AsyncConnection, **changes: Any) -> Job:
    return await submit(connection, new_job(OWNER, **changes))


async def started(connection: AsyncConnection, job: Job, *, entry: str = "s/1-0", takeover: bool = False, worker: str = "w") -> Job | None:
    return await store.start_attempt(connection, job.job_id, worker_id=worker, entry=entry, takeover=takeover)


async def in_state(connection: AsyncConnection, state: State) -> Job:
    job = await pending(connection)
    if state is State.PENDING:
        return job
    running = await started(connection, job)
    assert running is not None
    return running if state is State.PROCESSING else await ended(connection, running, state)


async def ended(connection: AsyncConnection, job: Job, state: State) -> Job:
    done = await store.finish(connection, job, state, fallback_s=0, error=ERROR if state is State.FAILED else None)
    assert done is not None
    return done[0]


async def move(connection: AsyncConnection, job: Job, target: State) -> Job | None:
    if target is State.PROCESSING:
        return await started(connection, job, takeover=True)
    if target is State.PENDING:
        return await store.requeue(connection, job, delay_s=0)
    done = await store.finish(connection, job, target, fallback_s=0, error=ERROR if target is State.FAILED else None)
    return None if done is None else done[0]


@pytest.mark.parametrize("target", State)
@pytest.mark.parametrize("source", State)
async def test_a_job_moves_where_the_table_says_and_nowhere_else(engine: AsyncEngine, source: State, target: State):
    async with transaction(engine) as connection:
        before = await in_state(connection, source)
        after = await move(connection, before, target)
        stored = await store.get_job(connection, before.job_id)
    if target in TRANSITIONS[source]:
        assert after == stored
        assert after is not None
        assert (after.state, after.version) == (target, before.version + 1)
    else:
        assert after is None
        assert stored == before


async def test_a_start_counts_attempts_and_notes_who_has_the_job(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await started(connection, await pending(connection), entry="s/7-0", worker="w7")
    assert job is not None
    assert (job.attempt, job.worker_id, job.queue_entry, job.start_time is not None) == (1, "w7", "s/7-0", True)


@pytest.mark.parametrize(
    ("entry", "takeover", "starts"),
    [("s/1-0", True, True), ("s/2-0", True, False), ("s/1-0", False, False), ("s/2-0", False, False)],
)
async def test_a_running_job_is_taken_over_through_its_own_entry_only(engine: AsyncEngine, entry: str, takeover: bool, starts: bool):
    async with transaction(engine) as connection:
        job = await started(connection, await pending(connection), entry="s/1-0")
        assert job is not None
        taken = await started(connection, job, entry=entry, takeover=takeover, worker="other")
    assert (taken is not None) is starts
    if taken is not None:
        assert (taken.attempt, taken.worker_id, taken.steps_done) == (2, "other", 0)


async def test_a_job_starts_before_its_deadline_or_never(engine: AsyncEngine):
    now = datetime.now(UTC)
    async with transaction(engine) as connection:
        late = await pending(connection, start_deadline=now - timedelta(seconds=1))
        early = await pending(connection, start_deadline=now + timedelta(hours=1))
        assert await started(connection, late) is None
        assert await started(connection, early) is not None
        assert [job.job_id for job in await store.late_jobs(connection, 10)] == [late.job_id]


async def test_a_job_that_started_in_time_starts_again_after_its_deadline(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await started(connection, await pending(connection))
        assert job is not None
        back = await store.requeue(connection, job, delay_s=0)
        assert back is not None
        await connection.execute(sa.update(jobs).values(start_deadline=sa.func.now() - timedelta(seconds=1)))
        assert await store.late_jobs(connection, 10) == []
        assert await started(connection, back) is not None


async def test_an_earlier_attempt_can_neither_finish_nor_requeue(engine: AsyncEngine):
    async with transaction(engine) as connection:
        first = await started(connection, await pending(connection))
        assert first is not None
        second = await started(connection, first, takeover=True)
        assert second is not None
        for target in (State.COMPLETED, State.FAILED, State.CANCELLED):
            assert await store.finish(connection, first, target, fallback_s=0, steps_done=3) is None
        assert await store.requeue(connection, first, delay_s=0) is None
        assert (await ended(connection, second, State.COMPLETED)).cost == 100


async def test_an_end_obliges_to_announce_and_settle_and_nothing_else_does(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await in_state(connection, State.PROCESSING)
        await connection.execute(sa.delete(outbox))
        done = await store.finish(connection, job, State.CANCELLED, fallback_s=5, steps_done=3, assets=[b"a"])
        assert done is not None
        assert [row.duty for row in done[1]] == [Duty.ANNOUNCE, Duty.SETTLE]
        assert (done[0].cost, done[0].steps_done, done[0].assets) == (30, 3, (b"a",))
        assert await store.finish(connection, job, State.COMPLETED, fallback_s=5) is None
        assert (await connection.execute(sa.select(sa.func.count()).select_from(outbox))).scalar_one() == 2


async def test_of_many_that_end_a_job_at_once_one_does(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await in_state(connection, State.PROCESSING)

    async def end(target: State) -> bool:
        async with transaction(engine) as connection:
            return await store.finish(connection, job, target, fallback_s=0) is not None

    assert sum(await asyncio.gather(*[end(target) for target in [State.COMPLETED, State.CANCELLED] * 4])) == 1


async def test_the_first_wish_to_cancel_keeps_its_time(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await in_state(connection, State.PROCESSING)
        first = await store.request_cancel(connection, job.job_id, OWNER)
    async with transaction(engine) as connection:
        second = await store.request_cancel(connection, job.job_id, OWNER)
        assert first is not None
        assert second is not None
        assert first.cancel_requested_time == second.cancel_requested_time is not None
        assert first.version == job.version
        assert await store.cancel_requested(connection, [job.job_id, uuid.uuid4()]) == [job.job_id]
        assert await store.request_cancel(connection, job.job_id, uuid.uuid4()) is None


# --- requests ---------------------------------------------------------------------------------------------------------


async def test_a_request_is_added_once(engine: AsyncEngine):
    request_id, first, second = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    async with transaction(engine) as connection:
        assert await store.add_request(connection, OWNER, request_id, digest=b"d", job_id=first, intent=b"i")
    async with transaction(engine) as connection:
        assert not await store.add_request(connection, OWNER, request_id, digest=b"d", job_id=second, intent=b"i")
        assert await store.add_request(connection, uuid.uuid4(), request_id, digest=b"d", job_id=second, intent=b"i")  # of another owner
        known = await store.find_request(connection, OWNER, request_id)
    assert known == store.Request(b"d", first, b"i", False)


async def test_a_request_becomes_a_job_once(engine: AsyncEngine):
    job, request_id = new_job(OWNER), uuid.uuid4()
    async with transaction(engine) as connection:
        await store.add_request(connection, OWNER, request_id, digest=b"d", job_id=job.job_id, intent=b"i")
        first = await store.commit_job(connection, job, request_id, fallback_s=9)
        assert first is not None
        assert [row.duty for row in first[1]] == [Duty.ANNOUNCE]
        assert await store.commit_job(connection, job, request_id, fallback_s=9) == (first[0], [])
        await store.delete_request(connection, OWNER, request_id, job.job_id)
        assert await store.find_request(connection, OWNER, request_id) == store.Request(b"d", job.job_id, None, False)


async def test_an_abandoned_request_becomes_no_job(engine: AsyncEngine):
    job, request_id = new_job(OWNER), uuid.uuid4()
    async with transaction(engine) as connection:
        await store.add_request(connection, OWNER, request_id, digest=b"d", job_id=job.job_id, intent=b"i")
    async with transaction(engine) as connection:
        assert await store.abandon_requests(connection, older_than_s=60, limit=9) == []
        expected = [(OWNER, request_id, job.job_id)]
        assert await store.abandon_requests(connection, older_than_s=0, limit=9) == expected
        assert await store.abandon_requests(connection, older_than_s=0, limit=9) == expected  # until its hold is released
        assert await store.commit_job(connection, job, request_id, fallback_s=0) is None
        await store.delete_request(connection, OWNER, request_id, uuid.uuid4())
        assert await store.find_request(connection, OWNER, request_id) is not None
        await store.delete_request(connection, OWNER, request_id, job.job_id)
        assert await store.find_request(connection, OWNER, request_id) is None
        assert await store.commit_job(connection, job, request_id, fallback_s=0) is None


async def test_a_request_that_is_a_job_is_never_abandoned(engine: AsyncEngine):
    async with transaction(engine) as connection:
        await pending(connection)
    async with transaction(engine) as connection:
        assert await store.abandon_requests(connection, older_than_s=0, limit=9) == []


# --- outbox -----------------------------------------------------------------------------------------------------------


async def test_a_duty_is_due_in_time_and_hidden_while_somebody_does_it(engine: AsyncEngine):
    async with transaction(engine) as connection:
        later = await store.add_duty(connection, uuid.uuid4(), Duty.SETTLE, 60)
        now = await store.add_duty(connection, uuid.uuid4(), Duty.ANNOUNCE, 0)
    async with transaction(engine) as connection:
        taken = await store.due_duties(connection, limit=10, again_after_s=30)
    assert [(row.outbox_id, row.duty, row.failures) for row in taken] == [(now.outbox_id, Duty.ANNOUNCE, 1)]
    async with transaction(engine) as connection:
        assert await store.due_duties(connection, limit=10, again_after_s=30) == []
        await store.delete_duties(connection, [now.outbox_id, later.outbox_id])
        assert (await connection.execute(sa.select(sa.func.count()).select_from(outbox))).scalar_one() == 0


async def test_a_duty_that_fails_waits_twice_as_long_up_to_a_minute(engine: AsyncEngine):
    waits: list[float] = []
    async with transaction(engine) as connection:
        await store.add_duty(connection, uuid.uuid4(), Duty.SETTLE, 0)
        for _ in range(7):
            await store.due_duties(connection, limit=1, again_after_s=2)
            wait = sa.func.extract("epoch", outbox.c.due_time - sa.func.now())
            waits.append(round(float((await connection.execute(sa.select(wait))).scalar_one())))
            await connection.execute(sa.update(outbox).values(due_time=sa.func.now()))
    assert waits == [2, 4, 8, 16, 32, 60, 60]


async def test_relays_share_the_duties(engine: AsyncEngine):
    async with transaction(engine) as connection:
        added = {(await store.add_duty(connection, uuid.uuid4(), Duty.ANNOUNCE, 0)).outbox_id for _ in range(6)}
    async with transaction(engine) as one, transaction(engine) as other:
        first = {row.outbox_id for row in await store.due_duties(one, limit=4, again_after_s=9)}
        second = {row.outbox_id for row in await store.due_duties(other, limit=4, again_after_s=9)}
    assert (len(first), len(second)) == (4, 2)
    assert first | second == added


async def test_every_pending_job_is_announced_again_and_no_other(engine: AsyncEngine):
    async with transaction(engine) as connection:
        waiting = {(await pending(connection)).job_id for _ in range(3)}
        for state in (State.PROCESSING, State.COMPLETED, State.FAILED, State.CANCELLED):
            await in_state(connection, state)
        await connection.execute(sa.delete(outbox))
        assert await store.announce_pending(connection) == 3
        duties = await store.due_duties(connection, limit=10, again_after_s=9)
    assert {(row.job_id, row.duty) for row in duties} == {(job_id, Duty.ANNOUNCE) for job_id in waiting}


# --- places and pages -------------------------------------------------------------------------------------------------


async def test_places_follow_priority_then_age_within_a_pool(engine: AsyncEngine):
    async with transaction(engine) as connection:
        free = [await pending(connection) for _ in range(2)]
        pro = [await pending(connection, priority=Priority.PRO) for _ in range(2)]
        elsewhere = await pending(connection, pool="films")
        running = await in_state(connection, State.PROCESSING)
        everybody = [*free, *pro, elsewhere, running]
        places = await store.queue_positions(connection, [job.job_id for job in everybody])
        assert [places.get(job.job_id) for job in everybody] == [3, 4, 1, 2, 1, None]
        front = {job.job_id: place for job, place in await store.front_of_queue(connection, 3)}
        assert front == {pro[0].job_id: 1, pro[1].job_id: 2, free[0].job_id: 3, elsewhere.job_id: 1}
        newcomers = [await store.place_of_newcomer(connection, "pictures", priority) for priority in (Priority.FREE, Priority.PRO)]
        assert newcomers == [5, 3]


async def test_pages_are_newest_first_without_gap_or_repetition(engine: AsyncEngine):
    async with transaction(engine) as connection:
        mine = [await in_state(connection, state) for state in (State.PENDING, State.COMPLETED, State.PENDING, State.FAILED, State.PENDING)]
        await submit(connection, new_job(uuid.uuid4()))

        async def page(limit: int, before: uuid.UUID | None = None, states: tuple[int, ...] = (), kinds: tuple[int, ...] = ()) -> list[int]:
            found = await store.list_jobs(connection, OWNER, limit=limit, before=before, states=states, kinds=kinds)
            return [[job.job_id for job in mine].index(job.job_id) for job in found]

        assert await page(3) == [4, 3, 2]
        assert await page(3, before=mine[2].job_id) == [1, 0]
        assert await page(9, states=(State.PENDING,)) == [4, 2, 0]
        assert await page(9, states=(State.FAILED, State.COMPLETED), kinds=(jobs_pb2.KIND_IMAGE,)) == [3, 1]
        assert await page(9, kinds=(99,)) == []
        assert [job.job_id for job in await store.current_jobs(connection, OWNER, ended_since=None, limit=2)] == [
            mine[0].job_id,
            mine[2].job_id,
        ]


async def test_what_is_anothers_is_not_found(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await pending(connection)
        assert await store.get_job(connection, job.job_id, uuid.uuid4()) is None
        assert await store.get_jobs(connection, uuid.uuid4(), [job.job_id]) == []
        assert await store.get_job(connection, job.job_id, OWNER) == job


async def test_estimates_learn_from_completed_jobs(engine: AsyncEngine):
    async with transaction(engine) as connection:
        assert await store.seconds_per_step(connection, "small") is None
        for seconds in (10, 20, 30):
            job = await in_state(connection, State.COMPLETED)
            start = jobs.c.finish_time - timedelta(seconds=seconds)
            await connection.execute(sa.update(jobs).where(jobs.c.job_id == job.job_id).values(start_time=start))
        assert await store.seconds_per_step(connection, "small") == pytest.approx((2.0, 2.8))


async def test_a_secret_is_made_once_and_shared(engine: AsyncEngine):
    async with transaction(engine) as connection:
        assert [await store.secret(connection, "quotes", fresh) for fresh in (b"one", b"two")] == [b"one", b"one"]


# --- the whole life ---------------------------------------------------------------------------------------------------

MOVES = st.sampled_from(["start", "take over", "stray start", "requeue", "complete", "fail", "cancel", "old attempt finishes"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(moves=st.lists(MOVES, max_size=14), steps=st.integers(0, 12))
async def test_any_course_of_events_keeps_the_rules(engine: AsyncEngine, moves: list[str], steps: int):
    """The store against a model of the lifecycle: same state, same attempt, every ending once, with its price and duties."""
    async with transaction(engine) as connection:
        job = await pending(connection)
        expected, previous = job, job
        endings = 0
        for name in moves:
            state = expected.state
            changed: Job | None
            match name:
                case "start":
                    changed, allowed = await started(connection, job), state is State.PENDING
                case "take over":
                    changed, allowed = await started(connection, job, takeover=True), not state.terminal
                case "stray start":
                    changed = await started(connection, job, takeover=True, entry="s/other")
                    allowed = state is State.PENDING
                    if changed is not None:  # later take-overs go through the entry it runs under
                        await connection.execute(sa.update(jobs).where(jobs.c.job_id == job.job_id).values(queue_entry="s/1-0"))
                case "requeue":
                    changed, allowed = await store.requeue(connection, expected, delay_s=0), state is State.PROCESSING
                case "old attempt finishes":
                    stale = replace(previous, state=State.PROCESSING)
                    changed = await move(connection, stale, State.COMPLETED)
                    allowed = state is State.PROCESSING and previous.attempt == expected.attempt
                case _:
                    target = {"complete": State.COMPLETED, "fail": State.FAILED, "cancel": State.CANCELLED}[name]
                    error = ERROR if target is State.FAILED else None
                    done = await store.finish(connection, expected, target, fallback_s=0, steps_done=steps, error=error)
                    changed, allowed = (None if done is None else done[0]), target in TRANSITIONS[state]
            assert (changed is not None) is allowed, (name, state)
            if changed is not None:
                assert changed.version == expected.version + 1
                assert changed.attempt == expected.attempt + (changed.state is State.PROCESSING)
                previous, expected = expected, changed
                endings += changed.state.terminal
        stored = await store.get_job(connection, job.job_id)
        assert stored is not None
        assert (stored.state, stored.version, stored.attempt) == (expected.state, expected.version, expected.attempt)
        settles = sa.select(sa.func.count()).where(outbox.c.job_id == job.job_id, outbox.c.duty == Duty.SETTLE)
        assert (await connection.execute(settles)).scalar_one() == endings == int(stored.state.terminal)
        if stored.state.terminal:
            assert stored.cost == cost_of(stored.state, estimated_cost=100, steps_agreed=10, steps_done=stored.steps_done)
