"""The media store refuses, hangs or dies: nothing is charged before what it is for is durable."""

import asyncio

import pytest

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import User
from tests.faults.conftest import NewWitness, quick
from tests.faults.mesh import Mesh


async def test_the_store_refuses_for_a_while(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    """As a store does whose disk is full."""
    before = await alice.balance()
    mesh.controls.refuse_media()
    job = await mesh.submit(alice, quick())
    watching = await witness(alice, job.job_id)
    # It is put back to be tried again, and nothing is charged as yet.
    row = await mesh.until_row(job.job_id, lambda row: row["state"] == jobs_pb2.STATE_PENDING and row["attempt"] >= 1)
    assert await alice.balance() == (before[0] - job.estimated_cost_millicredits, job.estimated_cost_millicredits)
    mesh.controls.accept_media()
    row = await mesh.until_row(job.job_id, lambda row: row["state"] >= jobs_pb2.STATE_COMPLETED)
    assert (row["state"], row["attempt"]) == (jobs_pb2.STATE_COMPLETED, 2)
    await watching.ended()


async def test_the_store_hangs(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    async with mesh.controls.frozen("s3"):
        job = await mesh.submit(alice, quick())
        watching = await witness(alice, job.job_id)
        await watching.until(lambda: any(event.progress.stage == jobs_pb2.STAGE_UPLOADING for event in watching.events))
        assert (await mesh.row(job.job_id))["state"] == jobs_pb2.STATE_PROCESSING
        assert (await alice.balance())[1] == job.estimated_cost_millicredits, "held, not charged"
    await watching.ended()
    assert (await mesh.row(job.job_id))["state"] == jobs_pb2.STATE_COMPLETED


@pytest.mark.parametrize("count", [6])
async def test_the_store_is_killed_under_load(mesh: Mesh, alice: User, witness: NewWitness, count: int) -> None:
    jobs = [await mesh.submit(alice, quick()) for _ in range(count)]
    watching = await witness(alice, *(job.job_id for job in jobs))
    for job in jobs[::2]:
        await watching.until(lambda: any(event.job_id == job.job_id and event.HasField("progress") for event in watching.events))  # noqa: B023
        await mesh.controls.restart("s3")
    await watching.ended()
    assert set(watching.states().values()) == {jobs_pb2.STATE_COMPLETED}
    await asyncio.gather(*(mesh.until_row(job.job_id, lambda row: bool(row["assets"])) for job in jobs))
