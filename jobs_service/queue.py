"""The queue of pending jobs: Redis Streams and one consumer group, a stream per pool and priority.

PostgreSQL is the truth; an entry here only says "look at this job". An entry is held (in the group's pending list) by the
worker that runs the job, renewed while it lives, and claimed by another when it has been silent for a lease.
"""

import enum
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from redis import asyncio as redis
from redis.exceptions import ResponseError

from jobs_service.lifecycle import Priority
from servicekit.streams import BLOCK_MS

GROUP = "dispatch"

# Three of four polls look at PRO first, the fourth at FREE first: paid work goes ahead, free work never starves.
POLL_ORDER = (
    (Priority.PRO, Priority.FREE),
    (Priority.PRO, Priority.FREE),
    (Priority.PRO, Priority.FREE),
    (Priority.FREE, Priority.PRO),
)


class Hold(enum.Enum):
    """Who has a queue entry."""

    HELD = "this worker"
    TAKEN = "another worker: this one was silent for a lease"
    GONE = "nobody: Redis was emptied"


@dataclass(frozen=True, slots=True)
class Entry:
    """A queue entry held by this worker."""

    stream: str
    entry_id: str
    job_id: uuid.UUID
    taken_over: bool
    """Claimed from a worker that fell silent, rather than delivered for the first time."""

    @property
    def name(self) -> str:
        """The entry's name in the whole queue."""
        return f"{self.stream}/{self.entry_id}"


class JobQueue:
    """The queue, as one worker sees it (or, without `worker_id`, as those see it who only put jobs in)."""

    def __init__(self, client: "redis.Redis", prefix: str, *, lease_s: float, worker_id: str = "") -> None:
        self._redis = client
        self._prefix = prefix
        self._lease_s = lease_s
        self._worker_id = worker_id
        self._orders = cycle(POLL_ORDER)
        self._groups: set[str] = set()

    def _stream(self, pool: str, priority: Priority) -> str:
        # The braces are a Redis Cluster hash tag: all of a pool lies in one slot, so that one command can read it.
        return f"{{{self._prefix}:queue:{pool}}}:{int(priority)}"

    async def put(self, pool: str, priority: Priority, job_id: uuid.UUID) -> None:
        """Append a job. Never trimmed: an entry leaves the stream only when its job was handled."""
        await self._redis.xadd(self._stream(pool, priority), {"job": str(job_id)})

    async def take(self, pools: Sequence[str]) -> Entry | None:
        """The next job for this worker: one of a silent worker first, else by weighted priority.

        None after 2 s or a tenth of a lease, whichever is less: so often it is looked for silent workers.
        """
        streams = [self._stream(pool, priority) for pool in pools for priority in Priority]
        for stream in streams:
            await self._ensure_group(stream)
        for stream in streams:
            entry = await self._claim(stream)
            if entry is not None:
                return entry
        # Ends of the streams before the look: whatever is added after it ends the wait below at once.
        ends: dict[Any, Any] = {stream: await self._end(stream) for stream in streams}
        for priority in next(self._orders):
            for pool in pools:
                entry = await self._read(self._stream(pool, priority))
                if entry is not None:
                    return entry
        await self._redis.xread(ends, count=1, block=min(BLOCK_MS, max(1, int(self._lease_s * 100))))
        return None

    async def renew(self, entry: Entry) -> Hold:
        """Tell the queue that this worker is alive and has the entry; says who has it."""
        await self._redis.set(self._alive_key(self._worker_id), "1", px=int(self._lease_s * 1000))
        holder = await self.holder(entry.stream, entry.entry_id)
        if holder is None:
            return Hold.GONE
        if holder != self._worker_id:
            return Hold.TAKEN
        await self._redis.xclaim(entry.stream, GROUP, self._worker_id, 0, [entry.entry_id], justid=True)
        return Hold.HELD

    async def holder(self, stream: str, entry_id: str) -> str | None:
        """The worker that has an entry; None when the queue does not know the entry."""
        try:
            pending: list[dict[str, Any]] = await self._redis.xpending_range(stream, GROUP, entry_id, entry_id, 1)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            return None
        return pending[0]["consumer"].decode() if pending else None

    async def alive(self, worker_id: str) -> bool:
        """Whether a worker has renewed an entry within a lease."""
        return bool(await self._redis.exists(self._alive_key(worker_id)))

    def _alive_key(self, worker_id: str) -> str:
        return f"{{{self._prefix}:queue}}:worker:{worker_id}"

    async def done(self, entry: Entry) -> None:
        """Remove an entry whose job was handled."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.xack(entry.stream, GROUP, entry.entry_id)
            pipe.xdel(entry.stream, entry.entry_id)
            await pipe.execute()

    async def _read(self, stream: str) -> Entry | None:
        try:
            reply: Any = await self._redis.xreadgroup(GROUP, self._worker_id, {stream: ">"}, count=1)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self._groups.discard(stream)  # Redis was emptied under us: the next round makes the group again
            return None
        for _, entries in reply or ():
            for entry_id, fields in entries:
                return self._entry(stream, entry_id, fields, taken_over=False)
        return None

    async def _claim(self, stream: str) -> Entry | None:
        try:
            reply: Any = await self._redis.xautoclaim(stream, GROUP, self._worker_id, min_idle_time=int(self._lease_s * 1000), count=1)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self._groups.discard(stream)
            return None
        for entry_id, fields in reply[1]:
            if fields:  # None: deleted while it was pending
                return self._entry(stream, entry_id, fields, taken_over=True)
        return None

    async def _end(self, stream: str) -> str:
        newest: Any = await self._redis.xrevrange(stream, count=1)
        return newest[0][0].decode() if newest else "0-0"

    async def _ensure_group(self, stream: str) -> None:
        if stream in self._groups:
            return
        try:
            # From the beginning: a group made after a loss of Redis must see what was put before it was made.
            await self._redis.xgroup_create(stream, GROUP, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise
        self._groups.add(stream)

    def _entry(self, stream: str, entry_id: bytes, fields: dict[bytes, bytes], *, taken_over: bool) -> Entry:
        return Entry(stream, entry_id.decode(), uuid.UUID(fields[b"job"].decode()), taken_over)

    async def mark(self) -> bool:
        """Leave a mark in Redis; True when the mark was gone, so that the queue has to be rebuilt."""
        return bool(await self._redis.set(f"{{{self._prefix}:queue}}:mark", "1", nx=True))
