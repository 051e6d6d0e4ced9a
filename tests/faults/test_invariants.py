"""The checker itself: for every kind of damage there is a line that says so."""

import asyncpg
import pytest

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import User
from tests.faults import invariants
from tests.faults.conftest import quick
from tests.faults.mesh import Mesh
from tests.faults.witness import Witness

COMPLETED = "(SELECT job_id FROM jobs.jobs WHERE state = 3 ORDER BY job_id DESC LIMIT 1)"
DAMAGES = {
    "running job": (
        f"UPDATE jobs.jobs SET state = 2, finish_time = NULL, cost = NULL WHERE job_id = {COMPLETED}",
        ["not ended", "running job without its hold", "not at its cost"],
    ),
    "price": (
        f"UPDATE jobs.jobs SET cost = cost - 1 WHERE job_id = {COMPLETED}",
        ["as its cost says", "not at its cost", "did not cost its price"],
    ),
    "lost job": (f"DELETE FROM jobs.jobs WHERE job_id = {COMPLETED}", ["lost", "object without a job"]),
    "lost hold": (
        f"UPDATE jobs.jobs SET job_id = gen_random_uuid() WHERE job_id = {COMPLETED}",
        ["hold missing", "without exactly one settling event", "nobody asked for", "lost", "object without a job"],
    ),
    "balance": (
        "UPDATE credits.accounts SET available_millicredits = available_millicredits + 1",
        ["balance differs from entries"],
    ),
    "asset": (f"UPDATE jobs.jobs SET assets = '{{}}' WHERE job_id = {COMPLETED}", ["has assets of kinds"]),
    "duty": (f"INSERT INTO jobs.outbox (job_id, duty) SELECT {COMPLETED}, 1", ["not ended: duty 1"]),
    "stray hold": (
        "SELECT credits.reserve(gen_random_uuid(), gen_random_uuid(), user_id, 1, '1 day') FROM credits.accounts"
        " WHERE available_millicredits > 0 LIMIT 1",
        ["hold of an ended job, of an earlier round, or of no job"],
    ),
    "second payment": (
        f"SELECT credits.reserve('00000000-0000-4000-8000-000000000001', job_id, owner_id, 7, '1 day'),"
        f" credits.capture('00000000-0000-4000-8000-000000000001', 7) FROM jobs.jobs WHERE job_id = {COMPLETED}",
        ["paid for more than once"],
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
async def test_damage_is_found(mesh: Mesh, alice: User, name: str) -> None:
    job = await mesh.submit(alice, quick())
    await mesh.until_row(job.job_id, lambda row: row["state"] >= jobs_pb2.STATE_COMPLETED)
    assert not await invariants.drained(mesh)
    statement, signs = DAMAGES[name]
    async with mesh.controls.superuser() as connection:
        transaction = connection.transaction()
        await transaction.start()  # never committed: only this connection sees the damage
        try:
            await damage(connection, statement)
            violations = await invariants.check(mesh, connection=connection)
        finally:
            await transaction.rollback()
    for sign in signs:
        assert any(sign in violation for violation in violations), (sign, violations)


async def damage(connection: asyncpg.Connection, statement: str) -> None:
    # The tables defend themselves; whoever damages them all the same has to get past that.
    await connection.execute("SET LOCAL session_replication_role = replica")
    await connection.execute(statement)


async def test_a_job_answered_twice_is_found(mesh: Mesh, alice: User) -> None:
    job = await mesh.submit(alice, quick())
    key = next(key for key, job_ids in mesh.asked.accepted.items() if job.job_id in job_ids)
    mesh.asked.accepted[key].add("00000000-0000-4000-8000-000000000000")
    try:
        violations = list(invariants.promises(mesh.asked, {}))
    finally:
        mesh.asked.accepted[key].discard("00000000-0000-4000-8000-000000000000")
    assert any("several jobs" in violation for violation in violations)
    assert any(job.job_id in violation and "does not exist" in violation for violation in violations)
    await mesh.until_row(job.job_id, lambda row: row["state"] >= jobs_pb2.STATE_COMPLETED)


def state(sequence: int, state: "jobs_pb2.State.ValueType", attempt: int = 1) -> jobs_pb2.WatchJobsResponse:
    return jobs_pb2.WatchJobsResponse(
        event=jobs_pb2.JobEvent(
            job_id="j", sequence=sequence, attempt=attempt, state_change=jobs_pb2.StateChange(state=state, job=jobs_pb2.Job(job_id="j"))
        )
    )


def progress(sequence: int, attempt: int = 1) -> jobs_pb2.WatchJobsResponse:
    return jobs_pb2.WatchJobsResponse(
        event=jobs_pb2.JobEvent(job_id="j", sequence=sequence, attempt=attempt, progress=jobs_pb2.Progress(step=1))
    )


RUNS, DONE, FAILED, WAITS = jobs_pb2.STATE_PROCESSING, jobs_pb2.STATE_COMPLETED, jobs_pb2.STATE_FAILED, jobs_pb2.STATE_PENDING


@pytest.mark.parametrize(
    ("messages", "sign"),
    [
        ([state(1, RUNS), progress(2), state(3, DONE)], ""),
        ([state(1, RUNS), state(2, FAILED), state(3, WAITS, 0), state(4, RUNS), state(5, DONE)], ""),
        ([state(1, RUNS), progress(2), progress(2), state(3, DONE)], "came after 2"),
        ([state(2, RUNS), progress(1), state(3, DONE)], "came after 2"),
        ([state(1, RUNS), state(2, DONE), state(3, DONE)], "came after its end"),
        ([state(1, RUNS), state(2, DONE), progress(3)], "came after its end"),
        ([state(1, RUNS), state(2, RUNS, 2), progress(3), state(4, DONE, 2)], "came after attempt 2 had begun"),
        ([state(1, RUNS)], "its watcher knows"),
        ([state(1, RUNS), state(2, FAILED)], "its watcher knows"),
    ],
    ids=["well", "retried", "twice", "backwards", "two ends", "after the end", "not fenced", "no end", "another end"],
)
async def test_what_a_watcher_must_not_see_is_found(alice: User, messages: list[jobs_pb2.WatchJobsResponse], sign: str) -> None:
    seen = Witness(alice)
    seen.messages += messages
    violations = list(invariants.watched(seen, {"j": {"state": DONE}}))
    assert bool(violations) == bool(sign), violations
    assert any(sign in violation for violation in violations) or not sign
