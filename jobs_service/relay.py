"""The relay: does what others left undone. Outbox duties, abandoned requests, late jobs, a queue lost with Redis.

Any number may run; they share the work through `SKIP LOCKED`.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence

import structlog
from prometheus_client import Counter, Gauge
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from genmesh.jobs.v1 import jobs_pb2
from jobs_service import store
from jobs_service.deletion import Deletions
from jobs_service.delivery import FALLBACK_S, Delivery
from jobs_service.events import EventLog
from jobs_service.ledger import Ledger
from jobs_service.lifecycle import Job, State, failure, worker_lost
from jobs_service.messages import new_event
from jobs_service.offers import Offers
from jobs_service.queue import JobQueue
from servicekit.database import reading, transaction
from servicekit.errors import MeshError

OUTBOX_INTERVAL_S = 0.25
OUTBOX_BATCH = 50
AGAIN_AFTER_S = 2.0
SWEEP_INTERVAL_S = 2.0
SWEEP_BATCH = 200
ABANDON_AFTER_S = 20.0
"""A request that is no job by then never becomes one: longer than any deadline of CreateJob, well below the 30 s promised."""
PENDING_BATCH = 500
ANNOUNCEMENTS_AT_ONCE = 16
MISSING_AFTER_S = 10.0
"""A pending job that old must be known to the queue: its outbox duty has had its time."""
RETENTION_INTERVAL_S = 60.0
MEASURE_INTERVAL_S = 5.0
POSITIONS_INTERVAL_S = 1.0
POSITIONS_MAX = 100
"""Places in a level are announced up to here; further back they mean little."""

RELAYED = Counter("genmesh_outbox_relayed_total", "Duties that the relay had to do")
WAITING = Gauge("genmesh_jobs_waiting", "Pending jobs", ["pool", "level"])
DEAD_LETTERS = Gauge("genmesh_dead_letters", "Failed jobs that are kept")
BACKLOG = Gauge("genmesh_outbox_taken", "Duties taken in the last round")

_log = structlog.get_logger(__name__)


class Relay:
    """Rounds of duties and sweeps."""

    def __init__(
        self,
        *,
        engine: AsyncEngine,
        queue: JobQueue,
        log: EventLog,
        ledger: Ledger,
        delivery: Delivery,
        deletions: Deletions,
        lease_s: float,
        max_attempts: int,
        job_retention_s: float,
        orphan_media_s: float,
    ) -> None:
        self._engine = engine
        self._queue = queue
        self._log = log
        self._ledger = ledger
        self._delivery = delivery
        self._deletions = deletions
        self._lease_s = lease_s
        self._max_attempts = max_attempts
        self._job_retention_s = job_retention_s
        self._orphan_media_s = orphan_media_s
        self._offers = Offers(engine)
        self._announced: dict[uuid.UUID, int] = {}
        self._looked_after: uuid.UUID | None = None

    async def outbox(self) -> None:
        """Do due duties, round after round."""
        await self._forever(OUTBOX_INTERVAL_S, self._outbox_round)

    async def sweep(self) -> None:
        """Find and finish what got stuck, round after round."""
        await self._forever(
            SWEEP_INTERVAL_S,
            self._rebuild_queue,
            self._queue_missing,
            self._abandon_requests,
            self._abandon_retries,
            self._cancel_late_jobs,
            self._requeue_strays,
        )

    async def deletions(self) -> None:
        """Remove media of jobs that were deleted while a store was away, round after round: by itself, as that store may hang."""
        await self._forever(SWEEP_INTERVAL_S, self._deletions.finish)

    async def retention(self) -> None:
        """Delete what is kept no longer, round after round."""
        await self._forever(RETENTION_INTERVAL_S, self._expire_jobs, self._sweep_orphans)

    async def positions(self) -> None:
        """Tell waiting jobs their place in the queue whenever it changes."""
        await self._forever(POSITIONS_INTERVAL_S, self._announce_positions)

    async def measure(self) -> None:
        """Keep the gauges of the queue, round after round."""
        await self._forever(MEASURE_INTERVAL_S, self._measure)

    async def _forever(self, interval_s: float, *rounds: Callable[[], Awaitable[None]]) -> None:
        while True:
            for one in rounds:
                try:
                    await one()
                except (RedisError, SQLAlchemyError, OSError, MeshError) as error:
                    _log.warning("relay.trouble", round=getattr(one, "__name__", ""), error=repr(error)[:300])
            await asyncio.sleep(interval_s)

    async def _outbox_round(self) -> None:
        while True:
            async with transaction(self._engine) as connection:
                rows = await store.due_duties(connection, limit=OUTBOX_BATCH, again_after_s=AGAIN_AFTER_S)
            BACKLOG.set(len(rows))
            if rows:
                await self._delivery.again(rows)
                RELAYED.inc(len(rows))
            if len(rows) < OUTBOX_BATCH:
                return

    async def _rebuild_queue(self) -> None:
        async with reading(self._engine) as connection:
            pools = await store.pools(connection)
        lost = [pool for pool in pools if await self._queue.lost(pool)]
        if not lost:
            return
        # The mark comes last: whoever dies in between leaves the work to the next round, and twice does no harm.
        count, after = 0, None
        while batch := await self._pending(after, older_than_s=0.0):
            after = batch[-1].job_id
            mine = [job for job in batch if job.pool in lost]
            await self._put_in(mine)
            count += len(mine)
        for pool in lost:
            await self._queue.rebuilt(pool)
        if count:
            _log.warning("queue.rebuilt", jobs=count)

    async def _put_in(self, jobs: Sequence[Job]) -> None:
        await self._queue.put_many(jobs)
        at_once = asyncio.Semaphore(ANNOUNCEMENTS_AT_ONCE)

        async def publish(job: Job) -> None:
            async with at_once:
                await self._delivery.publish(job)

        await asyncio.gather(*map(publish, jobs))

    async def _queue_missing(self) -> None:
        """Look, batch by batch, whether the queue knows every pending job, and put in those that it does not know."""
        batch = await self._pending(self._looked_after, older_than_s=MISSING_AFTER_S)
        self._looked_after = batch[-1].job_id if len(batch) == PENDING_BATCH else None
        missing = await self._queue.missing(batch)
        if missing:
            # Taken a moment ago and about to start, if it was ours to take: a second entry of a job does no harm.
            _log.warning("queue.jobs_missing", count=len(missing), job_id=str(missing[0].job_id))
            await self._put_in(missing)

    async def _pending(self, after: uuid.UUID | None, *, older_than_s: float) -> list[Job]:
        async with reading(self._engine) as connection:
            return await store.pending_jobs(connection, after=after, older_than_s=older_than_s, limit=PENDING_BATCH)

    async def _abandon_requests(self) -> None:
        async with transaction(self._engine) as connection:
            abandoned = await store.abandon_requests(connection, older_than_s=ABANDON_AFTER_S, limit=SWEEP_BATCH)
        for owner_id, request_id, job_id in abandoned:
            await self._ledger.release_unused(job_id)
            async with transaction(self._engine) as connection:
                await store.delete_request(connection, owner_id, request_id, job_id)
            _log.warning("request.abandoned", job_id=str(job_id))

    async def _abandon_retries(self) -> None:
        async with transaction(self._engine) as connection:
            abandoned = await store.abandon_retries(connection, older_than_s=ABANDON_AFTER_S, limit=SWEEP_BATCH)
        for job_id, reservation_id in abandoned:
            await self._ledger.release_unused(reservation_id)
            async with transaction(self._engine) as connection:
                await store.delete_retry(connection, job_id, reservation_id)
            _log.warning("retry.abandoned", job_id=str(job_id))

    async def _cancel_late_jobs(self) -> None:
        async with transaction(self._engine) as connection:
            late = await store.late_jobs(connection, SWEEP_BATCH)
        for job in late:
            async with transaction(self._engine) as connection:
                ended = await store.finish(connection, job, State.CANCELLED, fallback_s=FALLBACK_S)
            if ended is not None:
                _log.info("job.too_late", job_id=str(job.job_id))
                await self._delivery.now(*ended)

    async def _requeue_strays(self) -> None:
        async with transaction(self._engine) as connection:
            running = await store.running_jobs(connection, older_than_s=self._lease_s, limit=SWEEP_BATCH)
        for job in running:
            if await self._stray(job):
                await self._put_back(job)

    async def _put_back(self, job: Job) -> None:
        last = job.failures + 1 >= self._max_attempts
        async with transaction(self._engine) as connection:
            if job.cancel_requested_time is not None:
                moved = await store.finish(connection, job, State.CANCELLED, fallback_s=FALLBACK_S)
            elif last:
                lost = failure(worker_lost(), job.model)
                moved = await store.finish(connection, job, State.FAILED, fallback_s=FALLBACK_S, failure=lost)
            else:
                moved = await store.requeue(connection, job, delay_s=0.0, failed=True, fallback_s=FALLBACK_S)
        if moved is not None:
            _log.warning("job.stray", job_id=str(job.job_id), worker_id=job.worker_id)
            await self._delivery.now(*moved)

    async def _stray(self, job: Job) -> bool:
        """Whether nobody runs a processing job and no queue entry would ever make somebody: Redis was lost, and its worker too."""
        stream, _, entry_id = job.queue_entry.rpartition("/")
        if await self._queue.alive(stream, job.job_id) or await self._queue.holder(stream, entry_id) is not None:
            return False
        # Asked last: had Redis been emptied before the answers above, they would tell of no live worker either.
        return await self._queue.settled(job.pool)

    async def _announce_positions(self) -> None:
        async with reading(self._engine) as connection:
            front = await store.front_of_queue(connection, POSITIONS_MAX)
        changed = [(job, place) for job, place in front if self._announced.get(job.job_id) != place]
        self._announced = {job.job_id: place for job, place in front}
        if changed:
            await self._offers.refresh()
        for job, place in changed:
            time_left = self._offers.forecast(model_id=job.model, pool=job.pool, priority=job.priority, steps=job.steps_agreed, place=place)
            event = new_event(job.job_id, job.attempt)
            event.queue_update.CopyFrom(jobs_pb2.QueueUpdate(queue_position=place, eta_seconds=time_left.p50_s))
            if not await self._log.publish(event, owner_id=job.owner_id, version=job.version):
                del self._announced[job.job_id]  # its state is not announced yet: again in the next round

    async def _measure(self) -> None:
        async with reading(self._engine) as connection:
            levels = await store.levels(connection)
            failed = await store.dead_letter_count(connection)
        WAITING.clear()
        for level in levels:
            WAITING.labels(level.pool, level.priority.name.lower()).set(level.waiting)
        DEAD_LETTERS.set(failed)

    # --- what is kept no longer -------------------------------------------------------------------------------------

    async def _expire_jobs(self) -> None:
        if self._job_retention_s and (count := await self._deletions.expire(retention_s=self._job_retention_s)):
            _log.info("jobs.expired", count=count)

    async def _sweep_orphans(self) -> None:
        if count := await self._deletions.sweep_orphans(older_than_s=self._orphan_media_s):
            _log.info("media.orphans_deleted", count=count)
