"""The relay: does what others left undone. Outbox duties, abandoned requests, late jobs, a queue lost with Redis.

Any number may run; they share the work through `SKIP LOCKED`.
"""

import asyncio
import uuid
from collections.abc import Awaitable, Callable

import structlog
from prometheus_client import Counter, Gauge
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from genmesh.jobs.v1 import jobs_pb2
from jobs_service import store
from jobs_service.delivery import FALLBACK_S, Delivery
from jobs_service.events import EventLog
from jobs_service.ledger import Ledger
from jobs_service.lifecycle import Job, State
from jobs_service.messages import new_event
from jobs_service.queue import JobQueue
from servicekit.database import transaction
from servicekit.errors import MeshError

OUTBOX_INTERVAL_S = 0.25
OUTBOX_BATCH = 50
AGAIN_AFTER_S = 2.0
SWEEP_INTERVAL_S = 2.0
SWEEP_BATCH = 200
ABANDON_AFTER_S = 20.0
"""A request that is no job by then never becomes one: longer than any deadline of CreateJob, well below the 30 s promised."""
POSITIONS_INTERVAL_S = 1.0
POSITIONS_MAX = 100
"""Places in the queue are announced up to here; further back they mean little."""

RELAYED = Counter("genmesh_outbox_relayed_total", "Duties that the relay had to do")
BACKLOG = Gauge("genmesh_outbox_taken", "Duties taken in the last round")

_log = structlog.get_logger(__name__)


class Relay:
    """Rounds of duties and sweeps."""

    def __init__(self, *, engine: AsyncEngine, queue: JobQueue, log: EventLog, ledger: Ledger, delivery: Delivery, lease_s: float) -> None:
        self._engine = engine
        self._queue = queue
        self._log = log
        self._ledger = ledger
        self._delivery = delivery
        self._lease_s = lease_s
        self._announced: dict[uuid.UUID, int] = {}

    async def outbox(self) -> None:
        """Do due duties, round after round."""
        await self._forever(OUTBOX_INTERVAL_S, self._outbox_round)

    async def sweep(self) -> None:
        """Find and finish what got stuck, round after round."""
        await self._forever(SWEEP_INTERVAL_S, self._rebuild_queue, self._abandon_requests, self._cancel_late_jobs, self._requeue_strays)

    async def positions(self) -> None:
        """Tell waiting jobs their place in the queue whenever it changes."""
        await self._forever(POSITIONS_INTERVAL_S, self._announce_positions)

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
        if await self._queue.lost():
            # The mark comes last: whoever dies in between leaves the work to the next round, and twice does no harm.
            async with transaction(self._engine) as connection:
                count = await store.announce_pending(connection)
            await self._queue.rebuilt()
            if count:
                _log.warning("queue.rebuilt", jobs=count)

    async def _abandon_requests(self) -> None:
        async with transaction(self._engine) as connection:
            abandoned = await store.abandon_requests(connection, older_than_s=ABANDON_AFTER_S, limit=SWEEP_BATCH)
        for owner_id, request_id, job_id in abandoned:
            await self._ledger.release_unused(job_id)
            async with transaction(self._engine) as connection:
                await store.delete_request(connection, owner_id, request_id, job_id)
            _log.warning("request.abandoned", job_id=str(job_id))

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
            if not await self._stray(job):
                continue
            async with transaction(self._engine) as connection:
                back = await store.requeue(connection, job, delay_s=0.0)
            if back is not None:
                _log.warning("job.stray", job_id=str(job.job_id), worker_id=job.worker_id)
                await self._delivery.publish(back)

    async def _stray(self, job: Job) -> bool:
        """Whether nobody runs a processing job and no queue entry would ever make somebody: Redis was lost, and its worker too."""
        stream, _, entry_id = job.queue_entry.rpartition("/")
        if await self._queue.alive(stream, job.job_id) or await self._queue.holder(stream, entry_id) is not None:
            return False
        # Asked last: had Redis been emptied before the answers above, they would tell of no live worker either.
        return await self._queue.settled()

    async def _announce_positions(self) -> None:
        async with transaction(self._engine) as connection:
            front = await store.front_of_queue(connection, POSITIONS_MAX)
        changed = [(job, place) for job, place in front if self._announced.get(job.job_id) != place]
        self._announced = {job.job_id: place for job, place in front}
        for job, place in changed:
            event = new_event(job.job_id, job.attempt)
            event.queue_update.CopyFrom(jobs_pb2.QueueUpdate(queue_position=place))
            if not await self._log.publish(event, owner_id=job.owner_id, version=job.version):
                del self._announced[job.job_id]  # its state is not announced yet: again in the next round
