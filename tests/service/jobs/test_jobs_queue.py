"""The queue over a real Redis: turns, limits, weights, delays, leases, warm models, loss; against a model of it; on a cluster."""

import asyncio
import secrets
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Collection, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import pytest_asyncio
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from redis import asyncio as redis
from redis.asyncio.cluster import RedisCluster

from cli.stack.ports import LOOPBACK
from jobs_service.lifecycle import Job, Priority
from jobs_service.queue import Depth, Entry, Hold, JobQueue
from jobs_service.queue_scripts import CLAIM_PAGE, LOOK_AHEAD, PASSED, PASSES_MAX
from servicekit import streams
from servicekit.settings import RedisSettings
from tests.service.jobs.redis_servers import RedisProcess, programs
from tests.service.jobs.world import POOL, eventually, new_job, running, within
from tests.service.stateful import run_machine

T = TypeVar("T")

LEASE_S = 0.4
LONG_S = 60
"""A lease that no test outlives."""
PRO, FREE = Priority.PRO, Priority.FREE
EXAMPLES = 20
STEPS = 40
START_TIMEOUT_S = 30


class Queues:
    """Queues of workers over one Redis, with keys of their own."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.prefix = f"t{secrets.token_hex(6)}"

    def queue(self, worker_id: str = "one", *, lease_s: float = LONG_S, limits: Mapping[Priority, int] = {}) -> JobQueue:
        return JobQueue(self.client, self.prefix, lease_s=lease_s, blocking=self.client, worker_id=worker_id, owner_limits=limits)


@pytest_asyncio.fixture
async def client(redis_url: str) -> AsyncIterator["redis.Redis"]:
    """A client of Redis with a database that these tests may empty."""
    client = streams.connect(RedisSettings.model_validate({"redis_url": redis_url.removesuffix("/0") + "/6"}), blocking=True)
    yield client
    await client.flushdb()
    await client.aclose()


@pytest.fixture
def queues(client: "redis.Redis") -> Queues:
    return Queues(client)


@pytest.fixture
def one(queues: Queues) -> JobQueue:
    return queues.queue("one", lease_s=LEASE_S)


@pytest.fixture
def other(queues: Queues) -> JobQueue:
    return queues.queue("other", lease_s=LEASE_S)


def owned(owner_id: uuid.UUID, count: int, **changes: Any) -> list[Job]:
    """Jobs of one owner, in the order of their submission."""
    return [new_job(owner_id, **changes) for _ in range(count)]


async def take(queue: JobQueue, pools: Sequence[str] = (POOL,), **how: Any) -> Entry:
    """The next entry, however long it takes."""

    async def next_one() -> Entry:
        while True:
            for entry in await queue.take(pools, **how):
                return entry

    return await within(next_one())


async def put(queue: JobQueue, priority: Priority = FREE, **changes: Any) -> uuid.UUID:
    """Put in a job of an owner who has no other."""
    job = new_job(uuid.uuid4(), priority=priority, **changes)
    await queue.put(job)
    return job.job_id


async def drain(queue: JobQueue, *, warm: Collection[str] = ()) -> list[uuid.UUID]:
    """Take and do one after the other until there is none."""
    order: list[uuid.UUID] = []
    while entries := await queue.take([POOL], warm=warm):
        order += ids(entries)
        await queue.done_many(entries)
    return order


def ids(of: Iterable[Job | Entry]) -> list[uuid.UUID]:
    return [each.job_id for each in of]


# --- taking and doing ---------------------------------------------------------------------------------------------------


async def test_an_entry_is_taken_once_and_gone_when_done(queues: Queues, one: JobQueue, other: JobQueue):
    job = new_job(uuid.uuid4())
    await one.put(job)
    entry = await take(one)
    assert (entry.job_id, entry.owner_id, entry.taken_over, entry.pool) == (job.job_id, job.owner_id, False, POOL)
    assert await one.holder(entry.stream, entry.entry_id) == "one"
    assert await other.take([POOL]) == []
    await one.done(entry)
    assert await queues.client.xlen(entry.stream) == 0
    assert await one.holder(entry.stream, entry.entry_id) is None


async def test_what_is_done_leaves_nothing_behind(queues: Queues):
    queue = queues.queue(lease_s=LEASE_S, limits={FREE: 2})
    await queue.put_many(owned(uuid.uuid4(), 20) + owned(uuid.uuid4(), 20, priority=PRO, retry_time=datetime.now(UTC)))
    while entries := await queue.take([POOL], count=7, warm=["small"]):
        await queue.done_many(entries)
    for key in await queues.client.keys(f"*{queues.prefix}*"):
        assert await queues.client.type(key) == b"stream"
        assert await queues.client.xlen(key) == 0
        assert (await queues.client.xpending(key, "dispatch"))["pending"] == 0


async def test_many_are_taken_at_once_across_batches(one: JobQueue):
    jobs = [job for owner in range(30) for job in owned(uuid.uuid4(), 10, priority=Priority(owner % 2 + 1))]
    await one.put_many(jobs)
    assert await one.missing(jobs) == []
    entries = await one.take([POOL], count=len(jobs))
    assert sorted(ids(entries)) == sorted(ids(jobs))
    await one.done_many(entries)
    assert await one.missing(jobs) == jobs


async def test_a_job_that_is_put_twice_is_there_once(one: JobQueue):
    owner = uuid.uuid4()
    now, waiting, delayed = *owned(owner, 2), new_job(owner, retry_time=datetime.now(UTC) + timedelta(hours=1))
    for _ in range(3):
        await one.put_many([now, waiting, delayed])
    assert await one.depth(POOL) == {FREE: Depth(waiting=2, delayed=1), PRO: Depth(0, 0)}
    assert await drain(one) == ids([now, waiting])


async def test_an_entry_that_is_done_twice_counts_once(queues: Queues):
    queue = queues.queue(lease_s=LEASE_S, limits={FREE: 2})
    jobs = owned(uuid.uuid4(), 4)
    await queue.put_many(jobs)
    first, second = await queue.take([POOL], count=4)
    await queue.done_many([first, first])
    await queue.done(first)
    assert await queue.renew(second) is Hold.HELD
    assert ids(await queue.take([POOL], count=4)) == [jobs[2].job_id]


async def test_a_job_handed_back_is_put_in_before_its_entry_is_removed(one: JobQueue):
    job = new_job(uuid.uuid4())
    await one.put(job)
    entry = await take(one)
    await one.put(job)
    await one.done(entry)
    again = await take(one)
    assert again.job_id == job.job_id
    assert again.entry_id != entry.entry_id


async def test_missing_are_those_that_are_not_in_the_queue(one: JobQueue):
    owner = uuid.uuid4()
    taken, ready, waiting, removed, never = owned(owner, 5)
    delayed = new_job(owner, retry_time=datetime.now(UTC) + timedelta(hours=1))
    elsewhere = new_job(owner, pool="elsewhere")
    await one.put_many([taken, ready, waiting, removed, delayed, elsewhere])
    assert (await take(one)).job_id == taken.job_id
    await one.remove(removed)
    assert await one.missing([ready, taken, waiting, elsewhere, removed, delayed, never]) == [taken, removed, never]


async def test_a_removed_job_is_not_delivered_unless_it_is_the_next(one: JobQueue):
    owner = uuid.uuid4()
    jobs = owned(owner, 4)
    delayed = new_job(owner, retry_time=datetime.now(UTC) + timedelta(hours=1))
    await one.put_many([*jobs, delayed])
    for job in (jobs[0], jobs[2], delayed):
        await one.remove(job)
    assert (await one.depth(POOL))[FREE] == Depth(waiting=3, delayed=0)
    assert await drain(one) == ids([jobs[0], jobs[1], jobs[3]])  # the first was in the stream already


async def test_an_entry_of_a_version_without_owners_is_dropped(queues: Queues, one: JobQueue):
    job = new_job(uuid.uuid4())
    await one.put(job)
    entry = await take(one)
    await one.done(entry)
    await queues.client.xadd(entry.stream, {"job": str(uuid.uuid4())})
    await one.put(job)
    assert ids(await one.take([POOL], count=5)) == [job.job_id]
    assert await queues.client.xlen(entry.stream) == 1


# --- turns, limits, weights ---------------------------------------------------------------------------------------------


async def test_owners_are_served_in_turns(one: JobQueue):
    many, newcomer, third = owned(uuid.uuid4(), 50), owned(uuid.uuid4(), 2), owned(uuid.uuid4(), 1)
    await one.put_many(many)
    await one.put_many(newcomer)
    await one.put_many(third)
    order = await drain(one)
    assert order == ids([many[0], newcomer[0], third[0], many[1], newcomer[1], *many[2:]])


async def test_turns_are_the_same_when_many_are_taken_at_once(one: JobQueue):
    owners = [owned(uuid.uuid4(), count) for count in (5, 1, 3)]
    for jobs in owners:
        await one.put_many(jobs)
    turns = [jobs[turn] for turn in range(5) for jobs in owners if turn < len(jobs)]
    assert ids(await one.take([POOL], count=100)) == ids(turns)


async def test_an_owners_jobs_come_in_the_order_of_submission_however_they_were_put(one: JobQueue):
    first, *rest = owned(uuid.uuid4(), 6)
    await one.put(first)
    await one.put_many(rest[::-1])
    assert await drain(one) == ids([first, *rest])


async def test_no_owner_has_more_running_than_the_limit(queues: Queues):
    queue = queues.queue(limits={FREE: 3})
    jobs, others = owned(uuid.uuid4(), 5), owned(uuid.uuid4(), 1)
    await queue.put_many(jobs + others)
    entries = await queue.take([POOL], count=10)
    assert sorted(ids(entries)) == sorted(ids(jobs[:3] + others))
    assert (await queue.depth(POOL))[FREE] == Depth(waiting=2, delayed=0)
    await queue.put_many(jobs)  # those that run are put in once more: the limit holds
    assert await queues.client.xlen(entries[0].stream) == len(entries)  # and what it holds back wakes no worker
    queue_of_another = queues.queue("another", lease_s=LEASE_S, limits={FREE: 3})
    assert await queue_of_another.take([POOL], count=10) == []
    await queue.done(next(entry for entry in entries if entry.job_id == jobs[0].job_id))
    assert len(await queue_of_another.take([POOL], count=10)) == 1


async def test_a_level_without_a_limit_has_none(queues: Queues):
    queue = queues.queue(limits={FREE: 1})
    jobs = owned(uuid.uuid4(), 20, priority=PRO)
    await queue.put_many(jobs)
    assert ids(await queue.take([POOL], count=50)) == ids(jobs)


async def test_a_limit_counts_what_runs_on_both_levels(queues: Queues):
    queue = queues.queue(limits={FREE: 2, PRO: 3})
    owner = uuid.uuid4()
    free, pro = owned(owner, 3), owned(owner, 3, priority=PRO)
    await queue.put_many(free + pro)
    entries = await queue.take([POOL], count=10)
    assert ids(entries) == ids(pro)  # the free one was in the stream before they started, and goes back
    await queue.done(entries[0])
    assert await queues.queue("another", lease_s=LEASE_S, limits={FREE: 2, PRO: 3}).take([POOL], count=10) == []
    await queue.done(entries[1])
    assert ids(await queue.take([POOL], count=10)) == [free[0].job_id]


async def test_a_limit_holds_although_somebody_who_puts_knows_of_none(queues: Queues):
    jobs = owned(uuid.uuid4(), 3)
    worker, simple = queues.queue(limits={FREE: 1}, lease_s=LEASE_S), queues.queue("")
    await simple.put(jobs[0])
    entry = await take(worker)
    await simple.put(jobs[1])
    await simple.put(jobs[2])
    await worker.renew(entry)
    assert await worker.take([POOL], count=3) == []
    await worker.done(entry)
    assert await drain(worker) == ids(jobs[1:])


async def test_a_limit_counts_what_was_taken_over_once(queues: Queues):
    limits = {FREE: 2}
    dead, live = queues.queue("dead", lease_s=LEASE_S, limits=limits), queues.queue("live", lease_s=LEASE_S, limits=limits)
    jobs = owned(uuid.uuid4(), 4)
    await dead.put_many(jobs)
    lost = await dead.take([POOL], count=2)
    taken: list[Entry] = []
    while len(taken) < 2:
        taken += await within(live.take([POOL], count=4))
        for entry in taken:
            await live.renew(entry)
    assert [(entry.job_id, entry.taken_over) for entry in taken] == [(job.job_id, True) for job in jobs[:2]]
    await dead.done_many(lost)  # too late: it counts for nothing
    assert await queues.queue("third", lease_s=LEASE_S, limits=limits).take([POOL], count=4) == []
    await live.done(taken[0])
    assert ids(await live.take([POOL], count=4)) == [jobs[2].job_id]


async def test_paid_work_goes_first_and_free_work_does_not_starve(one: JobQueue):
    free = {await put(one, FREE) for _ in range(4)}
    for _ in range(16):
        await put(one, PRO)
    order = ["free" if job_id in free else "pro" for job_id in (await drain(one))[:16]]
    assert order == ["pro", "pro", "pro", "free"] * 4


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
async def test_free_work_has_its_share_beside_endless_paid_work(queues: Queues, count: int):
    queue = queues.queue()
    free = set(ids(jobs := owned(uuid.uuid4(), 40)))
    await queue.put_many(jobs)
    await queue.put_many([new_job(uuid.uuid4(), priority=PRO) for _ in range(120)])
    taken: list[uuid.UUID] = []
    while len(taken) < 120:
        taken += ids(await queue.take([POOL], count=count))
    assert len(free.intersection(taken[:120])) == 30


async def test_each_pool_has_its_own_weights(queues: Queues):
    queue = queues.queue()
    pools = ("a", "b")
    for pool in pools:
        await queue.put_many([new_job(uuid.uuid4(), pool=pool, priority=level) for level in (PRO, FREE) for _ in range(16)])
    taken = [(entry.pool, entry.stream[-1]) for _ in range(32) for entry in await queue.take(pools)]
    assert Counter(taken) == {("a", "1"): 4, ("a", "2"): 12, ("b", "1"): 4, ("b", "2"): 12}


async def test_a_level_with_nothing_in_it_costs_the_other_nothing(one: JobQueue):
    free = [await put(one, FREE) for _ in range(6)]
    assert await drain(one) == free


# --- waiting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pools", [(POOL,), ("empty", POOL)])
async def test_a_waiting_worker_hears_of_a_new_job_at_once(queues: Queues, pools: Sequence[str]):
    patient = queues.queue("patient")
    waiting = asyncio.create_task(take(patient, pools))
    await eventually(lambda: _blocked(queues))
    job_id = await put(patient)
    async with asyncio.timeout(1.5):  # it would look again by itself after two seconds
        assert (await waiting).job_id == job_id


async def test_a_waiting_worker_hears_of_a_job_whose_turn_comes(queues: Queues):
    busy, patient = (queues.queue(name, limits={FREE: 1}) for name in ("busy", "patient"))
    jobs = owned(uuid.uuid4(), 2)
    await busy.put_many(jobs)
    entry = await take(busy)
    waiting = asyncio.create_task(take(patient))
    await eventually(lambda: _blocked(queues))
    await busy.done(entry)
    async with asyncio.timeout(1.5):
        assert (await waiting).job_id == jobs[1].job_id


async def _blocked(queues: Queues) -> bool:
    return any(entry["cmd"] == "xread" for entry in await queues.client.client_list())


# --- delays -------------------------------------------------------------------------------------------------------------


async def test_a_delayed_job_is_taken_when_it_is_due_and_not_before(one: JobQueue):
    due = datetime.now(UTC) + timedelta(seconds=0.5)
    job = new_job(uuid.uuid4(), retry_time=due)
    await one.put(job)
    assert (await take(one)).job_id == job.job_id
    assert datetime.now(UTC) >= due - timedelta(milliseconds=1)


async def test_a_worker_waits_no_longer_than_until_the_next_job_is_due(queues: Queues):
    patient = queues.queue("patient")
    await patient.put(new_job(uuid.uuid4(), retry_time=datetime.now(UTC) + timedelta(seconds=0.2)))
    async with asyncio.timeout(1.5):  # by itself it would look again after two seconds
        assert await patient.take([POOL]) == []
        assert await take(patient)


async def test_a_time_that_has_passed_delays_nothing(one: JobQueue):
    job = new_job(uuid.uuid4(), retry_time=datetime.now(UTC) - timedelta(seconds=1))
    await one.put(job)
    assert await one.depth(POOL) == {FREE: Depth(1, 0), PRO: Depth(0, 0)}
    assert await drain(one) == [job.job_id]


async def test_a_later_put_moves_a_job_between_waiting_and_delayed(one: JobQueue):
    first, job = owned(uuid.uuid4(), 2)
    later = replace(job, retry_time=datetime.now(UTC) + timedelta(hours=1))
    await one.put_many([first, job])
    for moved, expected in ((later, Depth(1, 1)), (job, Depth(2, 0)), (later, Depth(1, 1)), (later, Depth(1, 1)), (job, Depth(2, 0))):
        await one.put(moved)
        assert (await one.depth(POOL))[FREE] == expected
    assert await drain(one) == ids([first, job])


async def test_more_delayed_jobs_than_one_look_makes_waiting_all_come(one: JobQueue):
    due = datetime.now(UTC) + timedelta(seconds=0.3)
    jobs = [new_job(uuid.uuid4(), retry_time=due) for _ in range(200)]
    await one.put_many(jobs)
    taken: list[uuid.UUID] = []
    while len(taken) < len(jobs):
        taken += ids(entries := await within(one.take([POOL], count=50)))
        await one.done_many(entries)
    assert sorted(taken) == sorted(ids(jobs))


# --- leases -------------------------------------------------------------------------------------------------------------


async def test_a_silent_workers_entry_is_claimed_after_the_lease_and_not_before(one: JobQueue, other: JobQueue):
    job_id = await put(one)
    lost = await take(one)
    start = time.monotonic()
    entry = await take(other)
    assert (entry.job_id, entry.owner_id, entry.taken_over) == (job_id, lost.owner_id, True)
    assert time.monotonic() - start >= LEASE_S * 0.9
    assert await one.renew(lost) is Hold.TAKEN


async def test_an_entry_that_is_renewed_stays(one: JobQueue, other: JobQueue):
    job_id = await put(one)
    entry = await take(one)
    end = time.monotonic() + 3 * LEASE_S
    while time.monotonic() < end:
        assert await one.renew(entry) is Hold.HELD
        assert await other.take([POOL]) == []  # waits a tenth of a lease
    assert (await take(other)).job_id == job_id  # and is claimed once it is renewed no more


async def test_a_dead_worker_is_found_behind_many_live_ones(one: JobQueue, other: JobQueue):
    for _ in range(25):
        await put(one)
    *live, dead = await one.take([POOL], count=25)

    async def keep_alive() -> None:
        while True:
            for entry in live:
                await one.renew(entry)
            await asyncio.sleep(LEASE_S / 8)

    async with running(keep_alive()):
        assert (await take(other)).job_id == dead.job_id
        assert await other.take([POOL]) == []


async def test_a_worker_that_lost_its_entry_cannot_remove_it(queues: Queues, one: JobQueue, other: JobQueue):
    await put(one)
    entry = await take(one)
    taken = await take(other)
    await one.done(entry)
    assert await other.renew(taken) is Hold.HELD
    assert await queues.client.xlen(entry.stream) == 1
    await other.done(taken)
    assert await queues.client.xlen(entry.stream) == 0


# --- warm models --------------------------------------------------------------------------------------------------------


async def test_a_warm_model_goes_first_within_the_look_ahead(one: JobQueue):
    models = ["a", "a", "b", "a", "b"]
    jobs = [await put(one, model=model) for model in models]
    assert await drain(one, warm=["b"]) == [jobs[n] for n in (2, 4, 0, 1, 3)]


async def test_a_warm_model_beyond_the_look_ahead_waits(one: JobQueue):
    cold = [await put(one, model="cold") for _ in range(LOOK_AHEAD)]
    warm = await put(one, model="warm")
    assert await drain(one, warm=["warm"]) == [cold[0], warm, *cold[1:]]


async def test_entries_looked_past_are_taken_first_by_everybody_and_are_no_dead_workers(queues: Queues, one: JobQueue, other: JobQueue):
    cold, warm, late = [await put(one, model=model) for model in ("cold", "warm", "late")]
    entry = await take(one, warm=["warm"])
    assert entry.job_id == warm
    parked = await queues.client.xpending_range(entry.stream, "dispatch", "-", "+", 10, consumername=PASSED)
    assert len(parked) == 2
    await eventually(lambda: _idle(queues, entry.stream, len(parked)))
    taken = [await take(queues.queue("other"), warm=models) for models in ((), ("none",))]
    assert [(entry.job_id, entry.taken_over) for entry in taken] == [(cold, False), (late, False)]


async def _idle(queues: Queues, stream: str, count: int) -> bool:
    """Whether so many parked entries are as old as those of a dead worker."""
    pending = await queues.client.xpending_range(stream, "dispatch", "-", "+", 99, consumername=PASSED, idle=int(LEASE_S * 1000))
    return len(pending) == count


async def test_parked_entries_do_not_hide_a_dead_workers(queues: Queues, one: JobQueue):
    # More than a look goes through at once, as when a worker is cancelled that took many.
    for _ in range(2 * CLAIM_PAGE + 1):
        await put(one)
    *parked, dead = await one.take([POOL], count=2 * CLAIM_PAGE + 1)
    lease_ms = int(LEASE_S * 1000)
    for consumer, entries in ((PASSED, parked), ("dead", [dead])):
        entry_ids = [entry.entry_id for entry in entries]
        await queues.client.xclaim(dead.stream, "dispatch", consumer, 0, entry_ids, idle=lease_ms, justid=True)
    entry = await take(one)
    assert (entry.job_id, entry.taken_over) == (dead.job_id, True)


async def test_an_entry_is_passed_over_so_often_and_no_more(one: JobQueue):
    cold = await put(one, model="cold")
    warm = [await put(one, model="warm") for _ in range(PASSES_MAX + 2)]
    assert await drain(one, warm=["warm"]) == [*warm[:PASSES_MAX], cold, *warm[PASSES_MAX:]]


async def test_passes_are_counted_for_many_taken_at_once(queues: Queues):
    queue = queues.queue()
    cold = [await put(queue, model="cold") for _ in range(2)]
    warm = [await put(queue, model="warm") for _ in range(PASSES_MAX + 2)]
    taken = ids(await queue.take([POOL], count=3, warm=["warm"])) + ids(await queue.take([POOL], count=20, warm=["warm"]))
    assert taken == [*warm[:PASSES_MAX], *cold, *warm[PASSES_MAX:]]


# --- a cancelled take ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [(), ("small",), ("other",)])
async def test_a_cancelled_take_gives_back_what_it_got(queues: Queues, warm: Collection[str]):
    queue = queues.queue(limits={FREE: 3})
    many, few = owned(uuid.uuid4(), 4), owned(uuid.uuid4(), 1)
    await queue.put_many(many + few)
    before = await queue.depth(POOL)
    for _ in range(3):
        cancelled = asyncio.create_task(queue.take([POOL], count=4, warm=warm))
        await asyncio.sleep(0)  # it has begun, and Redis has not answered
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert await queue.depth(POOL) == before
    assert await queue.missing(many + few) == []
    entries = await queues.queue("another", limits={FREE: 3}).take([POOL], count=9)
    assert [(entry.job_id, entry.taken_over) for entry in entries] == [(job.job_id, False) for job in (many[0], *few, *many[1:3])]


async def test_a_cancelled_take_leaves_a_dead_workers_entry_to_the_next(queues: Queues, one: JobQueue):
    job_id = await put(one)
    entry = await take(one)
    await eventually(lambda: _silent_for_a_lease(queues, entry))
    other = queues.queue("other", lease_s=LEASE_S)
    cancelled = asyncio.create_task(other.take([POOL]))
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert await one.holder(entry.stream, entry.entry_id) == "other"
    again = await queues.queue("third", lease_s=LEASE_S).take([POOL])  # at once: a lease has passed for it
    assert [(entry.job_id, entry.taken_over) for entry in again] == [(job_id, True)]


async def _silent_for_a_lease(queues: Queues, entry: Entry) -> bool:
    return bool(await queues.client.xpending_range(entry.stream, "dispatch", "-", "+", 1, idle=int(LEASE_S * 1000)))


async def test_a_take_cancelled_anywhere_loses_nothing(queues: Queues):
    queue = queues.queue(limits={FREE: 2})
    jobs = [job for _ in range(5) for job in owned(uuid.uuid4(), 4)]
    await queue.put_many(jobs)
    taken: list[Entry] = []
    for pauses in range(60):
        cancelled = asyncio.create_task(queue.take([POOL], count=1))
        for _ in range(pauses % 20):
            await asyncio.sleep(0)
        cancelled.cancel()
        try:
            taken += await cancelled
        except asyncio.CancelledError:
            continue
    while len(taken) < len(jobs):
        await queue.done_many(taken)
        taken += await within(queue.take([POOL], count=9))
    assert sorted(ids(taken)) == sorted(ids(jobs))
    assert not any(entry.taken_over for entry in taken)


# --- loss ---------------------------------------------------------------------------------------------------------------


async def test_groups_come_back_after_redis_was_emptied(queues: Queues, one: JobQueue):
    await put(one)
    entry = await take(one)
    await queues.client.flushdb()
    assert await one.renew(entry) is Hold.GONE
    assert await one.holder(entry.stream, entry.entry_id) is None
    await one.done(entry)  # nothing to remove, nothing breaks
    job_id = await put(one)  # before any worker made the group again
    assert (await take(one)).job_id == job_id


async def test_jobs_put_in_again_after_a_loss_are_there_once(queues: Queues, one: JobQueue):
    owner = uuid.uuid4()
    jobs = [*owned(owner, 5), new_job(owner, retry_time=datetime.now(UTC) + timedelta(hours=1))]
    await one.put_many(jobs)
    running_now = await take(one)
    pending = [job for job in jobs if job.job_id != running_now.job_id]
    assert await one.missing(pending) == []
    await queues.client.flushdb()
    assert await one.missing(pending) == pending
    for _ in range(2):
        await one.put_many(pending)
    await one.done(running_now)
    assert await one.missing(pending) == []
    assert await one.depth(POOL) == {FREE: Depth(4, 1), PRO: Depth(0, 0)}
    assert await drain(one) == ids(jobs[1:5])


async def test_a_worker_says_that_it_is_alive_also_when_its_entry_is_gone(queues: Queues, one: JobQueue):
    job_id = await put(one)
    entry = await take(one)
    await queues.client.flushdb()
    assert not await one.alive(entry.stream, job_id)
    await one.renew(entry)
    assert await one.alive(entry.stream, job_id)
    await eventually(lambda: _silent(one, entry))


async def _silent(queue: JobQueue, entry: Entry) -> bool:
    return not await queue.alive(entry.stream, entry.job_id)


async def test_the_queue_knows_when_it_was_lost_and_when_it_has_settled(queues: Queues, one: JobQueue):
    assert await one.lost(POOL)
    await one.rebuilt(POOL)
    assert not await one.lost(POOL)
    assert await one.lost("another pool")
    assert not await one.settled(POOL)
    await eventually(lambda: one.settled(POOL))
    await queues.client.flushdb()
    assert await one.lost(POOL)
    assert not await one.settled(POOL)


async def test_another_process_of_redis_counts_as_a_loss(queues: Queues, one: JobQueue):
    await one.rebuilt(POOL)
    key = f"{{{queues.prefix}:queue:{POOL}}}:mark"
    mark: Any = await queues.client.get(key)
    await queues.client.set(key, b"another-run-id " + mark.partition(b" ")[2])
    assert await one.lost(POOL)
    assert not await one.settled(POOL)


async def test_scripts_that_redis_forgot_are_sent_again(queues: Queues, one: JobQueue):
    await put(one)
    entry = await take(one)
    await queues.client.script_flush()
    assert await one.renew(entry) is Hold.HELD
    await one.done(entry)


# --- against a model ----------------------------------------------------------------------------------------------------


class ModelQueue:
    """What the queue promises, in lists. An entry is [number, job]; numbers grow."""

    def __init__(self, limits: Mapping[Priority, int]) -> None:
        self.limits = limits
        self.last = 0
        self.stream: dict[Priority, list[tuple[int, Job]]] = {level: [] for level in Priority}
        self.waiting: dict[Priority, list[Job]] = {level: [] for level in Priority}
        self.delayed: dict[Priority, list[Job]] = {level: [] for level in Priority}
        self.running: Counter[uuid.UUID] = Counter()
        self.held: dict[Priority, list[tuple[int, Job]]] = {level: [] for level in Priority}
        self.places: Counter[str] = Counter()

    def undelivered(self, job: Job) -> bool:
        return job in self.waiting[job.priority] or job in self.delayed[job.priority] or self.in_stream(job)

    def in_stream(self, job: Job) -> bool:
        return job in [entry[1] for entry in self.stream[job.priority]]

    def admit(self, owner: uuid.UUID) -> None:
        for level in Priority:
            theirs = [job for job in self.waiting[level] if job.owner_id == owner]
            has_one = any(job.owner_id == owner for _, job in self.stream[level])
            if theirs and not has_one and self.below_limit(level, owner):
                first = min(theirs, key=lambda job: job.job_id)
                self.waiting[level].remove(first)
                self.last += 1
                self.stream[level].append((self.last, first))

    def below_limit(self, level: Priority, owner: uuid.UUID) -> bool:
        limit = self.limits.get(level, 0)
        return not limit or self.running[owner] < limit

    def put(self, job: Job, *, delayed: bool) -> None:
        if self.in_stream(job):
            return
        self.remove(job)
        (self.delayed if delayed else self.waiting)[job.priority].append(job)
        if not delayed:
            self.admit(job.owner_id)

    def remove(self, job: Job) -> None:
        for jobs in (self.waiting[job.priority], self.delayed[job.priority]):
            if job in jobs:
                jobs.remove(job)

    def take(self, worker: str, count: int, *, silent: bool) -> list[tuple[int, Job, bool]]:
        taken: list[tuple[int, Job, bool]] = []
        if silent:
            taken = [(*entry, True) for level in (PRO, FREE) for entry in sorted(self.held[level], key=lambda entry: entry[0])][:count]
        left = count - len(taken)
        fresh: list[tuple[int, Job, bool]] = []
        pro = sum(place % 4 != 3 for place in range(self.places[worker], self.places[worker] + left))
        for level, most in ((PRO, pro), (FREE, left), (PRO, left)):
            while len(fresh) < most and self.stream[level]:
                entry = self.stream[level].pop(0)
                owner = entry[1].owner_id
                if not self.below_limit(level, owner):
                    self.waiting[level].append(entry[1])
                    continue
                self.running[owner] += 1
                self.held[level].append(entry)
                fresh.append((*entry, False))
                self.admit(owner)
        self.places[worker] += len(fresh)
        return taken + fresh

    def untake(self, taken: list[tuple[int, Job, bool]]) -> None:
        for number, job, taken_over in reversed(taken):
            if taken_over:
                continue
            level, owner = job.priority, job.owner_id
            self.held[level].remove((number, job))
            self.running[owner] -= 1
            for entry in [entry for entry in self.stream[level] if entry[1].owner_id == owner]:
                self.stream[level].remove(entry)
                self.waiting[level].append(entry[1])
            self.stream[level] = sorted([*self.stream[level], (number, job)], key=lambda entry: entry[0])

    def done(self, number: int, job: Job) -> None:
        self.held[job.priority].remove((number, job))
        self.running[job.owner_id] -= 1
        self.admit(job.owner_id)


class QueueMachine(RuleBasedStateMachine):
    """Jobs of a few owners on both levels; workers that take, do, hand back, are cancelled, fall silent; in any order."""

    run: ClassVar[asyncio.Runner]
    client: ClassVar[Any]

    @initialize(free=st.integers(0, 3), pro=st.integers(0, 3))
    def begin(self, free: int, pro: int) -> None:
        limits = {FREE: free, PRO: pro}
        queues = Queues(self.client)
        self.model = ModelQueue(limits)
        self.owners = [uuid.uuid4() for _ in range(3)]
        self.queues = {
            name: queues.queue(name, lease_s=lease_s, limits=limits) for name, lease_s in (("a", LONG_S), ("b", LONG_S), ("c", 0))
        }
        self.jobs: list[Job] = []
        self.entries: dict[int, tuple[str, Entry, Job]] = {}

    def do(self, operation: Coroutine[Any, Any, T]) -> T:
        return self.run.run(operation)

    @rule(owner=st.integers(0, 2), level=st.sampled_from(Priority), delayed=st.booleans(), count=st.integers(1, 4))
    def submit(self, owner: int, level: Priority, delayed: bool, count: int) -> None:
        jobs = owned(self.owners[owner], count, priority=level)
        self.jobs += jobs
        self.put(jobs, delayed=delayed)

    def put(self, jobs: list[Job], *, delayed: bool) -> None:
        retry_time = datetime.now(UTC) + timedelta(hours=1) if delayed else None
        self.do(self.queues["a"].put_many([replace(job, retry_time=retry_time) for job in jobs]))
        for job in jobs:
            self.model.put(job, delayed=delayed)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), delayed=st.booleans())
    def put_again(self, data: st.DataObject, delayed: bool) -> None:
        waiting = [job for job in self.jobs if self.model.undelivered(job)]
        if waiting:
            self.put([data.draw(st.sampled_from(waiting))], delayed=delayed)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs))
        self.do(self.queues["a"].remove(job))
        self.model.remove(job)

    @rule(worker=st.sampled_from("abc"), count=st.integers(1, 6))
    def take(self, worker: str, count: int) -> None:
        expected = self.model.take(worker, count, silent=worker == "c")
        if not expected and worker != "c":
            return  # it would wait two seconds to find nothing
        entries = self.do(self.queues[worker].take([POOL], count=count))
        assert [(entry.job_id, entry.taken_over) for entry in entries] == [(job.job_id, over) for _, job, over in expected]
        for (number, job, taken_over), entry in zip(expected, entries, strict=True):
            assert taken_over == (number in self.entries)  # nobody else has what is delivered for the first time
            self.entries[number] = worker, entry, job

    @rule(worker=st.sampled_from("ab"), count=st.integers(1, 6))
    def take_and_be_cancelled(self, worker: str, count: int) -> None:
        async def cancelled() -> None:
            task = asyncio.create_task(self.queues[worker].take([POOL], count=count))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()

        self.do(cancelled())
        self.model.untake(self.model.take(worker, count, silent=False))

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), handed_back=st.booleans())
    def finish(self, data: st.DataObject, handed_back: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.entries)))
        worker, entry, job = self.entries.pop(number)
        if handed_back:
            self.put([job], delayed=False)
        for stranger in {"a", "b", "c"} - {worker}:
            self.do(self.queues[stranger].done(entry))
        self.do(self.queues[worker].done(entry))
        self.model.done(number, job)

    @invariant()
    def what_waits_is_what_the_model_says(self) -> None:
        expected = {
            level: Depth(len(self.model.stream[level]) + len(self.model.waiting[level]), len(self.model.delayed[level]))
            for level in Priority
        }
        assert self.do(self.queues["a"].depth(POOL)) == expected
        assert self.do(self.queues["a"].missing(self.jobs)) == [job for job in self.jobs if not self.model.undelivered(job)]

    @invariant()
    def limits_are_kept(self) -> None:
        held = Counter(job.owner_id for _, _, job in self.entries.values())
        assert held == +self.model.running

    def teardown(self) -> None:
        async def forget() -> None:
            await self.client.flushdb()

        self.do(forget())


def test_any_sequence_of_operations_does_what_the_model_does(redis_url: str):
    with asyncio.Runner() as runner:

        async def connect() -> Any:
            return streams.connect(RedisSettings.model_validate({"redis_url": redis_url.removesuffix("/0") + "/7"}), blocking=True)

        QueueMachine.run, QueueMachine.client = runner, runner.run(connect())
        try:
            run_machine(QueueMachine, examples=EXAMPLES, steps=STEPS)
        finally:
            runner.run(QueueMachine.client.aclose())


# --- other servers ------------------------------------------------------------------------------------------------------


async def smoke(queues: Queues, pools: Sequence[str]) -> None:
    """Everything once, over several pools."""
    queue, other = queues.queue(limits={FREE: 2}, lease_s=LEASE_S), queues.queue("other", limits={FREE: 2}, lease_s=LEASE_S)
    owner = uuid.uuid4()
    jobs = [job for pool in pools for job in owned(owner, 3, pool=pool)]
    delayed = new_job(uuid.uuid4(), pool=pools[0], retry_time=datetime.now(UTC) + timedelta(seconds=0.05))
    await queue.put_many([*jobs, delayed])
    for pool in pools:
        assert await queue.lost(pool)
        await queue.rebuilt(pool)
        assert not await queue.lost(pool)
        await eventually(lambda pool=pool: queue.settled(pool))
    assert await queue.missing([*jobs, delayed]) == []
    taken: list[Entry] = []
    while len(taken) < 2 * len(pools) + 1:  # two of the owner in each pool, and the delayed one
        taken += await within(queue.take(pools, count=10, warm=["another"]))
    assert sum(entry.owner_id == owner for entry in taken) == 2 * len(pools)
    for entry in taken:
        assert await queue.renew(entry) is Hold.HELD
        assert await queue.alive(entry.stream, entry.job_id)
        assert await queue.holder(entry.stream, entry.entry_id) == "one"
    over = await take(other, pools)
    assert over.taken_over
    assert await queue.renew(over) is Hold.TAKEN
    await other.done(over)
    await queue.done_many(taken)
    cancelled = asyncio.create_task(queue.take(pools, count=10))
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    rest = await within(queue.take(pools, count=10))
    assert sorted(ids(rest)) == sorted(ids(jobs[2::3]))
    assert not any(entry.taken_over for entry in rest)
    await queue.done_many(rest)
    assert await queue.take(pools) == []
    assert sorted(ids(await queue.missing([*jobs, delayed]))) == sorted(ids([*jobs, delayed]))


@pytest.mark.parametrize("program", programs())
async def test_it_works_on_any_server(program: str, tmp_path: Path, ports: list[int]):
    server = RedisProcess(tmp_path / "redis", ports[0], program=program)
    try:
        await server.start()
        async with redis.Redis(host=LOOPBACK, port=server.port) as client:
            await smoke(Queues(client), ["one", "two"])
    finally:
        server.kill()


@pytest_asyncio.fixture
async def cluster(redis_cluster: list[RedisProcess]) -> AsyncIterator["RedisCluster"]:
    """A client of a cluster of three masters."""
    client = RedisCluster(host=LOOPBACK, port=redis_cluster[0].port)
    try:
        yield client
    finally:
        await client.aclose()


async def test_it_works_on_a_cluster(cluster: "RedisCluster"):
    queues = Queues(cluster)
    await cluster.initialize()

    def node(pool: str) -> Any:
        return cluster.get_node_from_key(f"{{{queues.prefix}:queue:{pool}}}:1")

    second = next(name for number in range(1000) if node(name := f"pool{number}") != node("one"))
    await smoke(queues, ["one", second])


async def test_a_pool_that_a_node_of_a_cluster_lost_is_lost_and_the_others_are_not(cluster: "RedisCluster"):
    queues = Queues(cluster)
    queue = queues.queue()
    await cluster.initialize()
    pools = ["one", *(f"pool{number}" for number in range(50))]
    nodes = {pool: cluster.get_node_from_key(f"{{{queues.prefix}:queue:{pool}}}:1") for pool in pools}
    other = next(pool for pool in pools if nodes[pool] != nodes["one"])
    for pool in ("one", other):
        await queue.rebuilt(pool)
    await cluster.execute_command("FLUSHALL", target_nodes=nodes["one"])
    assert (await queue.lost("one"), await queue.lost(other)) == (True, False)
    job_id = await put(queue, pool="one")
    assert (await take(queue, ["one", other])).job_id == job_id
