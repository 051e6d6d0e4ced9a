"""Limits on what one user may ask for: exact under parallel calls, kept when Redis is not, and never in the way of a repeat."""

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from typing import Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
from google.rpc import error_details_pb2
from redis import asyncio as redis
from redis.commands.core import AsyncScript

from genmesh.jobs.v1 import jobs_pb2
from jobs_service import store
from jobs_service.deletion import Deletions
from jobs_service.ledger import Ledger
from jobs_service.lifecycle import Job, Priority, State, failure
from jobs_service.limits import ESTIMATES_PER_SUBMIT, Limits, WatchLeases
from jobs_service.servicer import JobsServicer
from jobs_service.settings import PlanLimits, ServeSettings
from jobs_service.tables import jobs as jobs_table
from jobs_service.tables import requests, retries
from jobs_service.watch import Hub
from servicekit.database import transaction
from servicekit.errors import MeshError, Reason
from servicekit.identity import Principal, set_principal
from servicekit.limits import RateLimiter
from servicekit.settings import RedisSettings
from tests.service.jobs.conftest import NOWHERE
from tests.service.jobs.world import SPEC, World, eventually, new_job, note, refused, request, running, submit, within

Balance = Callable[[uuid.UUID], Awaitable[tuple[int, int]]]
FREE, PRO = "PLAN_FREE", "PLAN_PRO"
COST = 100
"""Of a job of `SPEC`."""
CONTEXT: Any = None
"""The servicers make no use of it."""
FAILURE = failure(MeshError(grpc.StatusCode.ABORTED, Reason.ERROR_REASON_WORKER_LOST, "its worker was lost 3 times"), "small")


async def limited(call: Awaitable[object]) -> str:
    """Which limit refuses the call. It says so wholly."""
    error = await refused(call)
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED)
    assert error.retry_after_s is not None
    assert error.retry_after_s >= 1
    ((subject, description),) = error.quota
    assert description
    assert error.metadata == {"limit": subject}
    kinds = {detail.TypeName() for detail in error.to_status().details}
    assert kinds == {
        kind.DESCRIPTOR.full_name for kind in (error_details_pb2.ErrorInfo, error_details_pb2.QuotaFailure, error_details_pb2.RetryInfo)
    }
    return subject


async def outcomes(*calls: Awaitable[object]) -> Counter[str]:
    """How often calls made at once were accepted, or refused by which limit."""

    async def one(call: Awaitable[object]) -> str:
        try:
            await call
        except MeshError as error:
            return error.metadata["limit"]
        return "accepted"

    return Counter(await asyncio.gather(*map(one, calls)))


@pytest.fixture
async def offered(world: World) -> World:
    """The world, in which a worker offers a model."""
    await world.offer()
    return world


@pytest.fixture
def holds(monkeypatch: pytest.MonkeyPatch) -> list[uuid.UUID]:
    """The holds that the ledger was asked for."""
    asked: list[uuid.UUID] = []
    reserve = Ledger.reserve

    async def noted(ledger: Ledger, job: Job) -> None:
        asked.append(job.hold_id)
        await reserve(ledger, job)

    monkeypatch.setattr(Ledger, "reserve", noted)
    return asked


async def failed(world: World, **changes: Any) -> Job:
    """A job of the world's owner that failed for good, and is settled."""
    job = await world.submit(**changes)
    async with transaction(world.engine) as connection:
        started = await store.start_attempt(connection, job.job_id, worker_id="w", entry="s/1-0", takeover=False)
        assert started is not None
        ended = await store.finish(connection, started, State.FAILED, fallback_s=60, failure=FAILURE)
    assert ended is not None
    await world.delivery.now(*ended)
    return ended[0]


async def open_work(world: World) -> store.OpenWork:
    async with transaction(world.engine) as connection:
        return await store.open_work(connection, world.owner)


# --- open jobs and their cost -----------------------------------------------------------------------------------------


