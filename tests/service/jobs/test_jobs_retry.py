"""Failed jobs and their way back: one new hold a retry, whoever asks how often, and whatever breaks in between. Batches; waiting."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from genmesh.jobs.v1 import jobs_pb2
from jobs_service import jobs as jobs_module
from jobs_service import offers, relay, store
from jobs_service.jobs import Jobs
from jobs_service.ledger import Ledger
from jobs_service.lifecycle import Failure, Job, Priority, State, failure
from jobs_service.offers import OTHER_LEVEL_SHARE, Offers
from jobs_service.queue_stats import queue_stats
from jobs_service.servicer import JobsAdminServicer
from jobs_service.store import Duty
from jobs_service.tables import jobs as jobs_table
from jobs_service.tables import models, outbox, requests, retries
from servicekit.database import transaction
from servicekit.errors import MeshError, Reason
from tests.service.jobs.world import POOL, SPEC, World, eventually, refused, running, within

Balance = Callable[[uuid.UUID], Awaitable[tuple[int, int]]]
Fund = Callable[[uuid.UUID, int], Awaitable[None]]
PLAN = "PLAN_FREE"
LOST = MeshError(grpc.StatusCode.ABORTED, Reason.ERROR_REASON_WORKER_LOST, "its worker was lost 3 times")
FAILURE = failure(LOST, "small")
CONTEXT: Any = None
"""The servicers make no use of it."""


class CrashError(Exception):
    """The process dies here."""


async def start(world: World, job_id: uuid.UUID) -> Job:
    async with transaction(world.engine) as connection:
        job = await store.start_attempt(connection, job_id, worker_id="w", entry="s/1-0", takeover=False)
    assert job is not None
    return job


async def end(world: World, job: Job, state: State, *, settle: bool = True, failure: Failure = FAILURE) -> Job:
    """A running job ended, and its duties done, as a dispatcher does it; or only committed."""
    async with transaction(world.engine) as connection:
        ended = await store.finish(connection, job, state, fallback_s=60, steps_done=10, failure=failure if state is State.FAILED else None)
    assert ended is not None
    if settle:
        await world.delivery.now(*ended)
    return ended[0]


async def failed(world: World, *, settle: bool = True, failure: Failure = FAILURE, **changes: Any) -> Job:
    """A job of the world's owner that failed for good."""
    job = await world.submit(**changes)
    return await end(world, await start(world, job.job_id), State.FAILED, settle=settle, failure=failure)


@pytest_asyncio.fixture(autouse=True)
async def books(credits_database: str) -> AsyncIterator[None]:
    """After every test the ledger's own audit finds nothing."""
    yield
    engine = create_async_engine(credits_database)
    async with engine.connect() as connection:
        found = (await connection.execute(sa.text("SELECT * FROM credits.discrepancies"))).all()
    await engine.dispose()
    assert found == []


@pytest.fixture
def quick_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SWEEP_INTERVAL_S", "ABANDON_AFTER_S"):
        monkeypatch.setattr(relay, name, 0.02)


@asynccontextmanager
async def swept(world: World) -> AsyncGenerator[None]:
    async with running(world.relay().sweep()):
        yield


async def no_note(world: World) -> bool:
    return await world.count(retries) == 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[uuid.UUID]]:
    """Holds and releases that the ledger was asked for, by id."""
    asked: dict[str, list[uuid.UUID]] = {"reserve": [], "settle": []}
    reserve, settle = Ledger.reserve, Ledger.settle

    async def noted_reserve(ledger: Ledger, job: Job) -> None:
        asked["reserve"].append(job.hold_id)
        await reserve(ledger, job)

    async def noted_settle(ledger: Ledger, job: Job) -> None:
        asked["settle"].append(job.hold_id)
        await settle(ledger, job)

    monkeypatch.setattr(Ledger, "reserve", noted_reserve)
    monkeypatch.setattr(Ledger, "settle", noted_settle)
    return asked


# --- one retry --------------------------------------------------------------------------------------------------------


