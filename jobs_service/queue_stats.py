"""What waits, what runs, who works: the queue in figures, from the store."""

from collections.abc import Awaitable, Callable

from sqlalchemy.ext.asyncio import AsyncEngine

from genmesh.jobs.v1 import jobs_pb2
from jobs_service import store
from jobs_service.lifecycle import Priority
from jobs_service.messages import timestamp
from jobs_service.offers import WORKER_SILENT_S
from jobs_service.store import Level
from servicekit.database import reading

QueueStats = Callable[[], Awaitable[list[jobs_pb2.PoolStats]]]


def queue_stats(engine: AsyncEngine) -> QueueStats:
    """A function that counts every pool that has unfinished jobs or workers, by name."""

    async def count() -> list[jobs_pb2.PoolStats]:
        async with reading(engine) as connection:
            pools = await store.pools(connection)
            levels = {(level.pool, level.priority): level for level in await store.levels(connection)}
            running = await store.running_by_pool(connection)
            workers = await store.live_workers(connection, silent_s=WORKER_SILENT_S)
        return [
            jobs_pb2.PoolStats(
                pool=pool,
                levels=[_level(priority, levels.get((pool, priority))) for priority in sorted(Priority, reverse=True)],
                running_count=running.get(pool, 0),
                workers=[
                    jobs_pb2.Worker(
                        worker_id=worker.worker_id,
                        slot_count=worker.slot_count,
                        loaded_models=worker.loaded_models,
                        seen_time=timestamp(worker.seen_time),
                    )
                    for worker in workers
                    if pool in worker.pools
                ],
            )
            for pool in pools
        ]

    return count


def _level(priority: Priority, level: Level | None) -> jobs_pb2.LevelStats:
    message = jobs_pb2.LevelStats(priority=jobs_pb2.Priority.ValueType(priority))
    if level is not None:
        message.waiting_count = level.waiting
        message.delayed_count = level.delayed
        message.owner_count = level.owners
        message.oldest_wait_seconds = level.oldest_wait_s
    return message
