"""A job is cancelled while it waits, while it runs, as it ends, after it, twice, and under faults: one end, and one bill."""

import asyncio

import grpc
import pytest

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import Refusal, User
from tests.faults.conftest import NewWitness, quick, slow, very_slow
from tests.faults.mesh import WORKERS, Mesh

STATES = jobs_pb2.STATE_COMPLETED, jobs_pb2.STATE_CANCELLED


async def ended(mesh: Mesh, job_id: str) -> int:
    return (await mesh.until_row(job_id, lambda row: row["state"] >= jobs_pb2.STATE_COMPLETED))["state"]


async def test_while_it_waits(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    busy = [await mesh.submit(alice, very_slow()) for _ in WORKERS]
    job = await mesh.submit(alice, quick())
    watching = await witness(alice, job.job_id)
    first, second = await asyncio.gather(mesh.cancel(alice, job.job_id), mesh.cancel(alice, job.job_id))
    assert first is not None
    assert second is not None
    assert {first.state, second.state} == {jobs_pb2.STATE_CANCELLED}
    assert first.cost_millicredits == 0
    await watching.ended()
    for other in busy:
        await mesh.cancel(alice, other.job_id)
    for other in busy:
        assert await ended(mesh, other.job_id) == jobs_pb2.STATE_CANCELLED


async def test_while_it_runs(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    job = await mesh.submit(alice, very_slow())
    watching = await witness(alice, job.job_id)
    await watching.progressed(job.job_id, 3)
    await mesh.cancel(alice, job.job_id)
    steps_seen = max(event.progress.step for event in watching.events)
    await watching.ended()
    row = await mesh.row(job.job_id)
    assert row["state"] == jobs_pb2.STATE_CANCELLED
    assert row["cost"] == row["estimated_cost"] * row["steps_done"] // row["steps_agreed"]
    # It stops within a step; the machine may have done a few before the cancel got there.
    assert steps_seen <= row["steps_done"] < row["steps_agreed"] / 10


async def test_as_it_ends(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    """Cancels that meet the end from both sides: whoever is first, there is one end and one bill."""
    jobs = [await mesh.submit(alice, quick()) for _ in range(12)]
    watching = await witness(alice, *(job.job_id for job in jobs))

    async def cancel_late(job_id: str, step: int) -> None:
        await watching.until(
            lambda: (
                any(event.job_id == job_id and (event.progress.step >= step or event.HasField("asset")) for event in watching.events)
                or watching.states().get(job_id, 0) >= jobs_pb2.STATE_COMPLETED
            )
        )
        await mesh.cancel(alice, job_id)

    await asyncio.gather(*(cancel_late(job.job_id, 1 + index % 4) for index, job in enumerate(jobs)))
    await watching.ended()
    assert set(watching.states().values()) <= set(STATES)


async def test_after_it(mesh: Mesh, alice: User) -> None:
    job = await mesh.submit(alice, quick())
    assert await ended(mesh, job.job_id) == jobs_pb2.STATE_COMPLETED
    for _ in range(2):
        with pytest.raises(Refusal) as raised:
            await alice.cancel(job.job_id)
        assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_TERMINAL")


async def test_while_redis_is_silent(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    job = await mesh.submit(alice, very_slow())
    watching = await witness(alice, job.job_id)
    await watching.progressed(job.job_id, 2)
    async with mesh.controls.frozen("redis"):
        answered = await mesh.cancel(alice, job.job_id)
    assert answered is not None
    assert answered.cancel_requested
    assert await ended(mesh, job.job_id) == jobs_pb2.STATE_CANCELLED
    await watching.ended()


async def test_and_its_worker_dies(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    job = await mesh.submit(alice, very_slow())
    watching = await witness(alice, job.job_id)
    await watching.progressed(job.job_id, 2)
    worker = (await mesh.row(job.job_id))["worker_id"]
    mesh.controls.freeze(worker)
    await mesh.cancel(alice, job.job_id)
    mesh.controls.kill(worker)
    # Nobody starts it anew only to make what nobody wants.
    assert await ended(mesh, job.job_id) == jobs_pb2.STATE_CANCELLED
    assert (await mesh.row(job.job_id))["steps_done"] == 0
    await watching.ended()


async def test_many_at_once(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    jobs = [await mesh.submit(alice, slow() if index < len(WORKERS) else quick()) for index in range(12)]
    watching = await witness(alice)
    await asyncio.gather(*(mesh.cancel(alice, job.job_id) for job in jobs for _ in range(2)))
    for job in jobs:
        assert await ended(mesh, job.job_id) in STATES
    await watching.ended(*(job.job_id for job in jobs))