async def test_parallel_submits_never_exceed_the_jobs_an_owner_may_have_open(offered: World, holds: list[uuid.UUID], balance: Balance):
    limits = offered.limits(open_jobs=5)
    replicas = [offered.jobs(limits=limits) for _ in range(2)]
    creates = [replicas[number % 2].create(offered.owner, FREE, request()) for number in range(20)]
    assert await outcomes(*creates) == {"accepted": 5, "open_jobs": 15}
    assert await balance(offered.owner) == (1000 - 5 * COST, 5 * COST)
    assert len(holds) == 5  # nothing was held for the others
    assert [await offered.count(table) for table in (jobs_table, requests)] == [5, 5]


async def test_parallel_submits_never_exceed_what_open_jobs_may_cost(offered: World, holds: list[uuid.UUID], balance: Balance):
    jobs = offered.jobs(limits=offered.limits(queued_millicredits=3 * COST + 50))
    assert await outcomes(*[jobs.create(offered.owner, FREE, request()) for _ in range(12)]) == {"accepted": 3, "queued_millicredits": 9}
    assert await balance(offered.owner) == (1000 - 3 * COST, 3 * COST)
    assert len(holds) == 3


async def test_a_submit_is_decided_after_the_one_before_it(world: World):
    async def submit_one() -> store.Noting:
        job = new_job(world.owner)
        one = store.Note(uuid.uuid4(), b"d", job.job_id, b'{"estimated_cost": 100}', 100)
        async with transaction(world.engine) as connection:
            return await store.note_requests(connection, world.owner, [one], jobs_max=1)

    async def waits() -> bool:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
        async with transaction(world.engine) as connection:
            return (await connection.execute(sa.text(query))).scalar_one() == 1

    async with transaction(world.engine) as connection:
        job = new_job(world.owner)
        first = store.Note(uuid.uuid4(), b"d", job.job_id, b'{"estimated_cost": 100}', 100)
        assert (await store.note_requests(connection, world.owner, [first], jobs_max=1)).noted == frozenset({first.request_id})
        second = asyncio.create_task(submit_one())
        await eventually(waits)
    assert await within(second) == store.Noting(None, store.OpenWork(2, 200))


async def test_an_end_makes_room(offered: World):
    jobs = offered.jobs(limits=offered.limits(open_jobs=2, queued_millicredits=2 * COST))
    first, _ = [await jobs.create(offered.owner, FREE, request()) for _ in range(2)]
    assert await limited(jobs.create(offered.owner, FREE, request())) == "open_jobs"
    await jobs.cancel(offered.owner, uuid.UUID(first.job_id))
    await jobs.create(offered.owner, FREE, request())
    assert await limited(jobs.create(offered.owner, FREE, request())) == "open_jobs"


async def test_running_jobs_count_and_others_jobs_do_not(offered: World, fund: Callable[[uuid.UUID, int], Awaitable[None]]):
    jobs = offered.jobs(limits=offered.limits(open_jobs=1))
    job = await jobs.create(offered.owner, FREE, request())
    async with transaction(offered.engine) as connection:
        assert await store.start_attempt(connection, uuid.UUID(job.job_id), worker_id="w", entry="s/1-0", takeover=False) is not None
    assert await limited(jobs.create(offered.owner, FREE, request())) == "open_jobs"
    other = uuid.uuid4()
    await fund(other, COST)
    await jobs.create(other, FREE, request())


async def test_a_repeat_of_an_accepted_submit_is_answered_at_every_limit(offered: World, balance: Balance):
    jobs = offered.jobs(limits=offered.limits(submits_per_minute=1, open_jobs=1, queued_millicredits=COST))
    body = request()
    made = await jobs.create(offered.owner, FREE, body)
    assert await limited(jobs.create(offered.owner, FREE, request())) == "submits_per_minute"
    assert {(await jobs.create(offered.owner, FREE, body)).job_id for _ in range(3)} == {made.job_id}
    assert [job.job_id for job in await jobs.create_batch(offered.owner, FREE, [body])] == [made.job_id]
    assert await balance(offered.owner) == (1000 - COST, COST)