async def test_a_retried_job_is_held_for_anew_runs_and_is_charged_once(world: World, balance: Balance):
    job = await failed(world)
    assert await balance(world.owner) == (1000, 0)
    back = await world.dead_letters().retry(job.job_id, world.owner)
    assert (back.state, back.attempt, back.failures, back.retry_count) == (State.PENDING, 0, 0, 1)
    assert back.hold_id not in (job.job_id, job.hold_id)
    assert await balance(world.owner) == (900, 100)
    assert await no_note(world)
    (entry,) = await world.worker_queue("w").take([POOL])
    assert entry.job_id == job.job_id
    again = await start(world, job.job_id)
    assert again.attempt == 1
    done = await end(world, again, State.COMPLETED)
    await world.delivery.fulfil(done, Duty.SETTLE)
    assert await balance(world.owner) == (900, 0)
    assert [event.is_state for event in await world.events(job.job_id)] == [True] * 3  # failed, pending again, completed


async def test_a_job_may_fail_and_be_retried_again_and_again(world: World, balance: Balance):
    job = await failed(world)
    holds = {job.hold_id}
    for round_ in (1, 2):
        back = await world.dead_letters().retry(job.job_id)
        assert (back.retry_count, await balance(world.owner)) == (round_, (900, 100))
        holds.add(back.hold_id)
        await end(world, await start(world, job.job_id), State.FAILED)
        assert await balance(world.owner) == (1000, 0)
    assert len(holds) == 3


async def test_without_credits_a_retry_is_refused_and_leaves_nothing(world: World, balance: Balance, fund: Fund):
    job = await failed(world)
    hold = await world.submit(estimated_cost=950)
    error = await refused(world.dead_letters().retry(job.job_id, world.owner))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.ERROR_REASON_INSUFFICIENT_CREDITS)
    assert await balance(world.owner) == (50, 950)
    assert await world.job(job.job_id) == job
    assert await no_note(world)
    assert hold.state is State.PENDING
    await fund(world.owner, 50)
    assert (await world.dead_letters().retry(job.job_id, world.owner)).state is State.PENDING
    assert await balance(world.owner) == (0, 1050)


async def test_retries_at_once_hold_once_and_are_all_answered(world: World, balance: Balance, calls: dict[str, list[uuid.UUID]]):
    job = await failed(world)
    letters = world.dead_letters()
    answers = await asyncio.gather(*[letters.retry(job.job_id, world.owner) for _ in range(4)])
    assert {(answer.version, answer.reservation_id) for answer in answers} == {(job.version + 1, answers[0].reservation_id)}
    assert len(set(calls["reserve"]) - {job.job_id}) == 1
    assert await balance(world.owner) == (900, 100)
    assert await no_note(world)
    assert len(await world.worker_queue("w").take([POOL], count=4)) == 1
    again = await letters.retry(job.job_id, world.owner)
    assert again == await world.job(job.job_id)
    await start(world, job.job_id)
    assert (await letters.retry(job.job_id, world.owner)).state is State.PROCESSING
    assert await balance(world.owner) == (900, 100)


async def test_only_a_failed_job_of_their_own_is_retried(world: World):
    letters = world.dead_letters()
    job = await failed(world)
    for owner, job_id in ((uuid.uuid4(), job.job_id), (world.owner, uuid.uuid4())):
        assert (await refused(letters.retry(job_id, owner))).code is grpc.StatusCode.NOT_FOUND
    waits = await world.submit()
    done = await end(world, await start(world, (await world.submit()).job_id), State.COMPLETED)
    stopped = await end(world, await start(world, (await world.submit()).job_id), State.CANCELLED)
    for other, state in ((waits, "STATE_PENDING"), (done, "STATE_COMPLETED"), (stopped, "STATE_CANCELLED")):
        error = await refused(letters.retry(other.job_id, world.owner))
        assert (error.reason, error.metadata) == (Reason.ERROR_REASON_JOB_NOT_FAILED, {"state": state})
    assert await no_note(world)


async def test_a_retry_that_ended_is_no_answer_to_a_repeat(world: World):
    job = await failed(world)
    await world.dead_letters().retry(job.job_id)
    await end(world, await start(world, job.job_id), State.COMPLETED)
    assert (await refused(world.dead_letters().retry(job.job_id))).reason == Reason.ERROR_REASON_JOB_NOT_FAILED


# --- what breaks in between -------------------------------------------------------------------------------------------


