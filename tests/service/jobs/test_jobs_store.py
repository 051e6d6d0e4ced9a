"""The store: guarded transitions, requests, outbox, places in the queue, pages, dead letters, retries, deletion."""

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest
import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from genmesh.jobs.v1 import jobs_pb2
from jobs_service import store
from jobs_service.lifecycle import TRANSITIONS, Failure, Job, Priority, State
from jobs_service.store import Duty, Level, Pace, Retry
from jobs_service.tables import deletions, jobs, outbox, requests, retries, workers
from servicekit.database import transaction
from tests.service.jobs.world import new_job, note, submit

OWNER = uuid.UUID(int=1)
FAILURE = Failure(error=b"\x08\x0a", reason="ERROR_REASON_WORKER_LOST", fingerprint="f" * 16)


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


async def ended(connection: AsyncConnection, job: Job, state: State, failure: Failure = FAILURE) -> Job:
    done = await store.finish(connection, job, state, fallback_s=0, failure=failure if state is State.FAILED else None)
    assert done is not None
    return done[0]


async def settled(connection: AsyncConnection, job: Job) -> None:
    """Its bill is settled, as delivery does it."""
    await store.delete_duties(connection, await store.duties_of(connection, job.job_id, Duty.SETTLE))


async def dead(connection: AsyncConnection, failure: Failure = FAILURE, **changes: Any) -> Job:
    """A job that failed, its hold released."""
    running = await started(connection, await pending(connection, **changes))
    assert running is not None
    job = await ended(connection, running, State.FAILED, failure)
    await settled(connection, job)
    return job


async def fulfilled(connection: AsyncConnection, job: Job) -> None:
    """All its duties are done."""
    await settled(connection, job)
    await store.delete_duties(connection, await store.duties_of(connection, job.job_id, Duty.ANNOUNCE))


async def retried(connection: AsyncConnection, job: Job) -> Job | None:
    """A retry noted and committed."""
    reservation_id = uuid.uuid4()
    assert await store.add_retry(connection, job.job_id, reservation_id) == Retry(reservation_id, False)
    committed = await store.commit_retry(connection, job, reservation_id, fallback_s=0)
    return None if committed is None else committed[0]


async def rows(connection: AsyncConnection, table: sa.Table) -> int:
    return (await connection.execute(sa.select(sa.func.count()).select_from(table))).scalar_one()


async def move(connection: AsyncConnection, job: Job, target: State) -> Job | None:
    if target is State.PROCESSING:
        return await started(connection, job, takeover=True)
    if target is State.PENDING:
        if job.state is State.FAILED:
            await settled(connection, job)
            return await retried(connection, job)
        back = await store.requeue(connection, job, delay_s=0, failed=True, fallback_s=0)
        return None if back is None else back[0]
    done = await store.finish(connection, job, target, fallback_s=0, failure=FAILURE if target is State.FAILED else None)
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


async def test_an_attempt_counts_as_failed_when_it_failed_or_was_lost_and_not_when_it_was_handed_back(engine: AsyncEngine):
    async with transaction(engine) as connection:
        first = await started(connection, await pending(connection))
        assert first is not None
        lost = await started(connection, first, takeover=True)
        assert lost is not None
        assert (first.failures, lost.failures) == (0, 1)
        back = await store.requeue(connection, lost, delay_s=0, failed=False, fallback_s=0)
        assert back is not None
        assert (back[0].failures, back[0].attempt) == (1, 2)
        again = await started(connection, back[0], takeover=True)  # it waited: nothing was lost
        assert again is not None
        assert again.failures == 1
        failed = await store.requeue(connection, again, delay_s=0, failed=True, fallback_s=0)
        assert failed is not None
        last = await started(connection, failed[0])
        assert last is not None
        assert ((await ended(connection, last, State.FAILED)).failures, last.attempt) == (3, 4)