async def test_the_same_submit_many_times_at_once_counts_once(offered: World):
    jobs = offered.jobs(limits=offered.limits(open_jobs=1))
    body = request()
    answers = await asyncio.gather(*[jobs.create(offered.owner, FREE, body) for _ in range(6)])
    assert len({job.job_id for job in answers}) == 1


async def test_a_submit_that_may_yet_become_a_job_counts(offered: World, no_ledger: Ledger):
    limits = offered.limits(open_jobs=1, submits_per_minute=2)
    jobs, body = offered.jobs(limits=limits), request()
    error = await refused(offered.jobs(ledger=no_ledger, limits=limits).create(offered.owner, FREE, body))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert await open_work(offered) == store.OpenWork(1, COST)
    assert await limited(jobs.create(offered.owner, FREE, request())) == "open_jobs"
    await jobs.create(offered.owner, FREE, body)  # the repeat goes on from the note
    assert await open_work(offered) == store.OpenWork(1, COST)


async def test_a_submit_that_was_given_up_or_refused_does_not_count(offered: World):
    jobs = offered.jobs(limits=offered.limits(open_jobs=1))
    dear = request(spec=jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger", steps=50, image_count=4)))
    assert (await refused(jobs.create(offered.owner, FREE, dear))).reason == Reason.ERROR_REASON_INSUFFICIENT_CREDITS
    async with transaction(offered.engine) as connection:
        assert await note(connection, new_job(offered.owner), uuid.uuid4())
    assert (await open_work(offered)).jobs == 1
    async with transaction(offered.engine) as connection:
        assert await store.abandon_requests(connection, older_than_s=0, limit=9)
    assert await open_work(offered) == store.OpenWork(0, 0)
    await jobs.create(offered.owner, FREE, request())


async def test_zero_is_no_limit(offered: World, holds: list[uuid.UUID]):
    jobs = offered.jobs(limits=offered.limits(submits_per_minute=0, open_jobs=0, queued_millicredits=0, watches=0))
    assert await outcomes(*[jobs.create(offered.owner, FREE, request()) for _ in range(10)]) == {"accepted": 10}


async def test_costs_beyond_64_bits_do_not_open_the_door(offered: World):
    async with transaction(offered.engine) as connection:
        for _ in range(3):
            await submit(connection, new_job(offered.owner, estimated_cost=2**62))
    assert (await open_work(offered)).cost_millicredits == 2**63 - 1
    assert await limited(offered.jobs().create(offered.owner, FREE, request())) == "queued_millicredits"


async def test_plans_have_limits_of_their_own(offered: World):
    plans = {Priority.FREE: PlanLimits(0, 1, 0, 0), Priority.PRO: PlanLimits(0, 3, 0, 0)}
    jobs = offered.jobs(limits=Limits(plans, offered.rates, WatchLeases(offered.client, offered.prefix)))
    assert await outcomes(*[jobs.create(offered.owner, FREE, request()) for _ in range(4)]) == {"accepted": 1, "open_jobs": 3}
    assert await outcomes(*[jobs.create(offered.owner, PRO, request()) for _ in range(4)]) == {"accepted": 2, "open_jobs": 2}


# --- batches ----------------------------------------------------------------------------------------------------------


async def test_each_new_job_of_a_batch_counts_and_all_are_refused_or_none(offered: World, holds: list[uuid.UUID]):
    jobs = offered.jobs(limits=offered.limits(open_jobs=3))
    assert await limited(jobs.create_batch(offered.owner, FREE, [request() for _ in range(4)])) == "open_jobs"
    assert [await offered.count(table) for table in (jobs_table, requests)] == [0, 0]
    known = request()
    await jobs.create(offered.owner, FREE, known)
    assert await limited(jobs.create_batch(offered.owner, FREE, [known, *(request() for _ in range(3))])) == "open_jobs"
    assert len(await jobs.create_batch(offered.owner, FREE, [known, request(), request()])) == 3
    assert len(holds) == await offered.count(jobs_table) == 3


async def test_batches_at_once_never_exceed(offered: World):
    jobs = offered.jobs(limits=offered.limits(queued_millicredits=5 * COST))
    batches = [jobs.create_batch(offered.owner, FREE, [request(), request()]) for _ in range(6)]
    assert await outcomes(*batches) == {"accepted": 2, "queued_millicredits": 4}
    assert await offered.count(jobs_table) == await offered.count(requests) == 4


async def test_a_batch_that_shares_a_request_with_another_at_the_same_time(offered: World, holds: list[uuid.UUID]):
    jobs = offered.jobs(limits=offered.limits(open_jobs=5))
    shared = request()
    batches = [[shared, request()], [request(), shared], [shared, request(), shared_in_other_case(shared)]]
    answers = await asyncio.gather(*(jobs.create_batch(offered.owner, FREE, batch) for batch in batches))
    assert len({answers[0][0].job_id, answers[1][1].job_id, answers[2][0].job_id, answers[2][2].job_id}) == 1
    assert await offered.count(jobs_table) == len(set(holds)) == 4


async def test_a_batch_with_one_request_twice_makes_one_job_of_it(offered: World, holds: list[uuid.UUID]):
    jobs = offered.jobs(limits=offered.limits(open_jobs=2))
    twice, once = request(request_id="0198C3A4-7f0e-7d0a-9d55-1e6b4c1f0001"), request()
    answers = await jobs.create_batch(offered.owner, FREE, [twice, once, shared_in_other_case(twice)])
    assert answers[0].job_id == answers[2].job_id != answers[1].job_id
    assert await offered.count(jobs_table) == len(set(holds)) == 2
    other = request(request_id="0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0002")
    contradicted = request(request_id=other.request_id.upper(), spec=jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="something else")))
    refusal = await refused(jobs.create_batch(uuid.uuid4(), FREE, [other, contradicted]))
    assert refusal.reason == Reason.ERROR_REASON_REQUEST_ID_REUSED
    assert await offered.count(jobs_table) == 2