async def test_credits_away_means_try_again_and_the_repeat_goes_on(world: World, no_ledger: Ledger, balance: Balance):
    job = await failed(world)
    for _ in range(2):
        error = await refused(world.dead_letters(ledger=no_ledger).retry(job.job_id))
        assert error.code is grpc.StatusCode.UNAVAILABLE
    async with transaction(world.engine) as connection:
        noted = await store.add_retry(connection, job.job_id, uuid.uuid4())
    assert noted is not None
    back = await world.dead_letters().retry(job.job_id)
    assert back.reservation_id == noted.reservation_id
    assert await balance(world.owner) == (900, 100)


async def test_a_crash_between_hold_and_commit_gives_the_credits_back(
    world: World, balance: Balance, monkeypatch: pytest.MonkeyPatch, quick_relay: None
):
    async def crash(*_: object, **__: object) -> None:
        raise CrashError

    job = await failed(world)
    with monkeypatch.context() as patch:
        patch.setattr(store, "commit_retry", crash)
        with pytest.raises(CrashError):
            await world.dead_letters().retry(job.job_id)
    assert await balance(world.owner) == (900, 100)
    async with swept(world):
        await eventually(lambda: no_note(world))
    assert await balance(world.owner) == (1000, 0)
    assert await world.job(job.job_id) == job
    await world.dead_letters().retry(job.job_id)
    assert await balance(world.owner) == (900, 100)


async def test_a_retry_that_is_being_undone_has_to_wait(world: World):
    job = await failed(world)
    async with transaction(world.engine) as connection:
        await store.add_retry(connection, job.job_id, uuid.uuid4())
    async with transaction(world.engine) as connection:
        assert len(await store.abandon_retries(connection, older_than_s=0, limit=9)) == 1
    error = await refused(world.dead_letters().retry(job.job_id))
    assert (error.code, error.retry_after_s) == (grpc.StatusCode.UNAVAILABLE, 1.0)


async def test_a_retry_that_comes_after_it_was_undone_leaves_no_hold(world: World, balance: Balance, monkeypatch: pytest.MonkeyPatch):
    job = await failed(world)
    reserve = Ledger.reserve

    async def slow(ledger: Ledger, job: Job) -> None:
        # The relay gives the retry up, releases what is not there yet, and forgets it.
        async with transaction(world.engine) as connection:
            for job_id, abandoned in await store.abandon_retries(connection, older_than_s=0, limit=9):
                await ledger.release_unused(abandoned)
                await store.delete_retry(connection, job_id, abandoned)
        await reserve(ledger, job)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "reserve", slow)
        error = await refused(world.dead_letters().retry(job.job_id))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert await balance(world.owner) == (1000, 0)
    assert await world.job(job.job_id) == job


async def test_a_failed_job_is_retried_at_once_and_its_old_hold_released_once(
    world: World, balance: Balance, calls: dict[str, list[uuid.UUID]]
):
    job = await failed(world, settle=False)
    assert await balance(world.owner) == (900, 100)
    back = await world.dead_letters().retry(job.job_id)
    assert await balance(world.owner) == (900, 100)  # the first hold went, the second came
    assert calls["settle"] == [job.job_id]
    async with transaction(world.engine) as connection:
        assert await store.duties_of(connection, job.job_id, Duty.SETTLE) == []
        late = await store.add_duty(connection, job.job_id, Duty.SETTLE, 60)
    await world.delivery.now(back, [late])  # a relay that took the duty of the first end, and comes late
    assert calls["settle"] == [job.job_id]
    assert await balance(world.owner) == (900, 100)


# --- many of a kind ---------------------------------------------------------------------------------------------------


async def test_jobs_that_failed_alike_are_retried_the_oldest_first(world: World, balance: Balance):
    letters = [await failed(world) for _ in range(3)]
    other = await failed(world, failure=failure(LOST, "large"))
    for age_s, job in zip((1, 3, 2), letters, strict=True):
        async with transaction(world.engine) as connection:
            early = sa.func.now() - timedelta(seconds=age_s)
            await connection.execute(sa.update(jobs_table).where(jobs_table.c.job_id == job.job_id).values(finish_time=early))
    outcomes = await world.dead_letters().requeue(FAILURE.fingerprint, limit=2)
    assert [(outcome.job_id, outcome.refusal) for outcome in outcomes] == [(letters[1].job_id, None), (letters[2].job_id, None)]
    assert [(await world.job(job.job_id)).state for job in (letters[0], other)] == [State.FAILED] * 2
    assert await balance(world.owner) == (800, 200)


