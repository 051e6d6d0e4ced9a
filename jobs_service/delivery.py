"""Duties of the outbox done: announce a job's state in Redis, settle its reservation.

Whoever commits a duty does it right after the commit; the relay does what is left. Both are idempotent.
"""

import asyncio
from collections.abc import Sequence

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from jobs_service import store
from jobs_service.events import EventLog
from jobs_service.ledger import Ledger
from jobs_service.lifecycle import Job, State
from jobs_service.messages import Presign, state_change
from jobs_service.queue import JobQueue
from jobs_service.store import Duty, OutboxRow
from servicekit.database import reading, transaction

FALLBACK_S = 2.0
"""How long the committer of a duty has before the relay does it."""
AGAIN_AT_ONCE = 4
"""Below the size of a pool of connections: the relay's sweeps need one too."""

_log = structlog.get_logger(__name__)


class Delivery:
    """Does duties."""

    def __init__(self, engine: AsyncEngine, queue: JobQueue, log: EventLog, ledger: Ledger, presign: Presign) -> None:
        self._engine = engine
        self._queue = queue
        self._log = log
        self._ledger = ledger
        self._presign = presign

    async def publish(self, job: Job, *, queue_position: int = 0) -> None:
        """Publish a job's state."""
        event = state_change(job, self._presign, queue_position=queue_position)
        await self._log.publish(event, owner_id=job.owner_id, version=job.version, final=job.state.terminal)

    async def announce(self, job: Job, *, queue_position: int = 0) -> None:
        """Publish a job's state; put it into the queue if it is pending, take it out if it was cancelled."""
        await self.publish(job, queue_position=queue_position)
        if job.state is State.PENDING:
            await self._queue.put(job)
        elif job.state is State.CANCELLED:
            await self._queue.remove(job)

    async def now(self, job: Job, rows: Sequence[OutboxRow], *, queue_position: int = 0) -> None:
        """Do the duties of a job just committed. What fails stays in the outbox."""

        async def attempt(row: OutboxRow) -> int | None:
            try:
                if row.duty is Duty.ANNOUNCE:
                    await self.announce(job, queue_position=queue_position)
                elif job.state.terminal:
                    await self._ledger.settle(job)
                # Else it was retried since: its hold was released before that, or it could not have been.
            except Exception as error:  # whatever it was: the duty stays in the outbox, and the relay tries again
                _log.warning("delivery.postponed", job_id=str(row.job_id), duty=row.duty.name, error=repr(error))
                return None
            return row.outbox_id

        done = [outbox_id for outbox_id in await asyncio.gather(*map(attempt, rows)) if outbox_id is not None]
        if done:
            try:
                async with transaction(self._engine) as connection:
                    await store.delete_duties(connection, done)
            except Exception as error:  # the relay repeats the duty, which is harmless
                _log.warning("delivery.not_noted", error=repr(error))

    async def fulfil(self, job: Job, *duties: Duty) -> None:
        """Return when these duties of an ended job are done, whoever was about to do them. Raises UNAVAILABLE."""
        for duty in duties:
            async with reading(self._engine) as connection:
                outbox_ids = await store.duties_of(connection, job.job_id, duty)
            if outbox_ids:
                await (self.announce(job) if duty is Duty.ANNOUNCE else self._ledger.settle(job))
                async with transaction(self._engine) as connection:
                    await store.delete_duties(connection, outbox_ids)

    async def again(self, rows: Sequence[OutboxRow]) -> None:
        """Do duties taken from the outbox, each for the job as it is now; a few at once, so that a slow one holds up few."""
        limit = asyncio.Semaphore(AGAIN_AT_ONCE)

        async def one(row: OutboxRow) -> None:
            async with limit:
                async with reading(self._engine) as connection:
                    job = await store.get_job(connection, row.job_id)
                if job is not None:
                    await self.now(job, [row])
                    return
                async with transaction(self._engine) as connection:
                    await store.delete_duties(connection, [row.outbox_id])

        await asyncio.gather(*map(one, rows))
