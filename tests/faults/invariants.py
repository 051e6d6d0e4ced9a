"""The invariants of the mesh, checked in one function over whole databases: after every fault test, and after a schedule.

`check` looks with the rights of the superuser, past every service, and says what it finds wrong.
"""

import asyncio
import hashlib
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import asyncpg
import boto3
from botocore.config import Config

from genmesh.jobs.v1 import jobs_pb2
from tests.faults.mesh import Asked, Mesh
from tests.faults.witness import Witness

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

DRAINED_S = 90.0
"""By then everything that was asked for has ended, after whatever fault: the slowest way is a request that is given up after 20 s."""
POLL_S = 0.05

UNFINISHED = """
SELECT 'job ' || job_id || ' in state ' || state || ', attempt ' || attempt FROM jobs.jobs WHERE state < 3
UNION ALL SELECT 'duty ' || duty || ' of job ' || job_id || ', tried ' || failures || ' times' FROM jobs.outbox
UNION ALL SELECT 'request ' || request_id || ' that is no job' FROM jobs.requests WHERE intent IS NOT NULL
UNION ALL SELECT 'retry of job ' || job_id FROM jobs.retries
UNION ALL SELECT 'media of deleted job ' || job_id FROM jobs.deletions
"""

MONEY = {
    # 1. The books, as `genmesh admin ledger audit` sees them.
    "the books": "SELECT problem || ' ' || subject FROM credits.discrepancies",
    "entries do not sum to zero": "SELECT sum(amount_millicredits)::text FROM credits.entries HAVING sum(amount_millicredits) <> 0",
    "negative balance": """
        SELECT user_id::text FROM credits.accounts WHERE available_millicredits < 0 OR reserved_millicredits < 0""",
    # 2. Every job ends in exactly one final state with exactly one capture or one release.
    "ended job whose hold was not settled as its cost says": """
        SELECT j.job_id || ': cost ' || j.cost || ', hold ' || coalesce(r.state, 'missing') || ' ' || coalesce(r.captured_millicredits, 0)
        FROM jobs.jobs j LEFT JOIN credits.reservations r ON r.reservation_id = coalesce(j.reservation_id, j.job_id)
        WHERE j.state >= 3 AND (r.state, r.captured_millicredits)
            IS DISTINCT FROM (CASE WHEN j.cost > 0 THEN 'captured' ELSE 'released' END, j.cost)""",
    "ended job without exactly one settling event": """
        SELECT j.job_id || ': ' || count(e.event_id) FROM jobs.jobs j
        LEFT JOIN credits.events e ON e.reservation_id = coalesce(j.reservation_id, j.job_id) AND e.kind IN ('capture', 'release', 'expire')
        WHERE j.state >= 3 GROUP BY j.job_id HAVING count(e.event_id) <> 1""",
    "job that was paid for more than once, or not at its cost": """
        SELECT j.job_id || ': cost ' || coalesce(j.cost, 0) || ', paid ' || sum(r.captured_millicredits)
        FROM jobs.jobs j JOIN credits.reservations r ON r.job_id = j.job_id
        GROUP BY j.job_id HAVING sum(r.captured_millicredits) <> coalesce(j.cost, 0)""",
    "job that another one's owner pays": """
        SELECT j.job_id::text FROM jobs.jobs j JOIN credits.reservations r ON r.job_id = j.job_id WHERE r.user_id <> j.owner_id""",
    "hold of an ended job, of an earlier round, or of no job": """
        SELECT r.reservation_id::text FROM credits.reservations r LEFT JOIN jobs.jobs j ON j.job_id = r.job_id
        WHERE r.state = 'held' AND (j.job_id IS NULL OR j.state >= 3 OR r.reservation_id <> coalesce(j.reservation_id, j.job_id))""",
    "running job without its hold": """
        SELECT j.job_id::text FROM jobs.jobs j LEFT JOIN credits.reservations r ON r.reservation_id = coalesce(j.reservation_id, j.job_id)
        WHERE j.state < 3 AND (r.state, r.amount_millicredits) IS DISTINCT FROM ('held', j.estimated_cost)""",
    "completed job that did not cost its price, or failed job that cost anything": """
        SELECT job_id::text FROM jobs.jobs WHERE (state = 3 AND cost <> estimated_cost) OR (state = 4 AND cost <> 0)""",
    "job that nobody asked for": """
        SELECT j.job_id::text FROM jobs.jobs j LEFT JOIN jobs.requests q ON q.job_id = j.job_id AND q.owner_id = j.owner_id
        WHERE q.job_id IS NULL""",
}
"""SQL that finds violations: a line of text for each."""

_verified: dict[tuple[str, str], str] = {}
"""SHA-256 of objects read before, by key and ETag: the store is checked whole each time, but an object that is the same is read once."""


async def drained(mesh: Mesh, *, within_s: float = DRAINED_S) -> list[str]:
    """Wait until nothing is pending, running or owed; what is left after `within_s`."""
    deadline = time.monotonic() + within_s
    while True:
        left = [row[0] for row in await mesh.patiently_sql(UNFINISHED)]
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(POLL_S)


