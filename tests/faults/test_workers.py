"""A worker dies, freezes or is shot at the worst moment: its job runs again elsewhere, and is paid once."""

import pytest

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import User
from tests.faults.conftest import SLOW_STEPS, NewWitness, quick, slow
from tests.faults.mesh import LEASE_S, WORKERS, Mesh

GENEROUS = 5
"""Leases that a takeover may take here, on a machine that may be busy; the schedule measures it."""
MAX_ATTEMPTS = 3
REPLICAS = tuple(worker.replace("dispatch", "inference") for worker in WORKERS)


async def running_on(mesh: Mesh, job_id: str) -> str:
    return (await mesh.until_row(job_id, lambda row: row["state"] == jobs_pb2.STATE_PROCESSING))["worker_id"]


async def test_a_worker_is_killed_in_the_middle_of_a_step(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    job = await mesh.submit(alice, slow())
    watching = await witness(alice, job.job_id)
    await watching.progressed(job.job_id, 3)
    worker = await running_on(mesh, job.job_id)
    killed_time = (await mesh.patiently_sql("SELECT clock_timestamp()"))[0][0]
    mesh.controls.kill(worker)

    row = await mesh.until_row(job.job_id, lambda row: row["attempt"] == 2)
    assert (row["start_time"] - killed_time).total_seconds() < GENEROUS * LEASE_S
    await watching.ended()
    assert (await mesh.row(job.job_id))["state"] == jobs_pb2.STATE_COMPLETED
    attempts = [event.attempt for event in watching.events]
    assert attempts == sorted(attempts)
    assert {1, 2} <= set(attempts), "the watcher was told of both attempts"
    assert max(event.progress.step for event in watching.events if event.attempt == 1) < SLOW_STEPS
    sequences = [event.sequence for event in watching.events]
    assert sequences == list(range(sequences[0], sequences[0] + len(sequences))), "nothing is missing in between"


async def test_a_worker_that_was_thought_dead_changes_nothing(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    job = await mesh.submit(alice, slow())
    watching = await witness(alice, job.job_id)
    await watching.progressed(job.job_id, 3)
    frozen = await running_on(mesh, job.job_id)
    async with mesh.controls.frozen(frozen):
        row = await mesh.until_row(job.job_id, lambda row: row["attempt"] == 2)
        other = row["worker_id"]
        assert other != frozen
        await watching.progressed(job.job_id, 3, attempt=2)
    # Now both have it; what the first has to say comes too late.
    await watching.ended()
    row = await mesh.row(job.job_id)
    assert (row["state"], row["attempt"], row["worker_id"]) == (jobs_pb2.STATE_COMPLETED, 2, other)
    # The thawed worker is of use again.
    jobs = [await mesh.submit(alice, quick()) for _ in range(4)]
    for again in jobs:
        await mesh.until_row(again.job_id, lambda row: row["state"] == jobs_pb2.STATE_COMPLETED)


async def test_a_live_worker_keeps_its_job(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    # Longer than a lease, with another worker idle beside it.
    job = await mesh.submit(alice, slow())
    watching = await witness(alice, job.job_id)
    await watching.ended()
    assert {event.attempt for event in watching.events if event.HasField("progress")} == {1}


@pytest.mark.parametrize("what", ["replica", "model"])
async def test_a_replica_is_killed_in_the_middle_of_a_step(mesh: Mesh, alice: User, witness: NewWitness, what: str) -> None:
    job = await mesh.submit(alice, slow())
    watching = await witness(alice, job.job_id)
    await watching.progressed(job.job_id, 3)
    replica = (await running_on(mesh, job.job_id)).replace("dispatch", "inference")
    if what == "replica":
        mesh.controls.kill(replica)
    else:
        mesh.controls.kill_model(replica)
    await watching.ended()
    row = await mesh.row(job.job_id)
    assert row["state"] == jobs_pb2.STATE_COMPLETED
    assert row["attempt"] > 1


async def test_all_workers_are_killed_at_once(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    jobs = [await mesh.submit(alice, slow()) for _ in WORKERS] + [await mesh.submit(alice, quick()) for _ in range(4)]
    watching = await witness(alice, *(job.job_id for job in jobs))
    for job in jobs[: len(WORKERS)]:
        await watching.progressed(job.job_id, 2)
    for worker in WORKERS:
        mesh.controls.kill(worker)
    await watching.ended()
    assert set(watching.states().values()) == {jobs_pb2.STATE_COMPLETED}


@pytest.mark.parametrize("victim", ["dispatcher", "replica"])
async def test_a_poison_job_ends_as_a_dead_letter(mesh: Mesh, alice: User, witness: NewWitness, victim: str) -> None:
    before = await alice.balance()
    processes, point = (WORKERS, "event") if victim == "dispatcher" else (REPLICAS, "generation")

    def arm(*match: str) -> None:
        for process in processes:
            mesh.controls.arm(process, point, match=match, always=True)

    if victim == "dispatcher":
        poison = await mesh.submit(alice, slow("poison in a bottle"))
        arm(poison.job_id, "progress {")
    else:
        # First: it may be generated, and past the point, before the call has returned.
        arm("poison in a bottle")
        poison = await mesh.submit(alice, slow("poison in a bottle"))
    watching = await witness(alice, poison.job_id)
    neighbours = [await mesh.submit(alice, quick()) for _ in range(3)]
    row = await mesh.until_row(poison.job_id, lambda row: row["state"] >= jobs_pb2.STATE_COMPLETED)
    assert row["state"] == jobs_pb2.STATE_FAILED, "a dead letter"
    assert sum(mesh.controls.strikes(process, point) for process in processes) >= MAX_ATTEMPTS
    for process in processes:
        mesh.controls.disarm(process, point)
    for job in neighbours:
        await mesh.until_row(job.job_id, lambda row: row["state"] == jobs_pb2.STATE_COMPLETED)
    await watching.ended()
    paid = sum(job.estimated_cost_millicredits for job in neighbours)
    await alice.settled()
    assert (await alice.balance())[0] == before[0] - paid, "the hold of the dead letter went back"