def shared_in_other_case(body: jobs_pb2.CreateJobRequest) -> jobs_pb2.CreateJobRequest:
    """The same id, written differently: no two strings alike, so that a batch may have both."""
    return request(request_id=body.request_id.upper())


# --- rates ------------------------------------------------------------------------------------------------------------


async def test_submits_in_a_minute_are_limited_over_all_replicas(offered: World, settings: Any, holds: list[uuid.UUID]):
    elsewhere = RateLimiter(settings)
    replicas = [offered.jobs(limits=offered.limits(submits_per_minute=4, rates=rates)) for rates in (offered.rates, elsewhere)]
    creates = [replicas[number % 2].create(offered.owner, FREE, request()) for number in range(10)]
    assert await outcomes(*creates) == {"accepted": 4, "submits_per_minute": 6}
    await elsewhere.aclose()
    assert len(holds) == 4
    assert await limited(replicas[0].create_batch(uuid.uuid4(), FREE, [request() for _ in range(5)])) == "submits_per_minute"


async def test_a_batch_counts_all_or_nothing(offered: World):
    jobs = offered.jobs(limits=offered.limits(submits_per_minute=4))
    assert len(await jobs.create_batch(offered.owner, FREE, [request() for _ in range(3)])) == 3
    assert await limited(jobs.create_batch(offered.owner, FREE, [request() for _ in range(2)])) == "submits_per_minute"
    await jobs.create(offered.owner, FREE, request())
    assert await limited(jobs.create(offered.owner, FREE, request())) == "submits_per_minute"