async def test_what_is_refused_stays_as_it_is_and_says_why(world: World, balance: Balance):
    dear = await failed(world, estimated_cost=900)
    cheap = await failed(world, estimated_cost=300)
    await world.submit(estimated_cost=500)
    outcomes = {outcome.job_id: outcome.refusal for outcome in await world.dead_letters().requeue(FAILURE.fingerprint, limit=9)}
    refusal = outcomes[dear.job_id]
    assert refusal is not None
    assert refusal.reason == Reason.ERROR_REASON_INSUFFICIENT_CREDITS
    assert outcomes[cheap.job_id] is None
    assert await balance(world.owner) == (200, 800)


async def test_operators_page_through_dead_letters_and_put_them_back(world: World):
    servicer = JobsAdminServicer(world.dead_letters(), queue_stats(world.engine))
    letters = [str((await failed(world, estimated_cost=10)).job_id) for _ in range(5)]
    same = sa.update(jobs_table).values(finish_time=sa.func.now())
    async with transaction(world.engine) as connection:
        await connection.execute(same)  # all in the same microsecond
    listed: list[str] = []
    token = ""
    while True:
        request = jobs_pb2.ListDeadLettersRequest(page_size=2, page_token=token, fingerprint=FAILURE.fingerprint)
        page = await servicer.ListDeadLetters(request, CONTEXT)
        listed += [letter.job_id for letter in page.dead_letters]
        assert all(letter.hold == jobs_pb2.DeadLetter.HOLD_RELEASED for letter in page.dead_letters)
        token = page.next_page_token or ""
        if not token:
            break
        other = jobs_pb2.ListDeadLettersRequest(page_size=2, page_token=token)
        assert (await refused(servicer.ListDeadLetters(other, CONTEXT))).violations[0][0] == "page_token"
    assert listed == letters[::-1]

    one = await servicer.RequeueDeadLetter(jobs_pb2.RequeueDeadLetterRequest(job_id=letters[0]), CONTEXT)
    assert list(one.job_ids) == [letters[0]]
    await world.submit(estimated_cost=960)
    rest = await servicer.RequeueDeadLetter(jobs_pb2.RequeueDeadLetterRequest(fingerprint=FAILURE.fingerprint, max_count=10), CONTEXT)
    assert len(rest.job_ids) == 3  # 30 of 1000 are left
    assert {*rest.job_ids, *(refusal.job_id for refusal in rest.refusals)} == set(letters[1:])
    assert len(rest.refusals) == 1
    assert "credits" in rest.refusals[0].error.message.lower()


async def test_operators_see_what_waits_runs_and_works(world: World):
    servicer = JobsAdminServicer(world.dead_letters(), queue_stats(world.engine))
    assert list((await servicer.GetQueueStats(jobs_pb2.GetQueueStatsRequest(), CONTEXT)).pools) == []
    await world.submit(estimated_cost=1)
    await start(world, (await world.submit(estimated_cost=1, priority=Priority.PRO)).job_id)
    async with transaction(world.engine) as connection:
        await store.offer_worker(connection, "w1", pools=[POOL, "films"], slot_count=2, loaded_models=["small"])
    films, pictures = (await servicer.GetQueueStats(jobs_pb2.GetQueueStatsRequest(), CONTEXT)).pools
    assert (films.pool, films.running_count, [worker.worker_id for worker in films.workers]) == ("films", 0, ["w1"])
    assert [level.priority for level in pictures.levels] == [jobs_pb2.PRIORITY_PRO, jobs_pb2.PRIORITY_FREE]
    assert [(level.waiting_count, level.owner_count, level.delayed_count) for level in pictures.levels] == [(0, 0, 0), (1, 1, 0)]
    assert (pictures.running_count, pictures.workers[0].slot_count, list(pictures.workers[0].loaded_models)) == (1, 2, ["small"])


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def jobs(world: World) -> Jobs:
    await world.offer()
    return world.jobs()


def asked(steps: int = 10, **changes: Any) -> jobs_pb2.CreateJobRequest:
    spec = jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger", seed=1, steps=steps))
    fields: dict[str, Any] = {"request_id": str(uuid.uuid4()), "spec": spec} | changes
    return jobs_pb2.CreateJobRequest(**fields)


