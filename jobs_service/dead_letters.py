"""Failed jobs and their way back into the queue: by their owner, or by an administrator, one or all of a kind."""

import asyncio
import uuid
from dataclasses import dataclass, replace
from datetime import datetime

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from genmesh.jobs.v1 import jobs_pb2
from jobs_service import store
from jobs_service.delivery import FALLBACK_S, Delivery
from jobs_service.ledger import Ledger
from jobs_service.lifecycle import Job, State
from jobs_service.limits import Limits
from jobs_service.store import DeadLetter, Duty
from servicekit.database import reading, transaction
from servicekit.errors import MeshError, Reason, not_found, precondition, unavailable

RETRIES_AT_ONCE = 4
"""Below the size of a pool of connections: a requeue of hundreds must not keep everybody else out."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Requeued:
    """What became of one dead letter."""

    job_id: uuid.UUID
    refusal: MeshError | None


class DeadLetters:
    """Failed jobs, over store, ledger and queue."""

    def __init__(self, engine: AsyncEngine, ledger: Ledger, delivery: Delivery, limits: Limits) -> None:
        self._engine = engine
        self._ledger = ledger
        self._delivery = delivery
        self._limits = limits

    async def retry(self, job_id: uuid.UUID, owner_id: uuid.UUID | None = None, api_key_id: uuid.UUID | None = None, plan: str = "") -> Job:
        """Put a failed job back into the queue under a new hold; with `owner_id`, only if it is theirs, and under the key they used.

        As a submit does, it notes what it is about to do, holds, then commits: a repeat goes on from the note, and a note that
        leads nowhere is found by the relay, which releases the hold. A job that was retried and has not ended since is the answer
        to a repeat. An owner's retry counts as a submit does, under the limits of `plan`; an administrator's does not. Raises
        NOT_FOUND, JOB_NOT_FAILED, LIMIT_REACHED, what credit_service refuses, UNAVAILABLE.
        """
        if owner_id is not None and await self._is_new(job_id, owner_id):
            await self._limits.count_submits(owner_id, plan)
        async with transaction(self._engine) as connection:
            # Locked: a note must not come after somebody else's retry of the same failure, whose job may be running by then.
            job = await store.get_job(connection, job_id, owner_id, locked=True)
            if job is None:
                raise not_found("job")
            if job.state is not State.FAILED:
                if job.retry_count and not job.state.terminal:
                    return job
                state = jobs_pb2.State.Name(jobs_pb2.State.ValueType(job.state))
                raise precondition(Reason.ERROR_REASON_JOB_NOT_FAILED, "only a failed job can be retried", {"state": state})
            # Whose ceiling a retry counts under: it is new spending, decided by who asks. An owner's retry counts under the key they
            # asked with (none if they had signed in), whatever the job was submitted with, or a key with nothing left could spend on
            # by retrying the jobs of another. An administrator spends for the owner: the key of the job's last hold counts, never
            # their own. A repeat keeps the noted key, whoever sends it: the hold may be there already, and has no other.
            key = job.api_key_id if owner_id is None else api_key_id
            # A new one every time: a hold that was released once is of no use again.
            reservation_id = uuid.uuid5(job_id, uuid.uuid4().hex)
            noted = await store.add_retry(connection, job_id, reservation_id, api_key_id=key)
            if owner_id is not None and noted is not None and noted.reservation_id == reservation_id:
                # Refused, the note goes with the transaction.
                self._limits.check_open(plan, await store.open_work(connection, owner_id))
        if noted is None:
            raise unavailable("the same retry is being refused right now; try again", 0.1)
        await self._delivery.fulfil(job, Duty.SETTLE)
        if noted.abandoned:
            raise unavailable("an earlier retry of this job is being undone right now; try again", 1.0)
        try:
            await self._ledger.reserve(replace(job, reservation_id=noted.reservation_id, api_key_id=noted.api_key_id))
        except MeshError as refusal:
            if refusal.reason != Reason.ERROR_REASON_UNAVAILABLE:
                async with transaction(self._engine) as connection:
                    await store.delete_retry(connection, job_id, noted.reservation_id)
            raise
        async with transaction(self._engine) as connection:
            committed = await store.commit_retry(connection, job, noted.reservation_id, fallback_s=FALLBACK_S)
            now = await store.get_job(connection, job_id)
        if committed is None:
            if now is not None and now.reservation_id == noted.reservation_id:
                return now  # the same retry, asked for twice at once: the other call has committed it
            await self._ledger.release_unused(noted.reservation_id)
            raise unavailable("the retry took too long and was undone; try again", 0.5)
        await self._delivery.now(*committed)
        _log.info("job.retried", job_id=str(job_id), retry_count=committed[0].retry_count)
        return committed[0]

    async def _is_new(self, job_id: uuid.UUID, owner_id: uuid.UUID) -> bool:
        """Whether to retry this job would be a retry, and no repeat of one."""
        async with reading(self._engine) as connection:
            job = await store.get_job(connection, job_id, owner_id)
            return job is not None and job.state is State.FAILED and not await store.retry_noted(connection, job_id)

    async def page(
        self, *, limit: int, before: tuple[datetime, uuid.UUID] | None, fingerprint: str, reason: str
    ) -> tuple[list[DeadLetter], tuple[datetime, uuid.UUID] | None]:
        """A page of dead letters, the newest failure first, and where the next page begins (None: there is none)."""
        async with reading(self._engine) as connection:
            page = await store.dead_letters(connection, limit=limit + 1, before=before, fingerprint=fingerprint, reason=reason)
        last = page[limit - 1].job if len(page) > limit else None
        return page[:limit], (last.finish_time, last.job_id) if last is not None and last.finish_time is not None else None

    async def requeue(self, fingerprint: str, *, limit: int) -> list[Requeued]:
        """Retry the jobs that failed alike, the oldest failures first; what was refused stays as it is."""
        async with reading(self._engine) as connection:
            failed = await store.failed_jobs(connection, fingerprint, limit)
        at_once = asyncio.Semaphore(RETRIES_AT_ONCE)

        async def one(job: Job) -> Requeued:
            async with at_once:
                try:
                    await self.retry(job.job_id)
                except MeshError as refusal:
                    return Requeued(job.job_id, refusal)
                return Requeued(job.job_id, None)

        return await asyncio.gather(*map(one, failed))