async def test_what_is_not_valid_does_not_count(offered: World):
    jobs = offered.jobs(limits=offered.limits(submits_per_minute=1))
    wrong = request(spec=jobs_pb2.JobSpec(image=jobs_pb2.ImageSpec(prompt="a tiger", width=33)))
    for _ in range(3):
        assert (await refused(jobs.create(offered.owner, FREE, wrong))).code is grpc.StatusCode.INVALID_ARGUMENT
    await jobs.create(offered.owner, FREE, request())


async def test_estimates_are_limited_for_themselves(offered: World):
    jobs = offered.jobs(limits=offered.limits(submits_per_minute=1))
    estimates = [jobs.estimate(offered.owner, FREE, SPEC) for _ in range(ESTIMATES_PER_SUBMIT + 2)]
    assert await outcomes(*estimates) == {"accepted": ESTIMATES_PER_SUBMIT, "estimates_per_minute": 2}
    await jobs.create(offered.owner, FREE, request())


# --- retries ----------------------------------------------------------------------------------------------------------


async def test_a_retry_counts_as_a_submit_does(offered: World, holds: list[uuid.UUID], balance: Balance):
    job = await failed(offered)
    limits = offered.limits(open_jobs=1, submits_per_minute=3)
    jobs, dead_letters = offered.jobs(limits=limits), offered.dead_letters(limits=limits)
    other = await jobs.create(offered.owner, FREE, request())
    holds.clear()
    assert await limited(dead_letters.retry(job.job_id, offered.owner, None, FREE)) == "open_jobs"
    assert holds == []
    assert await offered.count(retries) == 0
    assert await balance(offered.owner) == (1000 - COST, COST)
    await jobs.cancel(offered.owner, uuid.UUID(other.job_id))
    again = await dead_letters.retry(job.job_id, offered.owner, None, FREE)
    assert again.state is State.PENDING
    assert (await dead_letters.retry(job.job_id, offered.owner, None, FREE)).job_id == job.job_id  # a repeat, at both limits
    assert await limited(jobs.create(offered.owner, FREE, request())) == "submits_per_minute"
    assert len(holds) == 1


async def test_a_retry_that_may_yet_come_to_be_counts_once(offered: World, no_ledger: Ledger):
    job, limits = await failed(offered), offered.limits(open_jobs=1, submits_per_minute=1)
    error = await refused(offered.dead_letters(ledger=no_ledger, limits=limits).retry(job.job_id, offered.owner, None, FREE))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert await open_work(offered) == store.OpenWork(1, COST)
    await offered.dead_letters(limits=limits).retry(job.job_id, offered.owner, None, FREE)
    assert await open_work(offered) == store.OpenWork(1, COST)


async def test_retries_and_submits_at_once_never_exceed(offered: World):
    dead = [await failed(offered) for _ in range(4)]
    limits = offered.limits(open_jobs=3)
    jobs, dead_letters = offered.jobs(limits=limits), offered.dead_letters(limits=limits)
    retrying = [dead_letters.retry(job.job_id, offered.owner, None, FREE) for job in dead]
    assert await outcomes(*retrying, *[jobs.create(offered.owner, FREE, request()) for _ in range(4)]) == {"accepted": 3, "open_jobs": 5}
    assert await open_work(offered) == store.OpenWork(3, 3 * COST)


async def test_an_administrators_requeue_is_not_counted(offered: World):
    dead = [await failed(offered) for _ in range(3)]
    limits = offered.limits(open_jobs=1, submits_per_minute=1)
    requeued = await offered.dead_letters(limits=limits).requeue(FAILURE.fingerprint, limit=9)
    assert {one.job_id for one in requeued if one.refusal is None} == {job.job_id for job in dead}
    # What waits counts against what its owner wants on top.
    assert await limited(offered.jobs(limits=limits).create(offered.owner, FREE, request())) == "open_jobs"