async def test_a_batch_is_accepted_as_a_whole_and_again(world: World, jobs: Jobs, balance: Balance):
    batch = [asked(10), asked(20), asked(30)]
    accepted = await jobs.create_batch(world.owner, PLAN, batch)
    assert [job.estimated_cost_millicredits for job in accepted] == [100, 200, 300]
    assert [job.queue_position for job in accepted] == [1, 2, 3]
    assert await jobs.create_batch(world.owner, PLAN, batch) == accepted
    assert await balance(world.owner) == (400, 600)
    assert await world.count(jobs_table) == 3
    assert await world.count(outbox) == 0
    worker, taken = world.worker_queue("w"), set[str]()
    while len(taken) < len(batch):
        taken |= {str(entry.job_id) for entry in await within(worker.take([POOL], count=9))}
    assert taken == {job.job_id for job in accepted}


async def test_a_batch_may_have_a_job_that_is_there_already(world: World, jobs: Jobs, balance: Balance):
    first, second = asked(10), asked(20)
    known = await jobs.create(world.owner, PLAN, first)
    answers = await jobs.create_batch(world.owner, PLAN, [second, first])
    assert (answers[1].job_id, answers[0].estimated_cost_millicredits) == (known.job_id, 200)
    assert await balance(world.owner) == (700, 300)


async def test_an_accepted_batch_is_answered_also_after_its_deadline(world: World, jobs: Jobs, monkeypatch: pytest.MonkeyPatch):
    request = asked(10)
    request.start_deadline.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    accepted = await jobs.create_batch(world.owner, PLAN, [request])

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Later":
            return cls.fromtimestamp(time.time() + 7200, tz)

    monkeypatch.setattr(jobs_module, "datetime", Later)
    assert [job.job_id for job in await jobs.create_batch(world.owner, PLAN, [request])] == [accepted[0].job_id]


async def test_a_batch_with_one_invalid_job_leaves_nothing(world: World, jobs: Jobs, balance: Balance):
    error = await refused(jobs.create_batch(world.owner, PLAN, [asked(10), asked(51), asked(10)]))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations[0][0].startswith("requests[1].spec")
    assert [await world.count(table) for table in (jobs_table, requests, outbox)] == [0, 0, 0]
    assert await balance(world.owner) == (1000, 0)


async def test_a_batch_that_cannot_be_paid_as_a_whole_is_undone(world: World, jobs: Jobs, balance: Balance):
    batch = [asked(40), asked(50), asked(40)]  # 400, 500, 400 of 1000
    error = await refused(jobs.create_batch(world.owner, PLAN, batch))
    assert error.reason == Reason.ERROR_REASON_INSUFFICIENT_CREDITS
    assert [await world.count(table) for table in (jobs_table, requests, outbox)] == [0, 0, 0]
    assert await balance(world.owner) == (1000, 0)
    assert len(await jobs.create_batch(world.owner, PLAN, batch[:2])) == 2  # its ids were used for nothing
    assert await balance(world.owner) == (100, 900)


async def test_a_refused_batch_leaves_jobs_alone_that_were_there_before(world: World, jobs: Jobs, balance: Balance):
    known = asked(10)
    job = await jobs.create(world.owner, PLAN, known)
    error = await refused(jobs.create_batch(world.owner, PLAN, [asked(30), asked(20, request_id=known.request_id)]))
    assert error.reason == Reason.ERROR_REASON_REQUEST_ID_REUSED
    await refused(jobs.create_batch(world.owner, PLAN, [known, asked(50), asked(50)]))
    assert (await jobs.get(world.owner, uuid.UUID(job.job_id))).state == jobs_pb2.STATE_PENDING
    assert await balance(world.owner) == (900, 100)
    assert await world.count(requests) == 1


# --- what a job waits for ---------------------------------------------------------------------------------------------


