"""The queue of pending jobs in Redis: for each pool and priority a stream with one consumer group, and what waits before it.

PostgreSQL is the truth; an entry here only says "look at this job". An entry is held (in the group's pending list) by the
worker that runs the job, renewed while it lives, and claimed by another when it has been silent for a lease. A stream has at most
one undelivered entry of an owner: owners are served in turns, and none has more jobs running than the limit of their level. The
rest waits in sorted sets. Each operation is one script (queue_scripts.py) over the keys of one pool.
"""

import asyncio
import enum
import math
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from redis import asyncio as redis
from redis.asyncio.cluster import RedisCluster
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError, ResponseError

from jobs_service import queue_scripts
from jobs_service.lifecycle import Job, Priority
from jobs_service.queue_scripts import GROUP, PASSED
from servicekit.streams import BLOCK_MS

BATCH = 128
"""Jobs in one call of a script: Redis does nothing else meanwhile, a millisecond or so."""
WEIGHTED_ORDER = 4
"""Three of four deliveries look at PRO first, the fourth at FREE first (queue_scripts.TAKE)."""

T = TypeVar("T")


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
    owner_id: uuid.UUID
    taken_over: bool
    """Claimed from a worker that fell silent, rather than delivered for the first time."""

    @property
    def name(self) -> str:
        """The entry's name in the whole queue."""
        return f"{self.stream}/{self.entry_id}"

    @property
    def pool(self) -> str:
        """The pool it is queued in."""
        return self.stream[: self.stream.rindex("}:")].partition(":queue:")[2]


@dataclass(frozen=True, slots=True)
class Depth:
    """How many jobs of a level are not delivered: those that could be, or wait for their owner's turn, and those not due yet."""

    waiting: int
    delayed: int


@dataclass(frozen=True, slots=True)
class _Look:
    """What one look at the pools found: entries, or the ends of the streams from which to wait for more."""

    entries: list[Entry]
    ends: list[dict[Any, Any]]
    wait_ms: int


class _Keys:
    """The keys of a pool. The braces are a Redis Cluster hash tag: all lie in one slot, so that one script can use them."""

    __slots__ = ("all", "delayed", "mark", "ready", "streams", "waiting")

    def __init__(self, prefix: str, pool: str) -> None:
        tag = f"{{{prefix}:queue:{pool}}}"
        self.mark = f"{tag}:mark"
        self.streams = {int(level): f"{tag}:{int(level)}" for level in sorted(Priority)}
        self.waiting = {level: f"{stream}:waiting" for level, stream in self.streams.items()}
        self.ready = {level: f"{stream}:ready" for level, stream in self.streams.items()}
        self.delayed = {level: f"{stream}:delayed" for level, stream in self.streams.items()}
        self.all = [f"{tag}:running"]
        for level, stream in self.streams.items():
            self.all += stream, self.waiting[level], self.ready[level], self.delayed[level]