# --- without Redis ----------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def rates_away() -> AsyncIterator[RateLimiter]:
    """Rates whose Redis is down."""
    rates = RateLimiter(RedisSettings.model_validate({"redis_url": f"redis://{NOWHERE}/0"}))
    yield rates
    await rates.aclose()


async def test_open_jobs_are_limited_when_redis_was_emptied(offered: World):
    jobs = offered.jobs(limits=offered.limits(open_jobs=2, submits_per_minute=100))
    for _ in range(2):
        await jobs.create(offered.owner, FREE, request())
    await offered.client.flushdb()
    assert await outcomes(*[jobs.create(offered.owner, FREE, request()) for _ in range(6)]) == {"open_jobs": 6}


async def test_without_redis_limits_hold_in_each_process(offered: World, no_redis: Any, rates_away: RateLimiter):
    limits = offered.limits(client=no_redis, rates=rates_away, submits_per_minute=3, open_jobs=2)
    jobs = offered.jobs(client=no_redis, limits=limits)
    assert await outcomes(*[jobs.create(offered.owner, FREE, request()) for _ in range(5)]) == {
        "accepted": 2,
        "open_jobs": 1,
        "submits_per_minute": 2,
    }


# --- watches ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def owner() -> uuid.UUID:
    """Somebody who watches."""
    return uuid.uuid4()


def leases_of(world: World, client: "redis.Redis | None" = None, **times: float) -> WatchLeases:
    """The leases as one replica has them."""
    return WatchLeases(client or world.client, world.prefix, **times)


async def hold(leases: WatchLeases, owner: uuid.UUID, most: int, stack: AsyncExitStack) -> None:
    await stack.enter_async_context(leases.held(owner, most))


async def counted(world: World, owner: uuid.UUID) -> int:
    return await world.client.zcard(f"{world.prefix}:watches:{owner}")


async def test_watches_are_limited_over_all_replicas_and_their_end_makes_room(world: World, owner: uuid.UUID):
    one, other = leases_of(world), leases_of(world)
    async with AsyncExitStack() as stack:
        async with AsyncExitStack() as short:
            await hold(one, owner, 3, short)
            await hold(one, owner, 3, stack)
            await hold(other, owner, 3, stack)
            for leases in (one, other, leases_of(world)):
                assert await limited(hold(leases, owner, 3, stack)) == "watches"
            await hold(other, uuid.uuid4(), 3, stack)  # somebody else
        assert await counted(world, owner) == 2
        await hold(other, owner, 3, stack)
        assert await limited(hold(one, owner, 3, stack)) == "watches"
    assert await counted(world, owner) == 0


async def test_watches_opened_at_once_never_exceed(world: World, owner: uuid.UUID):
    replicas = [leases_of(world) for _ in range(3)]
    async with AsyncExitStack() as stack:
        opened = [hold(replicas[number % 3], owner, 4, stack) for number in range(15)]
        assert await outcomes(*opened) == {"accepted": 4, "watches": 11}
        assert await counted(world, owner) == 4
    assert await counted(world, owner) == 0


async def test_the_watches_of_a_lost_replica_are_forgotten_after_a_lease(world: World, owner: uuid.UUID):
    lost, alive = leases_of(world, lease_s=0.3), leases_of(world)
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await hold(lost, owner, 2, stack)
        # Nobody renews for it: it was killed.
        await eventually(lambda: _held(alive, owner, 2, stack))


async def _held(leases: WatchLeases, owner: uuid.UUID, most: int, stack: AsyncExitStack) -> bool:
    with suppress(MeshError):
        await hold(leases, owner, most, stack)
        return True
    return False


