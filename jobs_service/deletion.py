"""What removes jobs for good: their owner, their age; and what removes media that no job has.

A job's row goes first, and a note comes in its place; then go its media and what Redis keeps of it, then the note. Whatever stops
that half-way, the note leads the relay back to it. docs/retention.md says what is kept for how long.
"""

import asyncio
import re
import uuid
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from genmesh.jobs.v1 import jobs_pb2
from jobs_service import store
from jobs_service.delivery import Delivery
from jobs_service.events import EventLog
from jobs_service.lifecycle import Job, State
from jobs_service.store import Duty
from servicekit.database import reading, transaction
from servicekit.errors import MeshError, Reason, not_found, precondition, unavailable
from servicekit.objects import ObjectStore, StoredObject

REMOVE_TIMEOUT_S = 5.0
"""How long a deletion waits for stores that are slow or away: below the time PostgreSQL allows a transaction to be idle."""
FINISH_AFTER_S = 30.0
"""Until then whoever deleted the job may still be at it."""
FINISH_BATCH = 100
MISSES_MAX = 3
"""Deletions that fail in a round before it stops: the store is away. Fewer would let one object that may not go hold up the rest."""
EXPIRE_BATCH = 500
REQUESTS_BATCH = 5_000
SWEEP_PAGES = 5
"""Pages of the bucket that a round looks at; the next one goes on from there."""

_UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_OF_A_JOB = re.compile(f"(?P<owner>{_UUID})/(?P<job>{_UUID})/.+", re.DOTALL)
"""Keys under a `Job.media_prefix`."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was removed with a job. `media_pending`: not all of it, as a store was away; the relay removes the rest."""

    job_id: uuid.UUID
    delete_time: datetime
    object_count: int
    size_bytes: int
    media_pending: bool


@dataclass(slots=True)
class _Removed:
    """Media removed so far."""

    object_count: int = 0
    size_bytes: int = 0
    pending: bool = True


