"""The queue over a real Redis: weights, leases, loss."""

import asyncio
import time
import uuid
from typing import Any

import pytest

from jobs_service.lifecycle import Priority
from jobs_service.queue import Entry, Hold, JobQueue
from tests.service.jobs.world import POOL, World, eventually, running, within

LEASE_S = 0.4


@pytest.fixture
def one(world: World) -> JobQueue:
    return world.worker_queue("one", lease_s=LEASE_S)


@pytest.fixture
def other(world: World) -> JobQueue:
    return world.worker_queue("other", lease_s=LEASE_S)


async def take(queue: JobQueue) -> Entry:
    """The next entry, however long it takes."""

    async def next_one() -> Entry:
        while True:
            entry = await queue.take([POOL])
            if entry is not None:
                return entry

    return await within(next_one())


async def put(queue: JobQueue, priority: Priority = Priority.FREE) -> uuid.UUID:
    job_id = uuid.uuid4()
    await queue.put(POOL, priority, job_id)
    return job_id


async def test_an_entry_is_taken_once_and_gone_when_done(world: World, one: JobQueue, other: JobQueue):
    job_id = await put(one)
    entry = await take(one)
    assert (entry.job_id, entry.taken_over) == (job_id, False)
    assert await one.holder(entry.stream, entry.entry_id) == "one"
    assert await other.take([POOL]) is None
    await one.done(entry)
    assert await world.client.xlen(entry.stream) == 0
    assert await one.holder(entry.stream, entry.entry_id) is None


async def test_entries_of_a_level_come_in_order(one: JobQueue):
    jobs = [await put(one) for _ in range(5)]
    assert [(await take(one)).job_id for _ in jobs] == jobs


async def test_paid_work_goes_first_and_free_work_does_not_starve(one: JobQueue):
    free = {await put(one, Priority.FREE) for _ in range(4)}
    for _ in range(16):
        await put(one, Priority.PRO)
    order: list[str] = []
    for _ in range(16):
        entry = await take(one)
        order.append("free" if entry.job_id in free else "pro")
        await one.done(entry)
    assert order == ["pro", "pro", "pro", "free"] * 4


async def test_a_level_with_nothing_in_it_costs_the_other_nothing(one: JobQueue):
    free = [await put(one, Priority.FREE) for _ in range(6)]
    assert [(await take(one)).job_id for _ in free] == free


async def test_a_waiting_worker_hears_of_a_new_job_at_once(world: World):
    patient = world.worker_queue("patient", lease_s=60)
    waiting = asyncio.create_task(take(patient))
    await eventually(lambda: _blocked(world))
    job_id = await put(patient)
    async with asyncio.timeout(1.5):  # it would look again by itself after two seconds
        assert (await waiting).job_id == job_id


async def _blocked(world: World) -> bool:
    return any(entry["cmd"] == "xread" for entry in await world.client.client_list())


async def test_a_silent_workers_entry_is_claimed_after_the_lease_and_not_before(one: JobQueue, other: JobQueue):
    job_id = await put(one)
    await take(one)
    start = time.monotonic()
    entry = await take(other)
    assert (entry.job_id, entry.taken_over) == (job_id, True)
    assert time.monotonic() - start >= LEASE_S * 0.95
    assert await one.renew(Entry(entry.stream, entry.entry_id, job_id, False)) is Hold.TAKEN


async def test_an_entry_that_is_renewed_stays(one: JobQueue, other: JobQueue):
    job_id = await put(one)
    entry = await take(one)
    end = time.monotonic() + 3 * LEASE_S
    while time.monotonic() < end:
        assert await one.renew(entry) is Hold.HELD
        assert await other.take([POOL]) is None  # waits a tenth of a lease
    assert (await take(other)).job_id == job_id  # and is claimed once it is renewed no more


async def test_a_dead_worker_is_found_behind_many_live_ones(one: JobQueue, other: JobQueue):
    for _ in range(25):
        await put(one)
    live = [await take(one) for _ in range(24)]
    dead = await take(one)

    async def keep_alive() -> None:
        while True:
            for entry in live:
                await one.renew(entry)
            await asyncio.sleep(LEASE_S / 8)

    async with running(keep_alive()):
        assert (await take(other)).job_id == dead.job_id
        assert await other.take([POOL]) is None


async def test_a_worker_that_lost_its_entry_cannot_remove_it(world: World, one: JobQueue, other: JobQueue):
    await put(one)
    entry = await take(one)
    taken = await take(other)
    await one.done(entry)
    assert await other.renew(taken) is Hold.HELD
    assert await world.client.xlen(entry.stream) == 1
    await other.done(taken)
    assert await world.client.xlen(entry.stream) == 0


async def test_groups_come_back_after_redis_was_emptied(world: World, one: JobQueue):
    await put(one)
    entry = await take(one)
    await world.client.flushdb()
    assert await one.renew(entry) is Hold.GONE
    assert await one.holder(entry.stream, entry.entry_id) is None
    await one.done(entry)  # nothing to remove, nothing breaks
    job_id = await put(one)  # before any worker made the group again
    assert (await take(one)).job_id == job_id


async def test_a_worker_says_that_it_is_alive_also_when_its_entry_is_gone(world: World, one: JobQueue):
    job_id = await put(one)
    entry = await take(one)
    await world.client.flushdb()
    assert not await one.alive(entry.stream, job_id)
    await one.renew(entry)
    assert await one.alive(entry.stream, job_id)
    await eventually(lambda: _silent(one, entry))


async def _silent(queue: JobQueue, entry: Entry) -> bool:
    return not await queue.alive(entry.stream, entry.job_id)


async def test_the_queue_knows_when_it_was_lost_and_when_it_has_settled(world: World, one: JobQueue):
    assert await one.lost()
    await one.rebuilt()
    assert not await one.lost()
    assert not await one.settled()
    await eventually(one.settled)
    await world.client.flushdb()
    assert await one.lost()
    assert not await one.settled()


async def test_another_process_of_redis_counts_as_a_loss(world: World, one: JobQueue):
    await one.rebuilt()
    key = f"{{{world.prefix}:queue}}:mark"
    mark: Any = await world.client.get(key)
    await world.client.set(key, b"another-run-id " + mark.partition(b" ")[2])
    assert await one.lost()
    assert not await one.settled()