async def test_open_watches_are_renewed_and_told_to_a_redis_that_was_emptied(world: World, owner: uuid.UUID):
    one, other = leases_of(world, renew_interval_s=0.01), leases_of(world)
    async with AsyncExitStack() as stack:
        await hold(one, owner, 3, stack)
        await hold(one, owner, 3, stack)
        before = await _ends(world, owner)
        async with running(one.run()):

            async def renewed() -> bool:
                after = await _ends(world, owner)
                return after.keys() == before.keys() and all(after[lease] > before[lease] for lease in before)

            await eventually(renewed)
            await world.client.flushdb()
            await eventually(renewed)
        await hold(other, owner, 3, stack)
        assert await limited(hold(other, owner, 3, stack)) == "watches"


async def _ends(world: World, owner: uuid.UUID) -> dict[bytes, float]:
    found: Any = await world.client.zrange(f"{world.prefix}:watches:{owner}", 0, -1, withscores=True)
    return dict(found)


async def test_a_watch_that_ends_while_it_is_renewed_is_not_brought_back(world: World, owner: uuid.UUID, monkeypatch: pytest.MonkeyPatch):
    leases, watch = leases_of(world), AsyncExitStack()
    await hold(leases, owner, 3, watch)
    call: Any = AsyncScript.__call__

    async def late(script: AsyncScript, *args: Any) -> Any:
        await watch.aclose()
        return await call(script, *args)

    monkeypatch.setattr(AsyncScript, "__call__", late)
    await leases.renew()
    assert await counted(world, owner) == 0


async def test_without_redis_each_process_limits_its_own_watches(world: World, owner: uuid.UUID, no_redis: Any):
    leases = leases_of(world, no_redis)
    async with AsyncExitStack() as stack:
        async with AsyncExitStack() as short:
            await hold(leases, owner, 2, short)
            await hold(leases, owner, 2, stack)
            assert await limited(hold(leases, owner, 2, stack)) == "watches"
            await leases.renew()  # nothing to be had, and no harm done
        await hold(leases, owner, 2, stack)


async def test_a_watch_is_counted_from_its_beginning_to_its_end(offered: World):
    hub, limits = Hub(offered.log), offered.limits(watches=1)
    deletions = Deletions(offered.engine, offered.media, offered.log, offered.delivery)
    service = JobsServicer(
        offered.jobs(limits=limits), offered.dead_letters(), deletions, hub, offered.log, limits=limits, checkpoint_interval_s=60
    )
    set_principal(Principal(user_id=str(offered.owner), plan=FREE))
    async with running(hub.run()):
        await within(hub.reading.wait())
        first = service.WatchJobs(jobs_pb2.WatchJobsRequest(), CONTEXT)
        await within(anext(first))
        assert await limited(anext(service.WatchJobs(jobs_pb2.WatchJobsRequest(), CONTEXT))) == "watches"
        await first.aclose()
        second = service.WatchJobs(jobs_pb2.WatchJobsRequest(), CONTEXT)
        await within(anext(second))
        # One that is cancelled while it waits for something to happen, as gRPC does when a client goes away.
        waiting = asyncio.create_task(anext(second))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await counted(offered, offered.owner) == 0


# --- settings ---------------------------------------------------------------------------------------------------------


def test_limits_are_settings_by_plan(monkeypatch: pytest.MonkeyPatch, settings: Any):
    known = settings.model_dump()
    for name, value in {
        "SUBMITS_PER_MINUTE_FREE": 1,
        "OPEN_JOBS_FREE": 2,
        "QUEUED_MILLICREDITS_FREE": 3,
        "WATCHES_FREE": 4,
        "SUBMITS_PER_MINUTE_PRO": 5,
        "OPEN_JOBS_PRO": 6,
        "QUEUED_MILLICREDITS_PRO": 7,
        "WATCHES_PRO": 8,
    }.items():
        monkeypatch.setenv(f"GENMESH_{name}", str(value))
    expected = {Priority.FREE: PlanLimits(1, 2, 3, 4), Priority.PRO: PlanLimits(5, 6, 7, 8)}
    assert ServeSettings(**known).plan_limits == expected