class Deletions:
    """Deletes jobs and media, over PostgreSQL, S3 and Redis. Any number may work at once: what is gone already is no error."""

    def __init__(self, engine: AsyncEngine, media: ObjectStore, log: EventLog, delivery: Delivery) -> None:
        self._engine = engine
        self._media = media
        self._log = log
        self._delivery = delivery
        self._swept = ""

    async def delete(self, owner_id: uuid.UUID, job_id: uuid.UUID) -> Receipt:
        """Delete a job that has ended, and its media. Raises NOT_FOUND, JOB_NOT_TERMINAL, UNAVAILABLE while its bill is not settled."""
        async with reading(self._engine) as connection:
            job = await store.get_job(connection, job_id, owner_id)
        if job is None:
            raise not_found("job")
        if not job.state.terminal:
            state = jobs_pb2.State.Name(jobs_pb2.State.ValueType(job.state))
            raise precondition(Reason.ERROR_REASON_JOB_NOT_TERMINAL, "the job has not ended: cancel it first", {"state": state})
        return await self._delete(job)

    async def _delete(self, job: Job) -> Receipt:
        await self._delivery.fulfil(job, Duty.ANNOUNCE, Duty.SETTLE)
        async with transaction(self._engine) as connection:
            delete_time = await store.delete_job(connection, job)
        if delete_time is None:
            raise unavailable("the job is being settled, retried or deleted right now; try again", 0.5)
        removed = await self._remove(job.owner_id, job.job_id)
        _log.info("job.deleted", job_id=str(job.job_id), objects=removed.object_count, media_pending=removed.pending)
        return Receipt(job.job_id, delete_time, removed.object_count, removed.size_bytes, removed.pending)

    async def _remove(self, owner_id: uuid.UUID, job_id: uuid.UUID) -> _Removed:
        """Remove all that is left of a deleted job, and the note."""
        removed = _Removed()
        try:
            async with asyncio.timeout(REMOVE_TIMEOUT_S):
                await self._remove_media(f"{owner_id}/{job_id}/", removed)
                await self._log.forget(job_id)
                async with transaction(self._engine) as connection:
                    await store.deletion_done(connection, job_id)
            removed.pending = False
        except Exception as error:  # whatever it was: the job is gone, the note stays, and the relay tries again
            _log.warning("deletion.postponed", job_id=str(job_id), error=repr(error)[:300])
        return removed

    async def _remove_media(self, prefix: str, removed: _Removed) -> None:
        more, after = True, ""
        while more:  # ends: every page begins after the one before
            page = await self._media.list(prefix, after=after)
            if page.objects:
                await self._media.delete(*(found.key for found in page.objects))
                removed.object_count += len(page.objects)
                removed.size_bytes += sum(found.size_bytes for found in page.objects)
                after = page.objects[-1].key
            more = page.more

    async def finish(self) -> None:
        """Remove the media of jobs that were deleted while a store was away."""
        async with reading(self._engine) as connection:
            noted = await store.unfinished_deletions(connection, older_than_s=FINISH_AFTER_S, limit=FINISH_BATCH)
        misses = 0
        for job_id, owner_id in noted:
            misses += (await self._remove(owner_id, job_id)).pending
            if misses == MISSES_MAX:
                return

    async def expire(self, *, retention_s: float) -> int:
        """Delete jobs that ended longer ago than that, then submit requests that old without a job; a batch of each. How many jobs."""
        async with reading(self._engine) as connection:
            ended = await store.ended_jobs(connection, older_than_s=retention_s, limit=EXPIRE_BATCH)
        count = misses = 0
        for job in ended:
            try:
                misses += (await self._delete(job)).media_pending
                count += 1
            except MeshError as refusal:  # its bill cannot be settled now, or somebody else deletes it
                misses += 1
                _log.warning("job.not_expired", job_id=str(job.job_id), error=repr(refusal)[:300])
            if misses == MISSES_MAX:
                break
        async with transaction(self._engine) as connection:
            await store.delete_old_requests(connection, older_than_s=retention_s, limit=REQUESTS_BATCH)
        return count

    async def sweep_orphans(self, *, older_than_s: float) -> int:
        """Delete media older than that which no job has, in the next pages of the bucket; how many objects.

        A job has what its assets name once it has ended, and everything under its prefix before. Keys of another shape than a
        job's are nobody's business here.
        """
        # The store's clock may differ from ours by less than anybody's choice of an age.
        stored_before = datetime.now(UTC) - timedelta(seconds=older_than_s)
        count = 0
        for _ in range(SWEEP_PAGES):
            page = await self._media.list("", after=self._swept)
            # First, so that an object that may not go does not end every round: its page comes again after the last one.
            self._swept = page.objects[-1].key if page.more else ""
            count += await self._sweep([found for found in page.objects if found.modified_time < stored_before])
            if not page.more:
                break
        return count

    async def _sweep(self, objects: Sequence[StoredObject]) -> int:
        keys_of: defaultdict[uuid.UUID, list[str]] = defaultdict(list)
        for found in objects:
            if match := _OF_A_JOB.fullmatch(found.key):
                keys_of[uuid.UUID(match["job"])].append(found.key)
        if not keys_of:
            return 0
        async with transaction(self._engine) as connection:
            jobs = await store.media_owners(connection, list(keys_of))
            # A retry writes the same keys again: it has to wait until these are gone, or shows here that it was first.
            failed = [job_id for job_id, job in jobs.items() if job.state is State.FAILED]
            jobs |= await store.media_owners(connection, failed, hold=True)
            orphans = [key for job_id, keys in keys_of.items() for key in keys if not _has(jobs.get(job_id), key)]
            async with asyncio.timeout(REMOVE_TIMEOUT_S):
                await self._media.delete(*orphans)
        return len(orphans)


def _has(job: Job | None, key: str) -> bool:
    if job is None or not key.startswith(job.media_prefix):
        return False
    return not job.state.terminal or any(jobs_pb2.Asset.FromString(asset).object_key == key for asset in job.assets)