async def test_a_job_put_back_is_due_after_its_delay_and_has_to_be_announced(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await in_state(connection, State.PROCESSING)
        back = await store.requeue(connection, job, delay_s=30, failed=True, fallback_s=5)
        assert back is not None
        moment = (await connection.execute(sa.select(sa.func.now()))).scalar_one()
        assert back[0].retry_time == moment + timedelta(seconds=30)
        assert [row.duty for row in back[1]] == [Duty.ANNOUNCE]
        again = await started(connection, back[0])
        assert again is not None
        assert again.retry_time is None
        at_once = await store.requeue(connection, again, delay_s=0, failed=False, fallback_s=5)
        assert at_once is not None
        assert at_once[0].retry_time is None


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
        back = await store.requeue(connection, job, delay_s=0, failed=True, fallback_s=0)
        assert back is not None
        await connection.execute(sa.update(jobs).values(start_deadline=sa.func.now() - timedelta(seconds=1)))
        assert await store.late_jobs(connection, 10) == []
        assert await started(connection, back[0]) is not None


async def test_an_earlier_attempt_can_neither_finish_nor_requeue(engine: AsyncEngine):
    async with transaction(engine) as connection:
        first = await started(connection, await pending(connection))
        assert first is not None
        second = await started(connection, first, takeover=True)
        assert second is not None
        for target in (State.COMPLETED, State.FAILED, State.CANCELLED):
            assert await store.finish(connection, first, target, fallback_s=0, steps_done=3, failure=FAILURE) is None
        assert await store.requeue(connection, first, delay_s=0, failed=True, fallback_s=0) is None
        assert (await ended(connection, second, State.COMPLETED)).cost == 100


async def test_the_version_fences_where_attempts_are_numbered_alike(engine: AsyncEngine):
    async with transaction(engine) as connection:
        running = await started(connection, await pending(connection))
        assert running is not None
        failed = await ended(connection, running, State.FAILED)
        await settled(connection, failed)
        back = await retried(connection, failed)
        assert back is not None
        again = await started(connection, back)
        assert again is not None
        assert again.attempt == running.attempt  # a retry counts from the beginning
        assert await store.finish(connection, running, State.COMPLETED, fallback_s=0) is None
        assert await store.requeue(connection, running, delay_s=0, failed=True, fallback_s=0) is None
        assert await store.finish(connection, again, State.COMPLETED, fallback_s=0) is not None


async def test_a_failure_says_why_and_no_other_ending_does(engine: AsyncEngine):
    async with transaction(engine) as connection:
        failed = await in_state(connection, State.FAILED)
        assert (failed.error, failed.failure_reason, failed.fingerprint) == (FAILURE.error, FAILURE.reason, FAILURE.fingerprint)
        done = await in_state(connection, State.COMPLETED)
        assert (done.error, done.failure_reason, done.fingerprint) == (None, None, None)
    with pytest.raises(IntegrityError):
        async with transaction(engine) as connection:
            await store.finish(connection, await in_state(connection, State.PROCESSING), State.FAILED, fallback_s=0)


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


async def find(connection: AsyncConnection, request_id: uuid.UUID) -> store.Request | None:
    return (await store.find_requests(connection, OWNER, [request_id])).get(request_id)


async def test_a_request_is_added_once(engine: AsyncEngine):
    request_id, first, second = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    async with transaction(engine) as connection:
        assert await note(connection, new_job(OWNER, job_id=first), request_id, intent=b"i")
    async with transaction(engine) as connection:
        assert not await note(connection, new_job(OWNER, job_id=second), request_id)
        assert await note(connection, new_job(uuid.uuid4(), job_id=second), request_id)  # of another owner
        known = await store.find_requests(connection, OWNER, [request_id, uuid.uuid4()])
    assert known == {request_id: store.Request(b"d", first, b"i", False)}


async def test_a_request_becomes_a_job_once(engine: AsyncEngine):
    job, request_id = new_job(OWNER), uuid.uuid4()
    async with transaction(engine) as connection:
        await note(connection, job, request_id)
        first = await store.commit_job(connection, job, request_id, fallback_s=9)
        assert first is not None
        assert [row.duty for row in first[1]] == [Duty.ANNOUNCE]
        assert await store.commit_job(connection, job, request_id, fallback_s=9) == (first[0], [])
        await store.delete_request(connection, OWNER, request_id, job.job_id)
        assert await find(connection, request_id) == store.Request(b"d", job.job_id, None, False)


async def test_an_abandoned_request_becomes_no_job(engine: AsyncEngine):
    job, request_id = new_job(OWNER), uuid.uuid4()
    async with transaction(engine) as connection:
        await note(connection, job, request_id)
    async with transaction(engine) as connection:
        assert await store.abandon_requests(connection, older_than_s=60, limit=9) == []
        expected = [(OWNER, request_id, job.job_id)]
        assert await store.abandon_requests(connection, older_than_s=0, limit=9) == expected
        assert await store.abandon_requests(connection, older_than_s=0, limit=9) == expected  # until its hold is released
        assert await store.commit_job(connection, job, request_id, fallback_s=0) is None
        await store.delete_request(connection, OWNER, request_id, uuid.uuid4())
        assert await find(connection, request_id) is not None
        await store.delete_request(connection, OWNER, request_id, job.job_id)
        assert await find(connection, request_id) is None
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


async def test_duties_of_a_job_are_found_by_their_kind(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await in_state(connection, State.COMPLETED)
        await in_state(connection, State.COMPLETED)
        settles = await store.duties_of(connection, job.job_id, Duty.SETTLE)
        assert len(settles) == 1
        assert len(await store.duties_of(connection, job.job_id, Duty.ANNOUNCE)) == 2  # of the submit and of the end
        await store.delete_duties(connection, settles)
        assert await store.duties_of(connection, job.job_id, Duty.SETTLE) == []


async def test_every_pending_job_is_listed_batch_by_batch_and_no_other(engine: AsyncEngine):
    async with transaction(engine) as connection:
        waiting = [(await pending(connection)).job_id for _ in range(3)]
        for state in (State.PROCESSING, State.COMPLETED, State.FAILED, State.CANCELLED):
            await in_state(connection, state)

        async def batch(after: uuid.UUID | None, older_than_s: float = 0.0) -> list[uuid.UUID]:
            return [job.job_id for job in await store.pending_jobs(connection, after=after, older_than_s=older_than_s, limit=2)]

        assert await batch(None) == waiting[:2]
        assert await batch(waiting[1]) == waiting[2:]
        assert await batch(waiting[2]) == []
        assert await batch(None, older_than_s=60) == []
        await connection.execute(sa.update(jobs).values(create_time=sa.func.now() - timedelta(seconds=61)))
        assert await batch(None, older_than_s=60) == waiting[:2]


# --- places and pages -------------------------------------------------------------------------------------------------


async def line_of(connection: AsyncConnection, everybody: Sequence[Job]) -> list[int | None]:
    places = await store.queue_positions(connection, [job.job_id for job in everybody])
    return [places.get(job.job_id) for job in everybody]


async def test_a_job_that_is_claimed_meanwhile_has_no_place(engine: AsyncEngine):
    async with transaction(engine) as connection:
        claimed, waiting = [await pending(connection) for _ in range(2)]

        class Interrupted:
            """Claims the job after the first statement; after the second one it is claimed already."""

            async def execute(self, statement: Any) -> Any:
                result = await connection.execute(statement)
                await started(connection, claimed)
                return result

        places = await store.queue_positions(cast("AsyncConnection", Interrupted()), [claimed.job_id, waiting.job_id])
        assert places == {waiting.job_id: 1}


async def test_places_follow_age_within_a_level_of_a_pool(engine: AsyncEngine):
    async with transaction(engine) as connection:
        free = [await pending(connection) for _ in range(2)]
        pro = [await pending(connection, priority=Priority.PRO) for _ in range(2)]
        elsewhere = await pending(connection, pool="films")
        running = await in_state(connection, State.PROCESSING)
        assert await line_of(connection, [*free, *pro, elsewhere, running]) == [1, 2, 1, 2, 1, None]
        front = {job.job_id: place for job, place in await store.front_of_queue(connection, 1)}
        assert front == {free[0].job_id: 1, pro[0].job_id: 1, elsewhere.job_id: 1}
        newcomers = [await store.place_of_newcomer(connection, "pictures", priority, OWNER) for priority in (Priority.FREE, Priority.PRO)]
        assert newcomers == [3, 3]
        assert await store.place_of_newcomer(connection, "nowhere", Priority.FREE, OWNER) == 1


async def test_owners_are_served_in_turn_within_a_level(engine: AsyncEngine):
    a, b, c = (uuid.UUID(int=number) for number in range(2, 5))
    async with transaction(engine) as connection:
        a1, a2, a3, b1, c1, c2 = [await submit(connection, new_job(owner)) for owner in (a, a, a, b, c, c)]
        assert await line_of(connection, [a1, b1, c1, a2, c2, a3]) == [1, 2, 3, 4, 5, 6]
        front = {job.job_id: place for job, place in await store.front_of_queue(connection, 4)}
        assert front == {a1.job_id: 1, b1.job_id: 2, c1.job_id: 3, a2.job_id: 4}


@pytest.mark.parametrize("owners", [[], [2], [3, 3, 3, 2], [2, 2, 2, 3], [3, 4, 3, 4, 4, 2, 2, 5], [2, 2, 3, 2, 3, 2]])
async def test_a_newcomer_gets_the_place_it_was_told(engine: AsyncEngine, owners: list[int]):
    async with transaction(engine) as connection:
        for owner in owners:
            await submit(connection, new_job(uuid.UUID(int=owner)))
        await submit(connection, new_job(uuid.UUID(int=2), pool="films"))
        await submit(connection, new_job(uuid.UUID(int=2), priority=Priority.PRO))
        told = await store.place_of_newcomer(connection, "pictures", Priority.FREE, uuid.UUID(int=2))
        assert await line_of(connection, [await submit(connection, new_job(uuid.UUID(int=2)))]) == [told]


async def test_running_jobs_are_counted_by_owner_and_pool(engine: AsyncEngine):
    async with transaction(engine) as connection:
        for changes in ({}, {}, {"pool": "films"}, {"owner_id": uuid.UUID(int=2)}):
            await started(connection, await submit(connection, replace(new_job(OWNER), **changes)))
        await pending(connection)
        assert await store.running_of_owner(connection, OWNER) == {"pictures": 2, "films": 1}
        assert await store.running_by_pool(connection) == {"pictures": 3, "films": 1}


async def test_levels_count_what_waits(engine: AsyncEngine):
    async with transaction(engine) as connection:
        assert await store.levels(connection) == []
        old = await pending(connection)
        await connection.execute(sa.update(jobs).values(create_time=sa.func.now() - timedelta(seconds=90)))
        await submit(connection, new_job(uuid.UUID(int=2)))
        back = await store.requeue(connection, await in_state(connection, State.PROCESSING), delay_s=60, failed=True, fallback_s=0)
        assert back is not None
        await pending(connection, priority=Priority.PRO)
        await in_state(connection, State.PROCESSING)
        found = {(level.pool, level.priority): level for level in await store.levels(connection)}
        assert found == {
            ("pictures", Priority.FREE): Level("pictures", Priority.FREE, waiting=3, delayed=1, owners=2, oldest_wait_s=90),
            ("pictures", Priority.PRO): Level("pictures", Priority.PRO, waiting=1, delayed=0, owners=1, oldest_wait_s=0),
        }
        assert old.state is State.PENDING


async def test_pools_have_unfinished_jobs_or_workers(engine: AsyncEngine):
    async with transaction(engine) as connection:
        await pending(connection, pool="waits")
        await started(connection, await pending(connection, pool="runs"))
        await ended(connection, await pending(connection, pool="is over"), State.CANCELLED)
        await store.offer_worker(connection, "w", pools=["works", "runs"], slot_count=1, loaded_models=[])
        assert await store.pools(connection) == ["runs", "waits", "works"]


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


async def test_what_is_current_includes_what_ended_since(engine: AsyncEngine):
    async with transaction(engine) as connection:
        long_ago, lately = await in_state(connection, State.COMPLETED), await in_state(connection, State.FAILED)
        waits = await pending(connection)
        early = jobs.c.finish_time - timedelta(hours=1)
        await connection.execute(sa.update(jobs).where(jobs.c.job_id == long_ago.job_id).values(finish_time=early))
        found = await store.current_jobs(connection, OWNER, ended_since=lately.finish_time, limit=9)
        assert [job.job_id for job in found] == [waits.job_id, lately.job_id]  # unfinished ones first


async def test_what_is_anothers_is_not_found(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await pending(connection)
        assert await store.get_job(connection, job.job_id, uuid.uuid4()) is None
        assert await store.get_jobs(connection, uuid.uuid4(), [job.job_id]) == []
        assert await store.get_job(connection, job.job_id, OWNER) == job


# --- models and workers -----------------------------------------------------------------------------------------------


async def completed_in(connection: AsyncConnection, seconds: float, **changes: Any) -> None:
    running = await started(connection, await pending(connection, **changes))
    assert running is not None
    await ended(connection, running, State.COMPLETED)
    start = jobs.c.finish_time - timedelta(seconds=seconds)
    await connection.execute(sa.update(jobs).where(jobs.c.job_id == running.job_id).values(start_time=start))


async def test_estimates_learn_from_completed_jobs(engine: AsyncEngine):
    async with transaction(engine) as connection:
        await store.offer_models(connection, [("small", b""), ("idle", b"")])
        assert await store.paces(connection) == ({}, {})
        for seconds in (10, 20, 30):
            await completed_in(connection, seconds)
        await completed_in(connection, 1000, model="unknown")  # no model that was ever offered
        await in_state(connection, State.FAILED)
        steps, whole = await store.paces(connection)
        assert (set(steps), set(whole)) == ({"small"}, {"pictures"})
        assert (steps["small"].p50_s, steps["small"].p90_s) == pytest.approx((2.0, 2.8))
        assert (whole["pictures"].p50_s, whole["pictures"].p90_s) == pytest.approx((20, 28))


async def test_estimates_learn_from_the_newest_jobs_of_each_model_and_pool(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store, "DURATION_SAMPLE", 2)
    async with transaction(engine) as connection:
        await store.offer_models(connection, [("small", b""), ("large", b"")])
        for seconds in (500, 10, 10):
            await completed_in(connection, seconds)
        await completed_in(connection, 40, model="large", steps_agreed=20)
        steps, whole = await store.paces(connection)
        assert steps == {"small": Pace(1, 1), "large": Pace(2, 2)}
        assert whole["pictures"].p50_s == pytest.approx(10)  # of 10, 10 and 40 s


async def test_a_worker_is_there_until_it_is_silent_or_says_goodbye(engine: AsyncEngine):
    async def live(connection: AsyncConnection) -> list[str]:
        return [worker.worker_id for worker in await store.live_workers(connection, silent_s=15)]

    async with transaction(engine) as connection:
        for name in ("w2", "w1", "silent", "forgotten"):
            await store.offer_worker(connection, name, pools=["pictures", "films"], slot_count=2, loaded_models=["small"])
        for name, silence in (("silent", timedelta(seconds=16)), ("forgotten", timedelta(days=2))):
            seen = sa.func.now() - silence
            await connection.execute(sa.update(workers).where(workers.c.worker_id == name).values(seen_time=seen))
    async with transaction(engine) as connection:
        assert await live(connection) == ["w1", "w2"]
        await store.offer_worker(connection, "w1", pools=["pictures"], slot_count=4, loaded_models=[])
        assert await rows(connection, workers) == 3  # a worker that has been away for days is forgotten
        (first, _) = await store.live_workers(connection, silent_s=15)
        assert (first.pools, first.slot_count, first.loaded_models) == (("pictures",), 4, ())
        await store.withdraw_worker(connection, "w1")
        assert await live(connection) == ["w2"]
        await store.offer_worker(connection, "silent", pools=["pictures"], slot_count=1, loaded_models=[])
        assert await live(connection) == ["silent", "w2"]


async def test_offered_models_say_how_long_ago(engine: AsyncEngine):
    async with transaction(engine) as connection:
        await store.offer_models(connection, [])
        await store.offer_models(connection, [("small", b"old"), ("large", b"l")])
    async with transaction(engine) as connection:
        await store.offer_models(connection, [("small", b"new")])
        offered = await store.offered_models(connection)
        assert [model for model, _ in offered] == [b"l", b"new"]
        assert offered[0][1] > offered[1][1] == 0


async def test_a_secret_is_made_once_and_shared(engine: AsyncEngine):
    async with transaction(engine) as connection:
        assert [await store.secret(connection, "quotes", fresh) for fresh in (b"one", b"two")] == [b"one", b"one"]


# --- dead letters -----------------------------------------------------------------------------------------------------


async def test_pages_of_dead_letters_have_no_gap_and_no_repetition(engine: AsyncEngine):
    async with transaction(engine) as connection:  # in one transaction: all fail in the same microsecond
        letters = [await dead(connection) for _ in range(5)]
        later = await dead(connection)
        await connection.execute(
            sa.update(jobs).where(jobs.c.job_id == later.job_id).values(finish_time=jobs.c.finish_time + timedelta(seconds=1))
        )
        for state in (State.PENDING, State.PROCESSING, State.COMPLETED, State.CANCELLED):
            await in_state(connection, state)
        listed: list[uuid.UUID] = []
        before: tuple[datetime, uuid.UUID] | None = None
        while page := await store.dead_letters(connection, limit=2, before=before):
            listed += [letter.job.job_id for letter in page]
            last = page[-1].job
            assert last.finish_time is not None
            before = (last.finish_time, last.job_id)
    assert listed == [later.job_id, *(job.job_id for job in reversed(letters))]


async def test_dead_letters_are_found_by_their_fingerprint_and_reason(engine: AsyncEngine):
    other = Failure(b"\x08\x0b", "ERROR_REASON_STORE_FAILED", "0" * 16)
    async with transaction(engine) as connection:
        lost, away = await dead(connection), await dead(connection, other)

        async def found(**filters: str) -> list[uuid.UUID]:
            return [letter.job.job_id for letter in await store.dead_letters(connection, limit=9, before=None, **filters)]

        assert await found() == [away.job_id, lost.job_id]
        assert await found(fingerprint=FAILURE.fingerprint) == [lost.job_id]
        assert await found(reason=other.reason) == [away.job_id]
        assert await found(fingerprint=FAILURE.fingerprint, reason=other.reason) == []


async def test_a_dead_letter_says_whether_its_hold_was_released(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await in_state(connection, State.FAILED)
        assert [letter.released for letter in await store.dead_letters(connection, limit=9, before=None)] == [False]
        await settled(connection, job)  # its announcement is still to be done, which says nothing about credits
        assert await store.duties_of(connection, job.job_id, Duty.ANNOUNCE)
        assert [letter.released for letter in await store.dead_letters(connection, limit=9, before=None)] == [True]


async def test_failures_of_a_kind_are_listed_the_oldest_first(engine: AsyncEngine):
    async with transaction(engine) as connection:
        letters = [await dead(connection) for _ in range(3)]
        await dead(connection, replace(FAILURE, fingerprint="0" * 16))
        for age_s, job in zip((1, 3, 2), letters, strict=True):
            failed = sa.func.now() - timedelta(seconds=age_s)
            await connection.execute(sa.update(jobs).where(jobs.c.job_id == job.job_id).values(finish_time=failed))
        found = await store.failed_jobs(connection, FAILURE.fingerprint, 2)
    assert [job.job_id for job in found] == [letters[1].job_id, letters[2].job_id]


# --- retries ----------------------------------------------------------------------------------------------------------


async def test_a_retried_job_is_as_if_just_submitted_but_for_its_history(engine: AsyncEngine):
    async with transaction(engine) as connection:
        fresh = await pending(connection, start_deadline=datetime.now(UTC) + timedelta(hours=1))
        first = await started(connection, fresh)
        assert first is not None
        running = await started(connection, first, takeover=True)
        assert running is not None
        assert await store.request_cancel(connection, running.job_id, OWNER) is not None
        failed = await ended(connection, running, State.FAILED)
        await settled(connection, failed)
        reservation_id = uuid.uuid4()
        await store.add_retry(connection, failed.job_id, reservation_id)
        committed = await store.commit_retry(connection, failed, reservation_id, fallback_s=5)
        assert committed is not None
        job, duties = committed
        assert job == replace(fresh, version=5, retry_count=1, reservation_id=reservation_id, start_deadline=None)
        assert (fresh.hold_id, job.hold_id) == (fresh.job_id, reservation_id)
        assert [row.duty for row in duties] == [Duty.ANNOUNCE]
        assert await rows(connection, retries) == 0


async def test_a_job_has_one_retry_under_way(engine: AsyncEngine):
    first, second = uuid.uuid4(), uuid.uuid4()
    async with transaction(engine) as connection:
        job = await dead(connection)

    async def note(reservation_id: uuid.UUID) -> Retry | None:
        async with transaction(engine) as connection:
            return await store.add_retry(connection, job.job_id, reservation_id)

    noted = await asyncio.gather(note(first), note(second))
    assert noted[0] == noted[1]
    assert noted[0] in (Retry(first, False), Retry(second, False))
    assert await note(uuid.uuid4()) == noted[0]
    async with transaction(engine) as connection:
        await store.delete_retry(connection, job.job_id, uuid.uuid4())  # of somebody else's retry
        assert await rows(connection, retries) == 1
        assert noted[0] is not None
        await store.delete_retry(connection, job.job_id, noted[0].reservation_id)
        assert await rows(connection, retries) == 0


async def test_of_many_that_commit_a_retry_at_once_one_does(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await dead(connection)
        reservation_id = uuid.uuid4()
        await store.add_retry(connection, job.job_id, reservation_id)

    async def commit() -> bool:
        async with transaction(engine) as connection:
            return await store.commit_retry(connection, job, reservation_id, fallback_s=0) is not None

    assert sum(await asyncio.gather(*[commit() for _ in range(5)])) == 1
    async with transaction(engine) as connection:
        back = await store.get_job(connection, job.job_id)
        assert back is not None
        assert (back.state, back.version, back.retry_count) == (State.PENDING, job.version + 1, 1)


async def test_an_abandoned_retry_does_not_come_to_be(engine: AsyncEngine):
    reservation_id = uuid.uuid4()
    async with transaction(engine) as connection:
        job = await dead(connection)
        await store.add_retry(connection, job.job_id, reservation_id)
    async with transaction(engine) as connection:
        assert await store.abandon_retries(connection, older_than_s=60, limit=9) == []
        expected = [(job.job_id, reservation_id)]
        assert await store.abandon_retries(connection, older_than_s=0, limit=9) == expected
        assert await store.abandon_retries(connection, older_than_s=0, limit=9) == expected  # until its hold is released
        assert await store.commit_retry(connection, job, reservation_id, fallback_s=0) is None
        assert await store.add_retry(connection, job.job_id, uuid.uuid4()) == Retry(reservation_id, True)
        await store.delete_retry(connection, job.job_id, reservation_id)
        assert await store.commit_retry(connection, job, reservation_id, fallback_s=0) is None
        assert await store.get_job(connection, job.job_id) == job
        assert await retried(connection, job) is not None  # a new one may


async def test_a_job_is_not_retried_while_its_last_hold_is_not_settled(engine: AsyncEngine):
    reservation_id = uuid.uuid4()
    async with transaction(engine) as connection:
        job = await in_state(connection, State.FAILED)
        await store.add_retry(connection, job.job_id, reservation_id)
        assert await store.commit_retry(connection, job, reservation_id, fallback_s=0) is None
        assert await rows(connection, retries) == 1
        await settled(connection, job)
        assert await store.commit_retry(connection, job, reservation_id, fallback_s=0) is not None


async def test_a_retry_of_an_earlier_failure_comes_too_late(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await dead(connection)
        back = await retried(connection, job)
        assert back is not None
        running = await started(connection, back)
        assert running is not None
        again = await ended(connection, running, State.FAILED)
        await settled(connection, again)
        assert await retried(connection, job) is None
        assert await store.get_job(connection, job.job_id) == again


@pytest.mark.parametrize("failed", [True, False])
async def test_putting_back_never_revives_a_failed_job(engine: AsyncEngine, failed: bool):
    async with transaction(engine) as connection:
        job = await dead(connection)
        # A worker that knows the job as it is now, or as it was when it ran.
        for known in (job, replace(job, state=State.PROCESSING)):
            assert await store.requeue(connection, known, delay_s=0, failed=failed, fallback_s=0) is None
        assert await store.get_job(connection, job.job_id) == job


async def test_a_retried_job_waits_for_no_start_deadline(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await dead(connection, start_deadline=datetime.now(UTC) + timedelta(hours=1))
        await connection.execute(sa.update(jobs).values(start_deadline=sa.func.now() - timedelta(seconds=1)))
        back = await retried(connection, job)
        assert back is not None
        assert await store.late_jobs(connection, 9) == []
        assert await started(connection, back) is not None


# --- deletion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
async def test_only_an_ended_job_that_is_announced_and_settled_is_deleted(engine: AsyncEngine, state: State):
    async with transaction(engine) as connection:
        job = await in_state(connection, state)
        assert await store.delete_job(connection, job) is None
        await settled(connection, job)
        assert await store.delete_job(connection, job) is None  # its end is still to be announced
        await fulfilled(connection, job)
        deleted = await store.delete_job(connection, job)
        assert (deleted is not None) is state.terminal
        assert (await store.get_job(connection, job.job_id) is None) is state.terminal
        assert await rows(connection, deletions) == int(state.terminal)


async def test_a_job_is_deleted_as_it_is_known_and_not_under_a_retry(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await dead(connection)
        await fulfilled(connection, job)
        assert await store.delete_job(connection, replace(job, version=job.version - 1)) is None
        reservation_id = uuid.uuid4()
        await store.add_retry(connection, job.job_id, reservation_id)
        assert await store.delete_job(connection, job) is None
        await store.delete_retry(connection, job.job_id, reservation_id)
        assert await store.delete_job(connection, job) is not None
        assert await store.delete_job(connection, job) is None
        assert await rows(connection, deletions) == 1


async def test_media_of_a_deleted_job_are_noted_until_they_are_gone(engine: AsyncEngine):
    async with transaction(engine) as connection:
        job = await dead(connection)
        await fulfilled(connection, job)
        assert await store.delete_job(connection, job) is not None
        assert await store.media_owners(connection, [job.job_id]) == {}
    async with transaction(engine) as connection:
        assert await store.unfinished_deletions(connection, older_than_s=60, limit=9) == []
        assert await store.unfinished_deletions(connection, older_than_s=0, limit=9) == [(job.job_id, OWNER)]
        await store.deletion_done(connection, job.job_id)
        assert await store.unfinished_deletions(connection, older_than_s=0, limit=9) == []


async def test_jobs_that_ended_long_ago_are_found_the_oldest_first(engine: AsyncEngine):
    async with transaction(engine) as connection:
        ages_s = {State.COMPLETED: 200, State.FAILED: 400, State.CANCELLED: 300}
        old = {state: await in_state(connection, state) for state in ages_s}
        for state, age_s in ages_s.items():
            finish = sa.func.now() - timedelta(seconds=age_s)
            await connection.execute(sa.update(jobs).where(jobs.c.job_id == old[state].job_id).values(finish_time=finish))
        for state in State:
            await in_state(connection, state)
        found = await store.ended_jobs(connection, older_than_s=100, limit=9)
        assert [job.state for job in found] == [State.FAILED, State.CANCELLED, State.COMPLETED]
        assert len(await store.ended_jobs(connection, older_than_s=100, limit=1)) == 1


async def test_old_requests_are_forgotten_once_their_jobs_are_gone(engine: AsyncEngine):
    async with transaction(engine) as connection:
        gone, there = await dead(connection), await dead(connection)
        await fulfilled(connection, gone)
        assert await store.delete_job(connection, gone) is not None
        unfinished = uuid.uuid4()  # its job may still come to be
        await note(connection, new_job(OWNER), unfinished)
        assert await store.delete_old_requests(connection, older_than_s=60, limit=9) == 0
        await connection.execute(sa.update(requests).values(create_time=sa.func.now() - timedelta(seconds=61)))
        assert await store.delete_old_requests(connection, older_than_s=60, limit=0) == 0
        assert await store.delete_old_requests(connection, older_than_s=60, limit=9) == 1
        assert await rows(connection, requests) == 2
        assert await find(connection, unfinished) is not None
        assert (await connection.execute(sa.select(requests.c.job_id).where(requests.c.intent.is_(None)))).scalar_one() == there.job_id