async def check(mesh: Mesh, witnesses: Sequence[Witness] = (), *, connection: "asyncpg.Connection | None" = None) -> list[str]:
    """Everything that is wrong, in words; all is to be drained before. `connection`: look with this one (in its transaction)."""
    if connection is None:
        async with mesh.controls.superuser() as own:
            audited = [f"the ledger's own audit: {finding}" for finding in await mesh.audit()]
            return audited + await check(mesh, witnesses, connection=own)
    violations: list[str] = []
    for name, query in MONEY.items():
        violations += [f"{name}: {row[0]}" for row in await connection.fetch(query)]
    violations += [f"not ended: {row[0]}" for row in await connection.fetch(UNFINISHED)]
    rows = {str(row["job_id"]): row for row in await connection.fetch("SELECT * FROM jobs.jobs")}
    violations += promises(mesh.asked, rows)
    violations += await asyncio.to_thread(_media, mesh.stack.s3_environment, rows)
    for witness in witnesses:
        violations += watched(witness, rows)
    return violations


def promises(asked: Asked, rows: Mapping[str, asyncpg.Record]) -> Iterable[str]:
    """Every accepted job is there, and a repeated request is one job."""
    for (owner_id, request_id), job_ids in asked.accepted.items():
        if len(job_ids) != 1:
            yield f"request {request_id} was answered with several jobs: {sorted(job_ids)}"
        for job_id in job_ids - asked.deleted:
            if job_id not in rows:
                yield f"lost: accepted job {job_id} does not exist"
            elif str(rows[job_id]["owner_id"]) != owner_id:
                yield f"job {job_id} has another owner"


def _media(s3: Mapping[str, str], rows: Mapping[str, asyncpg.Record]) -> list[str]:
    """No object without its job; every asset of a completed job is stored whole."""
    client: S3Client = boto3.client(
        "s3",
        endpoint_url=s3["GENMESH_S3_ENDPOINT_URL"],
        region_name=s3["GENMESH_S3_REGION"],
        aws_access_key_id=s3["GENMESH_S3_ACCESS_KEY_ID"],
        aws_secret_access_key=s3["GENMESH_S3_SECRET_ACCESS_KEY"],
        config=Config(s3={"addressing_style": "path"}, connect_timeout=5, read_timeout=20, retries={"mode": "standard", "max_attempts": 5}),
    )
    bucket = s3["GENMESH_S3_BUCKET"]
    violations: list[str] = []
    stored: dict[str, tuple[str, int]] = {}
    try:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for item in page.get("Contents", ()):
                stored[item.get("Key", "")] = (item.get("ETag", ""), item.get("Size", -1))
        for key in stored:
            owner_id, _, rest = key.partition("/")
            job = rows.get(rest.partition("/")[0])
            if job is None or str(job["owner_id"]) != owner_id:
                violations.append(f"object without a job: {key}")
        for job_id, row in rows.items():
            assets = [jobs_pb2.Asset.FromString(asset) for asset in row["assets"]]
            if row["state"] != jobs_pb2.STATE_COMPLETED:
                if assets:
                    violations.append(f"job {job_id} did not complete and has assets")
                continue
            kinds = {asset.kind for asset in assets}
            if kinds != {jobs_pb2.Asset.KIND_IMAGE, jobs_pb2.Asset.KIND_THUMBNAIL}:
                violations.append(f"completed job {job_id} has assets of kinds {kinds}")
            for asset in assets:
                if asset.object_key not in stored:
                    violations.append(f"asset of completed job {job_id} is not stored: {asset.object_key}")
                    continue
                tag, size_bytes = stored[asset.object_key]
                if (asset.object_key, tag) not in _verified:
                    body = client.get_object(Bucket=bucket, Key=asset.object_key)["Body"].read()
                    _verified[asset.object_key, tag] = hashlib.sha256(body).hexdigest()
                if (size_bytes, _verified[asset.object_key, tag]) != (asset.size_bytes, asset.sha256):
                    violations.append(f"asset of completed job {job_id} is not what was promised: {asset.object_key}")
    finally:
        client.close()
    return violations


def watched(witness: Witness, rows: Mapping[str, Any]) -> Iterable[str]:
    """What one watcher saw: numbers that only grow, one end a round, attempts that are not overtaken, the true end."""
    events: defaultdict[str, list[jobs_pb2.JobEvent]] = defaultdict(list)
    for event in witness.events:
        events[event.job_id].append(event)
    for job_id, told in events.items():
        yield from _sequence(job_id, told)
    states = witness.states()
    for job_id in witness.job_ids or states:
        row = rows.get(job_id)
        if row is not None and states.get(job_id, 0) != row["state"]:
            known = f"{states.get(job_id)} ({witness.reconnects} reconnects)"
            yield f"job {job_id} ended in state {row['state']}, but its watcher knows {known}"


def _sequence(job_id: str, told: Sequence[jobs_pb2.JobEvent]) -> Iterable[str]:
    newest, attempt, over = 0, 0, False
    for event in told:
        if event.sequence <= newest:
            yield f"job {job_id}: event {event.sequence} came after {newest}"
        newest = max(newest, event.sequence)
        state = event.state_change.state if event.HasField("state_change") else None
        if state == jobs_pb2.STATE_PENDING and over:
            attempt, over = 0, False  # a failed job was put back: a new round
        elif over:
            yield f"job {job_id}: {event.WhichOneof('payload')} {event.sequence} came after its end"
        if event.attempt < attempt and not event.HasField("queue_update"):
            yield f"job {job_id}: {event.WhichOneof('payload')} of attempt {event.attempt} came after attempt {attempt} had begun"
        attempt = max(attempt, event.attempt)
        over = over or (state is not None and state >= jobs_pb2.STATE_COMPLETED)
