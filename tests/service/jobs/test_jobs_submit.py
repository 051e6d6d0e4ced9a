"""Submitting, looking, cancelling: idempotency, and crashes at every step between hold, commit and announcement."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from genmesh.jobs.v1 import jobs_pb2
from jobs_service import relay, store
from jobs_service.jobs import Jobs
from jobs_service.ledger import Ledger
from jobs_service.lifecycle import Job, State
from jobs_service.store import Duty
from jobs_service.tables import jobs as jobs_table
from jobs_service.tables import outbox, requests
from servicekit.database import transaction
from servicekit.errors import Reason
from tests.service.jobs.world import POOL, SPEC, World, eventually, refused, request, running

Balance = Callable[[uuid.UUID], Awaitable[tuple[int, int]]]
PLAN = "PLAN_FREE"


@pytest.fixture
async def jobs(world: World) -> Jobs:
    await world.offer()
    return world.jobs()


async def test_a_job_is_held_for_committed_announced_and_queued(world: World, jobs: Jobs, balance: Balance):
    job = await jobs.create(world.owner, PLAN, request())
    assert (job.state, job.owner_id, job.queue_position) == (jobs_pb2.STATE_PENDING, str(world.owner), 1)
    assert (job.estimated_cost_millicredits, job.spec.image.model) == (100, "small")
    assert await balance(world.owner) == (900, 100)
    (entry,) = await world.worker_queue("w").take([POOL])
    assert str(entry.job_id) == job.job_id
    assert [event.is_state for event in await world.events(job.job_id)] == [True]
    assert await world.count(outbox) == 0
    shown = await jobs.get(world.owner, uuid.UUID(job.job_id))
    assert shown == job
    assert shown.waiting.reason == jobs_pb2.Waiting.REASON_IN_QUEUE


async def test_the_same_request_is_the_same_job(world: World, jobs: Jobs, balance: Balance):
    body = request()
    answers = await asyncio.gather(*[jobs.create(world.owner, PLAN, body) for _ in range(5)])
    answers.append(await jobs.create(world.owner, PLAN, body))
    assert len({job.job_id for job in answers}) == 1
    assert await world.count(jobs_table) == 1
    assert await balance(world.owner) == (900, 100)
    assert len(await world.events(answers[0].job_id)) == 1


async def test_the_same_request_id_with_other_content_is_refused(world: World, jobs: Jobs):
    body = request()
    await jobs.create(world.owner, PLAN, body)
    other = request(request_id=body.request_id, spec=jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a lion")))
    error = await refused(jobs.create(world.owner, PLAN, other))
    assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, Reason.ERROR_REASON_REQUEST_ID_REUSED)


async def test_a_job_nobody_can_pay_leaves_nothing(world: World, jobs: Jobs, balance: Balance):
    body = request(spec=jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger", steps=50, image_count=4)))
    error = await refused(jobs.create(world.owner, PLAN, body))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.ERROR_REASON_INSUFFICIENT_CREDITS)
    assert [await world.count(table) for table in (jobs_table, requests, outbox)] == [0, 0, 0]
    assert await balance(world.owner) == (1000, 0)


async def test_a_quote_keeps_its_price_and_a_wrong_one_is_refused(world: World, jobs: Jobs):
    estimate = await jobs.estimate(world.owner, PLAN, SPEC)
    assert (estimate.quote.cost_millicredits, estimate.queue_position) == (100, 1)
    assert 0 < estimate.forecast.p50_s <= estimate.forecast.p90_s
    job = await jobs.create(world.owner, PLAN, request(quote_id=estimate.quote_id))
    assert job.estimated_cost_millicredits == 100
    error = await refused(jobs.create(uuid.uuid4(), PLAN, request(quote_id=estimate.quote_id)))
    assert error.reason == Reason.ERROR_REASON_QUOTE_INVALID


async def test_a_deadline_in_the_past_is_refused_before_any_hold(world: World, jobs: Jobs, balance: Balance):
    body = request()
    body.start_deadline.FromSeconds(1)
    error = await refused(jobs.create(world.owner, PLAN, body))
    assert error.violations[0][0] == "start_deadline"
    body.start_deadline.seconds = 2**60
    error = await refused(jobs.create(world.owner, PLAN, body))
    assert error.violations[0][0] == "start_deadline"
    assert await balance(world.owner) == (1000, 0)


async def test_credits_away_means_try_again_and_the_repeat_goes_on_with_the_same_job(
    world: World, jobs: Jobs, no_ledger: Ledger, balance: Balance
):
    body = request(spec=jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger")))  # no seed: one is drawn
    error = await refused(world.jobs(ledger=no_ledger).create(world.owner, PLAN, body))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    async with transaction(world.engine) as connection:
        (noted,) = (await store.find_requests(connection, world.owner, [uuid.UUID(body.request_id)])).values()
    job = await jobs.create(world.owner, PLAN, body)
    assert job.job_id == str(noted.job_id)
    assert await balance(world.owner) == (900, 100)


@pytest.fixture
def quick_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OUTBOX_INTERVAL_S", "SWEEP_INTERVAL_S", "POSITIONS_INTERVAL_S", "ABANDON_AFTER_S"):
        monkeypatch.setattr(relay, name, 0.02)


class CrashError(Exception):
    """The process dies here."""


async def test_a_crash_between_hold_and_commit_gives_the_credits_back(
    world: World, jobs: Jobs, balance: Balance, monkeypatch: pytest.MonkeyPatch, quick_relay: None
):
    async def crash(*_: object, **__: object) -> None:
        raise CrashError

    body = request()
    with monkeypatch.context() as patch:
        patch.setattr(store, "commit_job", crash)
        with pytest.raises(CrashError):
            await jobs.create(world.owner, PLAN, body)
    assert await balance(world.owner) == (900, 100)
    async with running(world.relay().sweep()):
        await eventually(lambda: _is(balance, world.owner, (1000, 0)))
        await eventually(lambda: _empty(world))
    job = await jobs.create(world.owner, PLAN, body)  # the client tries again, as if nothing had been
    assert job.state == jobs_pb2.STATE_PENDING
    assert await balance(world.owner) == (900, 100)


async def _is(balance: Balance, owner: uuid.UUID, expected: tuple[int, int]) -> bool:
    return await balance(owner) == expected


async def _empty(world: World) -> bool:
    return await world.count(requests) == 0


async def test_a_submit_that_comes_after_it_was_undone_leaves_no_hold(
    world: World, jobs: Jobs, balance: Balance, monkeypatch: pytest.MonkeyPatch
):
    reserve = Ledger.reserve

    async def slow(ledger: Ledger, job: Job) -> None:
        # The relay gives the request up, releases what is not there yet, and forgets it.
        async with transaction(world.engine) as connection:
            for owner, request_id, abandoned in await store.abandon_requests(connection, older_than_s=0, limit=9):
                await ledger.release_unused(abandoned)
                await store.delete_request(connection, owner, request_id, abandoned)
        await reserve(ledger, job)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "reserve", slow)
        error = await refused(jobs.create(world.owner, PLAN, request()))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert await balance(world.owner) == (1000, 0)
    assert await world.count(jobs_table) == 0


async def test_without_redis_a_submit_commits_and_the_relay_announces_later(
    world: World, jobs: Jobs, no_redis: Any, monkeypatch: pytest.MonkeyPatch, quick_relay: None
):
    monkeypatch.setattr("jobs_service.jobs.FALLBACK_S", 0.0)
    job = await world.jobs(client=no_redis).create(world.owner, PLAN, request())
    assert job.state == jobs_pb2.STATE_PENDING
    assert await world.events(job.job_id) == []
    async with transaction(world.engine) as connection:
        assert await store.get_job(connection, uuid.UUID(job.job_id), world.owner) is not None
    async with running(world.relay().outbox()):
        await eventually(lambda: _nothing_owed(world))
    (entry,) = await world.worker_queue("w").take([POOL])
    assert str(entry.job_id) == job.job_id
    assert len(await world.events(job.job_id)) == 1


async def _nothing_owed(world: World) -> bool:
    return await world.count(outbox) == 0


async def test_without_redis_jobs_can_still_be_looked_at_and_cancelled(world: World, jobs: Jobs, no_redis: Any):
    job = await jobs.create(world.owner, PLAN, request())
    job_id = uuid.UUID(job.job_id)
    async with transaction(world.engine) as connection:
        assert await store.start_attempt(connection, job_id, worker_id="w", entry="s/1-0", takeover=False) is not None
    blind = world.jobs(client=no_redis)
    assert (await blind.get(world.owner, job_id)).state == jobs_pb2.STATE_PROCESSING
    assert (await blind.cancel(world.owner, job_id)).cancel_requested


async def test_a_waiting_job_is_cancelled_at_once_free_of_charge(world: World, jobs: Jobs, balance: Balance):
    job = await jobs.create(world.owner, PLAN, request())
    ended = await jobs.cancel(world.owner, uuid.UUID(job.job_id))
    assert (ended.state, ended.cost_millicredits) == (jobs_pb2.STATE_CANCELLED, 0)
    assert await jobs.cancel(world.owner, uuid.UUID(job.job_id)) == ended
    assert ended.receipt.released_millicredits == 100
    assert await balance(world.owner) == (1000, 0)
    assert [event.final for event in await world.events(job.job_id)] == [False, True]


async def test_a_completed_job_cannot_be_cancelled_and_anothers_does_not_exist(world: World, jobs: Jobs):
    job = await world.submit()
    async with transaction(world.engine) as connection:
        started = await store.start_attempt(connection, job.job_id, worker_id="w", entry="s/1-0", takeover=False)
        assert started is not None
        assert await store.finish(connection, started, State.COMPLETED, fallback_s=60) is not None
    error = await refused(jobs.cancel(world.owner, job.job_id))
    assert (error.reason, error.metadata) == (Reason.ERROR_REASON_JOB_TERMINAL, {"state": "STATE_COMPLETED"})
    for call in (jobs.cancel, jobs.get):
        error = await refused(call(uuid.uuid4(), job.job_id))
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, Reason.ERROR_REASON_NOT_FOUND)


async def test_pages_lead_through_all_jobs(world: World, jobs: Jobs):
    submitted = [str((await world.submit(estimated_cost=1)).job_id) for _ in range(5)]
    listed: list[str] = []
    before: uuid.UUID | None = None
    sizes: list[int] = []
    while True:
        page, before = await jobs.page(world.owner, limit=2, before=before, states=[], kinds=[])
        sizes.append(len(page))
        listed += [job.job_id for job in page]
        if before is None:
            break
    assert listed == submitted[::-1]
    assert sizes == [2, 2, 1]


async def test_settling_twice_is_settling_once(world: World, jobs: Jobs, balance: Balance):
    job = await world.submit()
    async with transaction(world.engine) as connection:
        started = await store.start_attempt(connection, job.job_id, worker_id="w", entry="s/1-0", takeover=False)
        assert started is not None
        done = await store.finish(connection, started, State.CANCELLED, fallback_s=60, steps_done=4)
    assert done is not None
    for _ in range(3):
        await world.delivery.now(*done)
    assert await balance(world.owner) == (960, 0)
    assert await world.count(outbox) == 1  # the announcement of the submit, which the relay has yet to do
    assert done[1][1].duty is Duty.SETTLE
