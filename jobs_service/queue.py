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

# Looking who has an entry and acting on it is one step each: between two steps another worker could claim it.
# KEYS: stream, alive key of the job. ARGV: group, worker, entry id, lease in milliseconds.
RENEW = """
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if pending.err and not string.find(pending.err, 'NOGROUP', 1, true) then return pending end
local holder = pending[1] and pending[1][2]
if holder and holder ~= ARGV[2] then return 'TAKEN' end
redis.call('SET', KEYS[2], ARGV[2], 'PX', ARGV[4])
if not holder then return 'GONE' end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'JUSTID')
return 'HELD'
"""
# KEYS: stream. ARGV: group, worker, entry id.
DONE = """
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
if pending.err and not string.find(pending.err, 'NOGROUP', 1, true) then return pending end
if not pending[1] or pending[1][2] ~= ARGV[2] then return 0 end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
return redis.call('XDEL', KEYS[1], ARGV[3])
"""

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
        self._renew = client.register_script(RENEW)
        self._done = client.register_script(DONE)

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
        hold: bytes = await self._renew(
            keys=[entry.stream, self._alive_key(entry.stream, entry.job_id)],
            args=[GROUP, self._worker_id, entry.entry_id, int(self._lease_s * 1000)],
        )
        return Hold[hold.decode()]

    async def holder(self, stream: str, entry_id: str) -> str | None:
        """The worker that has an entry; None when the queue does not know the entry."""
        try:
            pending: list[dict[str, Any]] = await self._redis.xpending_range(stream, GROUP, entry_id, entry_id, 1)
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            return None
        return pending[0]["consumer"].decode() if pending else None

    async def alive(self, stream: str, job_id: uuid.UUID) -> bool:
        """Whether a worker has renewed an entry of this job within a lease, the queue knowing the entry or not."""
        return bool(await self._redis.exists(self._alive_key(stream, job_id)))

    def _alive_key(self, stream: str, job_id: uuid.UUID) -> str:
        return f"{stream}:alive:{job_id}"

    async def done(self, entry: Entry) -> None:
        """Remove an entry whose job was handled. One that another worker has claimed in the meantime stays."""
        await self._done(keys=[entry.stream], args=[GROUP, self._worker_id, entry.entry_id])

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
        # Not XAUTOCLAIM: with COUNT 1 it looks at the ten oldest entries only, and ten live workers would hide a dead one.
        lease_ms = int(self._lease_s * 1000)
        try:
            silent: Any = await self._redis.xpending_range(stream, GROUP, "-", "+", 1, idle=lease_ms)
            if not silent:
                return None
            reply: Any = await self._redis.xclaim(stream, GROUP, self._worker_id, lease_ms, [silent[0]["message_id"]])
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            self._groups.discard(stream)
            return None
        for entry_id, fields in reply:  # nothing: another worker was first
            if fields:
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

    async def lost(self) -> bool:
        """Whether entries may have been lost since `rebuilt`: Redis was emptied, or is not the process it was (a restart
        loses what was not on disk yet, a fail-over what the replica had not got)."""
        run_id, _, mark = await self._life()
        return mark is None or mark[0] != run_id

    async def rebuilt(self) -> None:
        """Note that every pending job was put into the queue again, or is about to be."""
        run_id, now_ms, _ = await self._life()
        await self._redis.set(self._mark_key, f"{run_id} {now_ms}")

    async def settled(self) -> bool:
        """Whether the queue was rebuilt at least a lease ago: every live worker has said since that it is alive."""
        run_id, now_ms, mark = await self._life()
        return mark is not None and mark[0] == run_id and now_ms - mark[1] >= self._lease_s * 1000

    @property
    def _mark_key(self) -> str:
        return f"{{{self._prefix}:queue}}:mark"

    async def _life(self) -> tuple[str, int, tuple[str, int] | None]:
        """Run id of Redis, its time in milliseconds, both as of the last rebuild."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.info("server")
            pipe.time()
            pipe.get(self._mark_key)
            info, (seconds, microseconds), value = await pipe.execute()
        mark = None
        if value is not None:
            run_id, _, marked_ms = value.decode().partition(" ")
            mark = (run_id, int(marked_ms or 0))
        return str(info["run_id"]), seconds * 1000 + microseconds // 1000, mark