async def test_a_job_waits_for_a_worker_that_fell_silent(world: World, jobs: Jobs, monkeypatch: pytest.MonkeyPatch):
    job_id = uuid.UUID((await jobs.create(world.owner, PLAN, asked())).job_id)
    monkeypatch.setattr(offers, "MAX_AGE_S", -1.0)
    assert (await jobs.get(world.owner, job_id)).waiting.reason == jobs_pb2.Waiting.REASON_IN_QUEUE
    async with transaction(world.engine) as connection:
        await connection.execute(sa.update(models).values(seen_time=sa.func.now() - timedelta(seconds=offers.WORKER_SILENT_S + 1)))
    shown = await jobs.get(world.owner, job_id)
    assert (shown.waiting.reason, shown.waiting.queue_position) == (jobs_pb2.Waiting.REASON_NO_WORKER, 1)
    later = await jobs.create(world.owner, PLAN, asked())  # accepted all the same
    assert later.waiting.reason == jobs_pb2.Waiting.REASON_NO_WORKER
    await world.offer()
    assert (await jobs.get(world.owner, job_id)).waiting.reason == jobs_pb2.Waiting.REASON_IN_QUEUE


async def test_a_job_waits_for_other_jobs_of_its_owner(world: World, jobs: Jobs):
    limit = world.settings.owner_limits[Priority.FREE]
    for _ in range(limit):
        await start(world, (await world.submit(estimated_cost=1)).job_id)
    shown = await jobs.create(world.owner, PLAN, asked())
    shown = await jobs.get(world.owner, uuid.UUID(shown.job_id))
    assert shown.waiting.reason == jobs_pb2.Waiting.REASON_OWNER_LIMIT
    assert (shown.waiting.owner_running, shown.waiting.owner_limit) == (limit, limit)


async def test_a_job_waits_for_its_next_attempt(world: World, jobs: Jobs):
    job = await start(world, (await world.submit()).job_id)
    async with transaction(world.engine) as connection:
        back = await store.requeue(connection, job, delay_s=60, failed=True, fallback_s=60)
    assert back is not None
    shown = await jobs.get(world.owner, job.job_id)
    assert shown.waiting.reason == jobs_pb2.Waiting.REASON_RETRY
    assert shown.waiting.retry_time.ToDatetime() > shown.create_time.ToDatetime() + timedelta(seconds=59)


async def test_an_estimate_reckons_with_jobs_before_it_and_workers(world: World, jobs: Jobs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(offers, "MAX_AGE_S", -1.0)

    async def estimated() -> tuple[int, float]:
        found = await jobs.estimate(world.owner, PLAN, SPEC)
        return found.queue_position, found.forecast.p50_s

    place, alone_s = await estimated()
    assert (place, alone_s) == (1, pytest.approx(10 * offers.FIRST_GUESS.p50_s))
    await world.submit(estimated_cost=1)
    await world.submit(estimated_cost=1)
    assert await estimated() == (3, pytest.approx(3 * alone_s))
    async with transaction(world.engine) as connection:
        await store.offer_worker(connection, "w1", pools=[POOL], slot_count=1, loaded_models=[])
    assert await estimated() == (3, pytest.approx(2 * alone_s))
    await world.submit(estimated_cost=1, priority=Priority.PRO)
    assert OTHER_LEVEL_SHARE[Priority.FREE] >= 1
    assert await estimated() == (3, pytest.approx(2.5 * alone_s))  # one more of the other level goes before it
    async with transaction(world.engine) as connection:
        await store.withdraw_worker(connection, "w1")
    assert await estimated() == (3, pytest.approx(4 * alone_s))


async def test_calls_at_once_read_what_is_offered_once(world: World, monkeypatch: pytest.MonkeyPatch):
    await world.offer()
    read, reads = store.offered_models, 0

    async def counted(connection: AsyncConnection) -> list[tuple[bytes, float]]:
        nonlocal reads
        reads += 1
        return await read(connection)

    monkeypatch.setattr(store, "offered_models", counted)
    offered = Offers(world.engine)
    await asyncio.gather(*(offered.refresh() for _ in range(20)))
    assert (reads, list(offered.models)) == (1, ["small"])


async def test_what_is_offered_is_read_again_only_when_it_is_old(world: World, monkeypatch: pytest.MonkeyPatch):
    read = Offers(world.engine)
    await world.offer()
    monkeypatch.setattr(offers, "MAX_AGE_S", 3600.0)
    await read.refresh()
    async with transaction(world.engine) as connection:
        await store.offer_worker(connection, "w1", pools=[POOL], slot_count=2, loaded_models=[])
    await read.refresh()
    assert [worker.worker_id for worker in read.workers] == ["worker-1"]
    monkeypatch.setattr(offers, "MAX_AGE_S", -1.0)
    await read.refresh()
    assert [worker.worker_id for worker in read.workers] == ["w1", "worker-1"]
