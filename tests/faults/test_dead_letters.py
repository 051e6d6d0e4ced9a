"""A job that failed for good is put back: it is held anew, run anew, and charged once."""

import asyncio

import pytest

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import Method, Refusal, User
from tests.faults.conftest import NewWitness, quick
from tests.faults.mesh import WORKERS, Mesh

RETRY_JOB = Method(
    "/genmesh.jobs.v1.JobsService/RetryJob", jobs_pb2.RetryJobRequest, jobs_pb2.RetryJobResponse, "POST", "/v1/jobs/{jobId}:retry"
)


async def failed(mesh: Mesh, user: User) -> jobs_pb2.Job:
    """A job that was the death of three workers."""
    for worker in WORKERS:
        mesh.controls.freeze(worker)
    job = await mesh.submit(user, quick())
    for worker in WORKERS:
        mesh.controls.arm(worker, "event", match=(job.job_id, "progress {"), always=True)
        mesh.controls.thaw(worker)
    row = await mesh.until_row(job.job_id, lambda row: row["state"] >= jobs_pb2.STATE_COMPLETED)
    assert row["state"] == jobs_pb2.STATE_FAILED
    for worker in WORKERS:
        mesh.controls.disarm(worker, "event")
    return job


async def retry(mesh: Mesh, user: User, job_id: str) -> None:
    try:
        await mesh.patiently(lambda: user.call(RETRY_JOB, jobs_pb2.RetryJobRequest(job_id=job_id)))
    except Refusal as refusal:
        # The answer to the first call was lost, and when it was made again, the job had run already.
        assert refusal.reason == "JOB_NOT_FAILED"  # noqa: PT017


async def check_charged_once(mesh: Mesh, user: User, job: jobs_pb2.Job, before: int) -> None:
    row = await mesh.until_row(job.job_id, lambda row: row["state"] >= jobs_pb2.STATE_COMPLETED)
    assert (row["state"], row["retry_count"]) == (jobs_pb2.STATE_COMPLETED, 1)
    assert await mesh.patiently(user.settled) == (before - job.estimated_cost_millicredits, 0)


async def test_it_is_retried_many_times_at_once(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    before, _ = await alice.balance()
    everything = await witness(alice)
    job = await failed(mesh, alice)
    await asyncio.gather(*(retry(mesh, alice, job.job_id) for _ in range(5)))
    await check_charged_once(mesh, alice, job, before)
    await everything.until(lambda: everything.states().get(job.job_id) == jobs_pb2.STATE_COMPLETED)


@pytest.mark.parametrize(("process", "point"), [("credits", "hold-committed"), ("jobs", "credits-held"), ("jobs", "job-committed")])
async def test_a_process_dies_while_it_is_retried(mesh: Mesh, alice: User, process: str, point: str) -> None:
    before, _ = await alice.balance()
    job = await failed(mesh, alice)
    await mesh.patiently(alice.settled)
    mesh.controls.arm(process, point)
    await retry(mesh, alice, job.job_id)
    assert mesh.controls.strikes(process, point)
    await check_charged_once(mesh, alice, job, before)
