"""Floods: of paid work, or of one user's. Others keep their share."""

import asyncio

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import User
from tests.faults.conftest import quick
from tests.faults.mesh import Mesh

FLOOD = 24


async def finish_order(mesh: Mesh, jobs: list[jobs_pb2.Job]) -> list[str]:
    """Job ids in the order in which they started."""
    rows = [await mesh.until_row(job.job_id, lambda row: row["state"] >= jobs_pb2.STATE_COMPLETED) for job in jobs]
    return [str(row["job_id"]) for row in sorted(rows, key=lambda row: row["start_time"])]


async def flooded(mesh: Mesh, many: User, few: User) -> tuple[int, int]:
    """One user floods the queue, another then submits one job: after how many of the flood it started, and of how many."""
    flood = list(await asyncio.gather(*(mesh.submit(many, quick()) for _ in range(FLOOD))))
    one = await mesh.submit(few, quick())
    behind = sum([(await mesh.row(job.job_id))["state"] >= jobs_pb2.STATE_PROCESSING for job in flood])
    order = await finish_order(mesh, [*flood, one])
    return order.index(one.job_id) - behind, FLOOD - behind


async def test_paid_work_does_not_starve_free_work(mesh: Mesh) -> None:
    place, waiting = await flooded(mesh, await mesh.new_user(pro=True), await mesh.new_user())
    assert place <= waiting / 2, f"started after {place} of {waiting} that waited"


async def test_one_users_flood_does_not_hold_up_others(mesh: Mesh) -> None:
    place, waiting = await flooded(mesh, await mesh.new_user(), await mesh.new_user())
    assert place <= waiting / 4, f"started after {place} of {waiting} that waited"
