"""Redis is emptied, killed, silent, full or forgetful: no job and no credit is lost, and watchers hear how it ends."""

import asyncio
import signal
from contextlib import suppress

import pytest

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import User
from tests.faults.conftest import NewWitness, quick, slow
from tests.faults.mesh import WORKERS, Mesh

BATCH = 6


async def some_of_each(mesh: Mesh, user: User) -> list[jobs_pb2.Job]:
    """Jobs that run, and jobs that wait."""
    jobs = [await mesh.submit(user, slow()) for _ in WORKERS]
    for job in jobs:
        await mesh.until_row(job.job_id, lambda row: row["state"] == jobs_pb2.STATE_PROCESSING)
    return jobs + [await mesh.submit(user, quick()) for _ in range(BATCH)]


async def all_completed(mesh: Mesh, jobs: list[jobs_pb2.Job]) -> None:
    for job in jobs:
        row = await mesh.until_row(job.job_id, lambda row: row["state"] >= jobs_pb2.STATE_COMPLETED)
        assert row["state"] == jobs_pb2.STATE_COMPLETED, dict(row)


async def test_redis_is_emptied(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    jobs = await some_of_each(mesh, alice)
    named, everything = await witness(alice, *(job.job_id for job in jobs)), await witness(alice)
    await mesh.controls.flush_redis()
    await all_completed(mesh, jobs)
    await named.ended()
    await everything.ended(*(job.job_id for job in jobs))
    # Work that was under way was not lost with it.
    for job in jobs[: len(WORKERS)]:
        assert (await mesh.row(job.job_id))["attempt"] == 1


async def test_redis_is_emptied_again_and_again(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    jobs = await some_of_each(mesh, alice)
    watching = await witness(alice, *(job.job_id for job in jobs))
    for job in jobs:
        await mesh.controls.flush_redis()
        await mesh.until_row(job.job_id, lambda row: row["state"] >= jobs_pb2.STATE_PROCESSING)
    await all_completed(mesh, jobs)
    await watching.ended()


async def test_redis_is_emptied_and_every_worker_dies(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    jobs = await some_of_each(mesh, alice)
    watching = await witness(alice, *(job.job_id for job in jobs))
    await mesh.controls.flush_redis()
    for worker in WORKERS:
        mesh.controls.kill(worker)
    await all_completed(mesh, jobs)
    await watching.ended()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_redis_is_restarted(mesh: Mesh, alice: User, witness: NewWitness, number: signal.Signals) -> None:
    jobs = await some_of_each(mesh, alice)
    watching = await witness(alice, *(job.job_id for job in jobs))
    await mesh.controls.restart("redis", number)
    await all_completed(mesh, jobs)
    await watching.ended()


async def test_redis_forgets_its_last_seconds(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    jobs = await some_of_each(mesh, alice)
    watching = await witness(alice, *(job.job_id for job in jobs))
    await watching.progressed(jobs[0].job_id, 8)
    restarts = mesh.controls.forget_redis()
    await mesh.controls.back("redis", restarts)
    await all_completed(mesh, jobs)
    await watching.ended()


async def test_jobs_are_accepted_while_redis_is_silent(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    watching = await witness(alice)
    before = mesh.asked.refusals
    async with mesh.controls.frozen("redis"):
        jobs = await asyncio.gather(*(mesh.submit(alice, quick()) for _ in range(3)))
        for job in jobs:
            assert (await mesh.row(job.job_id))["state"] == jobs_pb2.STATE_PENDING
    assert mesh.asked.refusals == before, "accepted at the first try"
    await all_completed(mesh, jobs)
    await watching.ended(*(job.job_id for job in jobs))


async def test_jobs_are_accepted_while_redis_is_down(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    watching = await witness(alice)
    down = asyncio.Event()

    async def keep_down() -> None:
        while True:
            killed = mesh.controls.pid("redis")
            mesh.controls.kill("redis")
            down.set()
            await mesh.stack.until(lambda: mesh.controls.pid("redis") not in (None, killed))  # noqa: B023

    keeping = asyncio.create_task(keep_down())
    try:
        await down.wait()
        jobs = await asyncio.gather(*(mesh.submit(alice, quick()) for _ in range(3)))
    finally:
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping
    await all_completed(mesh, jobs)
    await watching.ended(*(job.job_id for job in jobs))


async def test_redis_is_full(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    watching = await witness(alice)
    async with mesh.controls.redis() as client:
        await client.config_set("maxmemory", "1")
        try:
            jobs = [await mesh.submit(alice, quick()) for _ in range(2)]
            assert {(await mesh.row(job.job_id))["state"] for job in jobs} == {jobs_pb2.STATE_PENDING}
        finally:
            await client.config_set("maxmemory", "0")
    await all_completed(mesh, jobs)
    await watching.ended(*(job.job_id for job in jobs))
