"""PostgreSQL is restarted, its connections are cut, its locks are held: calls end soon, a retry heals them, the pool comes back."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable

import asyncpg
import grpc
import pytest

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import CREATE_JOB, Refusal, User, submission
from tests.faults.conftest import NewWitness, quick, slow
from tests.faults.mesh import POLL_S, WORKERS, Mesh

HEALED_S = 5.0
"""How long a pool may take to be of use again once PostgreSQL is."""
BUSY = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
MORE_THAN_A_POOL = 12
CUTS = 10
DEADLINE_S = 20.0
"""What a client would set: a statement may take 10 s."""


async def all_completed(mesh: Mesh, jobs: list[jobs_pb2.Job]) -> None:
    for job in jobs:
        row = await mesh.until_row(job.job_id, lambda row: row["state"] >= jobs_pb2.STATE_COMPLETED)
        assert row["state"] == jobs_pb2.STATE_COMPLETED, dict(row)


async def outcome(call: Callable[[], Awaitable[object]]) -> grpc.StatusCode:
    """How a call ends within the deadline of its client."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            await call()
    except Refusal as refusal:
        return refusal.code
    return grpc.StatusCode.OK


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGQUIT, signal.SIGINT], ids=["killed", "immediate", "fast"])
async def test_postgres_is_restarted(mesh: Mesh, alice: User, witness: NewWitness, number: signal.Signals) -> None:
    jobs = [await mesh.submit(alice, slow()) for _ in WORKERS]
    watching = await witness(alice)
    await watching.progressed(jobs[0].job_id, 2)
    submits = [asyncio.create_task(mesh.submit(alice, quick())) for _ in range(6)]
    await mesh.controls.restart("postgres", number)
    back = time.monotonic()
    await mesh.patiently(alice.jobs)
    assert time.monotonic() - back < HEALED_S
    jobs += await asyncio.gather(*submits)
    await all_completed(mesh, jobs)
    await watching.ended(*(job.job_id for job in jobs))


async def test_connections_are_cut_again_and_again(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    watching = await witness(alice)
    submits = [asyncio.create_task(mesh.submit(alice, quick())) for _ in range(10)]
    for _ in range(CUTS):
        await mesh.controls.end_connections()
        await asyncio.sleep(POLL_S)
    jobs = list(await asyncio.gather(*submits))
    await all_completed(mesh, jobs)
    await watching.ended(*(job.job_id for job in jobs))


async def test_the_pool_is_exhausted(mesh: Mesh, alice: User) -> None:
    async with mesh.controls.locked("jobs.requests"):
        codes = await asyncio.gather(*(outcome(lambda: alice.call(CREATE_JOB, submission(quick()))) for _ in range(MORE_THAN_A_POOL)))
    assert set(codes) <= BUSY
    assert grpc.StatusCode.RESOURCE_EXHAUSTED in codes, "whoever found no connection was told so"
    free = time.monotonic()
    await mesh.patiently(alice.jobs)
    await all_completed(mesh, [await mesh.submit(alice, quick())])
    assert time.monotonic() - free < HEALED_S * 2


async def test_the_ledger_is_locked(mesh: Mesh, alice: User) -> None:
    async with mesh.controls.locked("credits.accounts"):
        codes = await asyncio.gather(*(outcome(lambda: alice.call(CREATE_JOB, submission(quick()))) for _ in range(3)))
    assert set(codes) <= BUSY
    await all_completed(mesh, [await mesh.submit(alice, quick())])


async def test_a_deadlock(mesh: Mesh, alice: User) -> None:
    for worker in WORKERS:
        mesh.controls.freeze(worker)
    job = await mesh.submit(alice, quick())
    mesh.controls.freeze("relay")  # it would be in the way of the locks below
    async with mesh.controls.locked("jobs.outbox") as connection:
        cancel = asyncio.create_task(outcome(lambda: alice.cancel(job.job_id)))
        # The cancel has the job's row and waits for the outbox; now we want the row.
        await until_waiting(connection, "jobs.outbox")
        row = await connection.fetchrow("SELECT state FROM jobs.jobs WHERE job_id = $1::uuid FOR UPDATE", job.job_id)
        assert row is not None
        assert row["state"] == jobs_pb2.STATE_PENDING, "PostgreSQL ended the other transaction"
        code = await asyncio.wait_for(cancel, DEADLINE_S) if cancel.done() else None
        assert code in (None, grpc.StatusCode.UNAVAILABLE)
    assert await cancel in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
    assert await mesh.cancel(alice, job.job_id) is not None
    assert (await mesh.row(job.job_id))["state"] == jobs_pb2.STATE_CANCELLED


async def until_waiting(connection: asyncpg.Connection, table: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = $1::regclass", table):  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