class JobQueue:
    """The queue, as one worker sees it (or, without `worker_id`, as those see it who only put jobs in).

    `owner_limits` says how many jobs of one owner may run at a time when the next is of that level; a level without: no limit.
    `blocking` is a client for reads that wait: one whose time-out is longer than they do.
    """

    def __init__(
        self,
        client: "redis.Redis | RedisCluster",
        prefix: str,
        *,
        lease_s: float,
        blocking: "redis.Redis | RedisCluster",
        worker_id: str = "",
        owner_limits: Mapping[Priority, int] = {},
    ) -> None:
        if worker_id == PASSED:
            raise ValueError(f"a worker cannot be called {PASSED!r}: parked entries have this name")
        self._redis: Any = client
        self._blocking: Any = blocking
        self._prefix = prefix
        self._lease_s = lease_s
        self._lease_ms = int(lease_s * 1000)
        self._worker_id = worker_id
        self._limits = [owner_limits.get(level, 0) for level in sorted(Priority)]
        self._pools: dict[str, _Keys] = {}
        self._places: defaultdict[str, int] = defaultdict(int)
        self._turn = 0
        self._put, self._take, self._done, self._untake, self._missing, self._renew, self._life = (
            AsyncScript(client, script)
            for script in (
                queue_scripts.PUT,
                queue_scripts.TAKE,
                queue_scripts.DONE,
                queue_scripts.UNTAKE,
                queue_scripts.MISSING,
                queue_scripts.RENEW,
                queue_scripts.LIFE,
            )
        )

    def _keys(self, pool: str) -> _Keys:
        keys = self._pools.get(pool)
        if keys is None:
            keys = self._pools[pool] = _Keys(self._prefix, pool)
        return keys

    async def put(self, job: Job) -> None:
        """Put a job in, for now or for its retry time. One that waits in the queue already is not put in twice."""
        await self.put_many([job])

    async def put_many(self, jobs: Sequence[Job]) -> None:
        """Put jobs in, as `put` does."""
        for pool, of_pool in _by_pool(jobs):
            for batch in _batches(of_pool):
                args = [f"{int(job.priority)}{_due_ms(job):013d} {_member(job)}" for job in batch]
                await self._put(self._keys(pool).all, self._limits + args)

    async def take(self, pools: Sequence[str], *, count: int = 1, warm: Collection[str] = ()) -> list[Entry]:
        """Up to `count` jobs for this worker: those of silent workers first, else by weighted priority, owners in turns.

        Of the next few undelivered jobs of a level, one of a model in `warm` goes first. None after 2 s or a tenth of a lease,
        whichever is less: so often it is looked for silent workers. A cancelled call has taken nothing.
        """
        look = asyncio.create_task(self._look(pools, count, warm))
        try:
            found = await asyncio.shield(look)
        except asyncio.CancelledError:
            await _uninterrupted(self._give_back(look))
            raise
        if not found.entries:
            await self._wait(found)
        return found.entries

    async def _look(self, pools: Sequence[str], count: int, warm: Collection[str]) -> _Look:
        first = self._turn % len(pools)
        self._turn += 1
        entries: list[Entry] = []
        ends: list[dict[Any, Any]] = []
        wait_ms = max(1, min(BLOCK_MS, self._lease_ms // 10))
        for pool in (*pools[first:], *pools[:first]):
            keys, place = self._keys(pool), self._places[pool]
            args = [*self._limits, self._worker_id, self._lease_ms, count - len(entries), place, *warm]
            try:
                reply: list[Any] = await self._take(keys.all, args)
            except (RedisError, OSError):
                if entries:
                    break
                raise
            values = iter(reply[0])
            delivered = 0
            for level, taken_over, entry_id, job, owner in zip(values, values, values, values, values, strict=True):
                delivered += not taken_over
                entries.append(
                    Entry(keys.streams[level], entry_id.decode(), uuid.UUID(job.decode()), uuid.UUID(owner.decode()), bool(taken_over))
                )
            # A place for each pool: one for all, and two pools in turns would always see the same half of the order.
            self._places[pool] = (place + delivered) % WEIGHTED_ORDER
            if len(entries) >= count:
                break
            if not reply[0]:
                _, free_end, pro_end, due_in_ms = reply
                ends.append({keys.streams[Priority.FREE]: free_end, keys.streams[Priority.PRO]: pro_end})
                if due_in_ms >= 0:
                    wait_ms = max(1, min(wait_ms, due_in_ms))
        return _Look(entries, ends, wait_ms)

    async def _wait(self, look: _Look) -> None:
        """Until something is added to a stream behind the end that the look saw."""
        ends = look.ends
        if not isinstance(self._redis, RedisCluster):
            ends = [{stream: end for of_pool in ends for stream, end in of_pool.items()}]
        # In a cluster a read cannot span slots: the pools one after the other, and what came meanwhile is there in its turn.
        for of_pool in ends:
            if await self._blocking.xread(of_pool, count=1, block=max(1, look.wait_ms // len(ends))):
                return

    async def _give_back(self, look: "asyncio.Task[_Look]") -> None:
        await asyncio.wait([look])
        if look.cancelled() or look.exception() is not None:
            return
        # The newest first: an owner's oldest entry is to be their next one.
        entries = look.result().entries[::-1]
        with suppress(RedisError, OSError):  # others claim them when the lease is over
            for pool, of_pool in _grouped(entries):
                args = [f"{e.stream[-1]}{int(e.taken_over)} {e.owner_id} {e.job_id} {e.entry_id}" for e in of_pool]
                await self._untake(self._keys(pool).all, [*self._limits, self._worker_id, self._lease_ms, *args])

    async def done(self, entry: Entry) -> None:
        """Remove an entry whose job was handled. One that another worker has claimed in the meantime stays."""
        await self.done_many([entry])

    async def done_many(self, entries: Iterable[Entry]) -> None:
        """Remove entries, as `done` does."""
        for pool, of_pool in _grouped(entries):
            for batch in _batches(of_pool):
                args = [f"{entry.stream[-1]} {entry.owner_id} {entry.entry_id}" for entry in batch]
                await self._done(self._keys(pool).all, [*self._limits, self._worker_id, *args])

    async def remove(self, job: Job) -> None:
        """Forget a job that waits or is delayed. An entry in a stream stays: a worker looks at it and drops it."""
        keys = self._keys(job.pool)
        # In this order: a delayed job may become a waiting one in between.
        for key in (keys.delayed[job.priority], keys.waiting[job.priority]):
            await self._redis.zrem(key, _member(job))

    async def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of the jobs that are not in the queue: neither undelivered, waiting nor delayed. Delivered ones count as missing."""
        missing: list[Job] = []
        for pool, of_pool in _by_pool(jobs):
            for batch in _batches(of_pool):
                args = [f"{int(job.priority)} {_member(job)}" for job in batch]
                numbers: list[int] = await self._missing(self._keys(pool).all, self._limits + args)
                missing += [batch[number] for number in numbers]
        return missing

    async def renew(self, entry: Entry) -> Hold:
        """Tell the queue that this worker is alive and has the entry; says who has it."""
        hold: bytes = await self._renew(
            [entry.stream, self._alive_key(entry.stream, entry.job_id)], [self._worker_id, entry.entry_id, self._lease_ms]
        )
        return Hold[hold.decode()]

    async def holder(self, stream: str, entry_id: str) -> str | None:
        """The worker that has an entry (`passed`: one given back, for the next to take); None when the queue does not know it."""
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

    async def depth(self, pool: str) -> dict[Priority, Depth]:
        """How many jobs of a pool wait, by level."""
        depths: dict[Priority, Depth] = {}
        keys = self._keys(pool)
        for level in Priority:
            waiting = await self._redis.zcard(keys.waiting[level]) + await self._redis.hlen(keys.ready[level])
            depths[level] = Depth(waiting, await self._redis.zcard(keys.delayed[level]))
        return depths

    async def lost(self, pool: str) -> bool:
        """Whether a pool's entries may have been lost since `rebuilt`: Redis was emptied, or is not the process it was (a restart
        loses what was not on disk yet, a fail-over what the replica had not got)."""
        run_id, _, mark = await self._read_life(pool)
        return mark is None or mark[0] != run_id

    async def rebuilt(self, pool: str) -> None:
        """Note that every pending job of a pool was put into the queue again, or is about to be."""
        await self._life([self._keys(pool).mark], ["1"])

    async def settled(self, pool: str) -> bool:
        """Whether the pool was rebuilt at least a lease ago: every live worker has said since that it is alive."""
        run_id, now_ms, mark = await self._read_life(pool)
        return mark is not None and mark[0] == run_id and now_ms - mark[1] >= self._lease_ms

    async def _read_life(self, pool: str) -> tuple[str, int, tuple[str, int] | None]:
        """Run id of the Redis that has the pool, its time in milliseconds, both as of the last rebuild."""
        run_id, now_ms, value = await self._life([self._keys(pool).mark], ["0"])
        mark = None
        if value is not None:
            marked_id, _, marked_ms = value.decode().partition(" ")
            mark = (marked_id, int(marked_ms or 0))
        return run_id.decode(), now_ms, mark


def _member(job: Job) -> str:
    return f"{job.owner_id} {job.job_id} {job.model}"


def _due_ms(job: Job) -> int:
    return 0 if job.retry_time is None else math.ceil(job.retry_time.timestamp() * 1000)


def _by_pool(jobs: Sequence[Job]) -> Iterable[tuple[str, Sequence[Job]]]:
    pools: dict[str, list[Job]] = {}
    for job in jobs:
        pools.setdefault(job.pool, []).append(job)
    return pools.items()


def _grouped(entries: Iterable[Entry]) -> Iterable[tuple[str, Sequence[Entry]]]:
    streams: dict[str, list[Entry]] = {}
    for entry in entries:
        streams.setdefault(entry.stream, []).append(entry)
    return ((of_stream[0].pool, of_stream) for of_stream in streams.values())


def _batches(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[at : at + BATCH] for at in range(0, len(items), BATCH))


async def _uninterrupted(work: Awaitable[None]) -> None:
    """Do some short work to its end, however often it is asked to stop meanwhile."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    task.result()
