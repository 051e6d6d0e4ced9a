"""Watches: one Redis reader a process, every event serialised once, fanned out as bytes.

A watcher that does not keep up loses intermediate progress (newest wins), never a change of state; its memory is bounded.
"""

import asyncio
import math
import time
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import grpc
import structlog
from prometheus_client import Counter, Gauge
from redis.exceptions import RedisError

from genmesh.jobs.v1 import jobs_pb2
from jobs_service.events import START, EventLog, Position, StoredEvent, Token, owner_tag, shard_of
from jobs_service.lifecycle import Job
from servicekit.errors import MeshError, limit_reached, unavailable
from servicekit.identity import Principal
from servicekit.streams import BLOCK_MS

READ_COUNT = 512
REPLAY_COUNT = 256
BACKLOG_SOFT = 128
"""Events a watcher may lag before intermediate ones are dropped."""
BACKLOG_HARD = 2048
"""Changes of state a watcher may lag before it is sent snapshots instead."""
BATCH = 32
"""Events a stream takes out of its slot at once."""
OFFERS_AT_ONCE = 20_000
"""Offers the reader makes before it lets the streams have a turn: some ten milliseconds of work."""
KNOWN_MAX = 4_096
"""Jobs of which a watch of everything remembers what it told; the oldest is forgotten first."""
WATCHES_MAX = 2_048
"""Watches of a process: half the RPCs that it serves at once, as jobs must be made and cancelled however many people watch theirs."""
FULL_RETRY_S = 1.0
"""Another replica may have room."""
RETRY_S = 0.5
ANNOUNCED_WITHIN = timedelta(minutes=5)
"""An end is announced after it was committed, later if Redis is away: one may be lost that is older than what a watcher has seen."""

WATCHERS = Gauge("genmesh_watchers", "Open watches")
SERIALISED = Counter("genmesh_watch_events_serialised_total", "Events serialised for watchers")
DELIVERED = Counter("genmesh_watch_events_delivered_total", "Events handed to watchers")

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Ready:
    """An event ready to be sent to any number of watchers."""

    position: Position
    job_id: str
    sequence: int
    version: int
    is_state: bool
    final: bool
    data: bytes


class Watcher:
    """The slot between the reader and one stream."""

    def __init__(self, owner_id: str, job_ids: frozenset[str]) -> None:
        self.owner_id = owner_id
        self.job_ids = job_ids
        self.lost = False
        """Set when events were lost for this watcher: it has to start over with snapshots."""
        self._backlog: deque[Ready] = deque()
        self._woken = False
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = math.inf

    @property
    def topics(self) -> list[tuple[str, str]]:
        """Where the reader looks for it: owner and job; no job for all of them."""
        return [(self.owner_id, job_id) for job_id in self.job_ids or ("",)]

    def wants(self, job_id: str) -> bool:
        """Whether events of this job are for this watcher."""
        return not self.job_ids or job_id in self.job_ids

    def offer(self, event: Ready) -> None:
        """Add an event; when the watcher lags, older progress of the same job makes room for it."""
        if len(self._backlog) >= BACKLOG_SOFT:
            self._backlog = deque(other for other in self._backlog if other.is_state or other.job_id != event.job_id)
            if len(self._backlog) >= BACKLOG_HARD:
                self.lose()
                return
        self._backlog.append(event)
        self.wake()

    def lose(self) -> None:
        """Make the watcher start over."""
        self._backlog.clear()
        self.lost = True
        self.wake()

    def start_over(self) -> None:
        """Forget what was offered so far: snapshots read from now on have it."""
        self._backlog.clear()
        self.lost = False

    def wake(self) -> None:
        """Make `wait` return."""
        self._woken = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    @property
    def waiting(self) -> bool:
        """Whether there is an event to take."""
        return bool(self._backlog)

    def next(self) -> Ready | None:
        """The oldest event not taken yet."""
        return self._backlog.popleft() if self._backlog else None

    async def wait(self, timeout_s: float) -> None:
        """Return when there may be something to take, at the latest after `timeout_s`; now and then before, for nothing."""
        if self._woken:
            self._woken = False
            return
        loop = asyncio.get_running_loop()
        # A timer that rings too early stays: starting and ending one for each event would cost more than handing it over.
        due = time.monotonic() + timeout_s
        if due < self._timer_due:
            self.close()
            self._timer, self._timer_due = loop.call_later(timeout_s, self._ring), due
        self._waiter = loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
            self._woken = False

    def _ring(self) -> None:
        self._timer, self._timer_due = None, math.inf
        self.wake()

    def close(self) -> None:
        """Ring no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._timer_due = None, math.inf


class Hub:
    """Reads all event streams and hands each event to the watchers of its owner."""

    def __init__(self, log: EventLog, *, watches_max: int = WATCHES_MAX) -> None:
        self._log = log
        self._watches_max = watches_max
        self._count = 0
        self._watchers: set[Watcher] = set()
        self._by_topic: defaultdict[tuple[str, str], set[Watcher]] = defaultdict(set)
        self._positions: dict[int, Position] = {}
        self.epoch = ""
        self.reading = asyncio.Event()
        """Set while the streams can be read."""
        self._moved = asyncio.Event()
        self._read_time = time.time()
        self.sure_until = datetime.now(UTC)
        """When the streams of the life of Redis before this one were read last."""
        self.draining = False
        """Set when the process is told to stop: watches end, so that their clients resume elsewhere."""

    def position(self, shard: int) -> Position:
        """Everything up to here has been handed out."""
        return self._positions.get(shard, START)

    async def reach(self, shard: int, position: Position) -> None:
        """Return when everything up to `position` has been handed out. UNAVAILABLE if that takes longer than 2 s."""
        try:
            async with asyncio.timeout(BLOCK_MS / 1000):
                await self.reading.wait()
                while self.position(shard) < position:
                    await self._moved.wait()
        except TimeoutError:
            raise unavailable("events are out of reach right now") from None

    @asynccontextmanager
    async def place(self) -> AsyncGenerator[None]:
        """One open watch of this process while the block runs. Raises RESOURCE_EXHAUSTED (LIMIT_REACHED) when there are enough."""
        if self._count >= self._watches_max:
            raise limit_reached(
                "process_watches",
                f"too many watches in this process: at most {self._watches_max} may be open at once",
                retry_after_s=FULL_RETRY_S,
            )
        self._count += 1
        try:
            yield
        finally:
            self._count -= 1

    @contextmanager
    def watching(self, owner_id: uuid.UUID, job_ids: Sequence[str]):
        """A watcher that is offered events while the block runs."""
        watcher = Watcher(str(owner_id), frozenset(job_ids))
        self._watchers.add(watcher)
        for topic in watcher.topics:
            self._by_topic[topic].add(watcher)
        WATCHERS.inc()
        try:
            yield watcher
        finally:
            WATCHERS.dec()
            watcher.close()
            self._watchers.discard(watcher)
            for topic in watcher.topics:
                others = self._by_topic[topic]
                others.discard(watcher)
                if not others:
                    del self._by_topic[topic]

    def drain(self) -> None:
        """End all watches."""
        self.draining = True
        for watcher in self._watchers:
            watcher.wake()

    async def run(self) -> None:
        """Read until cancelled. Redis away: tries again; a new life of Redis: every watcher starts over with snapshots."""
        while True:
            try:
                await self._round()
            except (RedisError, OSError) as error:
                _log.warning("watch.read_failed", error=repr(error))
                self.reading.clear()
                await asyncio.sleep(RETRY_S)

    async def _round(self) -> None:
        epoch, before = await self._log.epoch()
        if epoch != self.epoch:
            self._positions = await self._log.ends()
            self.epoch = epoch
            self.sure_until = datetime.fromtimestamp(self._read_time, UTC)
            for watcher in self._watchers:
                watcher.lose()
        self.reading.set()
        batches = await self._log.read(self._positions, count=READ_COUNT, block_ms=BLOCK_MS)
        full = {shard for shard, events in batches if len(events) >= READ_COUNT}
        offers = 0
        for shard, events in batches:
            for event in events:
                offers += self._hand_out(event)
                self._positions[shard] = event.position  # a watch may begin during the pause
                if offers >= OFFERS_AT_ONCE:
                    offers = 0
                    await asyncio.sleep(0)
        for shard, position in self._positions.items():
            # A quiet stream moves on too, or its tokens would grow old without anything having been missed.
            if shard not in full and position < before:
                self._positions[shard] = before
        self._read_time = time.time()
        self._moved.set()
        self._moved = asyncio.Event()

    def _hand_out(self, stored: StoredEvent) -> int:
        mine = self._by_topic.get((stored.owner_id, stored.job_id), ())
        everything = self._by_topic.get((stored.owner_id, ""), ())
        count = len(mine) + len(everything)
        if count:
            ready = self.ready(stored)
            for watcher in mine:
                watcher.offer(ready)
            for watcher in everything:
                watcher.offer(ready)
            DELIVERED.inc(count)
        return count

    def token(self, owner_id: uuid.UUID) -> Token:
        """What has been handed out by now of an owner's events."""
        return Token(self.epoch, owner_tag(owner_id), self.position(shard_of(owner_id)))

    def ready(self, stored: StoredEvent) -> Ready:
        """Serialise an event for its watchers."""
        SERIALISED.inc()
        data = stored.message(Token(self.epoch, owner_tag(stored.owner_id), stored.position).encode())
        return Ready(stored.position, stored.job_id, stored.sequence, stored.version, stored.is_state, stored.final, data)


@dataclass(frozen=True, slots=True)
class WatchRequest:
    """What a client asked to watch."""

    owner_id: uuid.UUID
    job_ids: tuple[str, ...]
    """Empty: all of the owner's."""
    resume_token: str
    caller: Principal
    """When the caller's access token ends, so does the watch."""
    ended_since: datetime | None = None
    """Watching everything, with a token that is too old to replay from: jobs that ended since then are told too."""


Snapshots = Callable[[WatchRequest], Awaitable[list[tuple[Job, jobs_pb2.Job]]]]
"""Reads the jobs to begin with, from the store: NOT_FOUND if one of `job_ids` is not the owner's."""


class WatchStream:
    """One call of WatchJobs: snapshots or replay first, then live events, checkpoints in between."""

    def __init__(self, hub: Hub, log: EventLog, snapshots: Snapshots, *, checkpoint_interval_s: float) -> None:
        self._hub = hub
        self._log = log
        self._snapshots = snapshots
        self._checkpoint_interval_s = checkpoint_interval_s
        self._versions: dict[str, int] = {}
        """Newest version that the client was told of each job."""
        self._open: set[str] = set()
        """Jobs that the client asked for or was told of, and takes for unfinished."""
        self._after = START
        """Events up to here were sent by the replay, or seen by the client before."""

    @property
    def known(self) -> set[str]:
        """Jobs of which the stream remembers something."""
        return self._versions.keys() | self._open

    async def run(self, request: WatchRequest, admission: AbstractAsyncContextManager[None] | None = None) -> AsyncGenerator[bytes, None]:
        """Serialised WatchJobsResponses until every job asked for has ended (never, when all are watched).

        `admission` is held meanwhile, and may refuse the watch. Whether all jobs have ended is looked at after the replay, not at each
        end on the way: a job that failed may have been retried since.
        """
        shard = shard_of(request.owner_id)
        token = Token.decode(request.resume_token, owner_id=request.owner_id) if request.resume_token else None
        self._open = set(request.job_ids)
        # From the first moment on: a watch that waits for Redis or the store is an RPC in flight, too.
        async with self._hub.place(), admission or nullcontext():
            # What was published before the snapshots are read lies before their token: resuming there does not repeat it.
            await self._hub.reach(shard, START if token else await self._log.end(shard))
            with self._hub.watching(request.owner_id, request.job_ids) as watcher:
                here = self._hub.token(request.owner_id)
                honoured = token is not None and self._log.honours(token, here.epoch)
                if token is not None and not honoured:
                    request = replace(request, ended_since=token.time - ANNOUNCED_WITHIN)
                known = await self._snapshots(request)
                if token is not None and honoured:
                    async with aclosing(self._replay(shard, token, here.position, watcher, known)) as messages:
                        async for data in messages:
                            yield data
                else:
                    for data in self._begin(here, known):
                        yield data
                last_sent = time.monotonic()
                while self._open or not request.job_ids:
                    # A batch at a time, and no generator within this one: a fan-out feels every step that a message takes.
                    batch = await self._next(request, watcher, last_sent)
                    for data in batch:
                        yield data
                    if batch:
                        last_sent = time.monotonic()

    def _begin(self, here: Token, known: list[tuple[Job, jobs_pb2.Job]]) -> list[bytes]:
        # The snapshots were read after `here` was taken: whoever resumes there misses nothing that they lack.
        token = here.encode()
        for job, _ in known:
            self._told(str(job.job_id), job.version, ended=job.state.terminal)
        snapshots = [jobs_pb2.WatchJobsResponse(snapshot=message, resume_token=token).SerializeToString() for _, message in known]
        return snapshots or [_checkpoint(token)]

    async def _replay(
        self, shard: int, token: Token, until: Position, watcher: Watcher, known: list[tuple[Job, jobs_pb2.Job]]
    ) -> AsyncGenerator[bytes, None]:
        newest = await self._log.newest(sorted(self._open))
        for key, last in newest.items():
            if last.final and last.position <= token.position:
                self._open.discard(key)  # the client has seen it end
        for job, message in known:
            key = str(job.job_id)
            if job.state.terminal and key in self._open and (key not in newest or newest[key].version < job.version):
                # Its last event is not published yet, or long forgotten: the client need not wait for it.
                self._told(key, job.version, ended=True)
                yield jobs_pb2.WatchJobsResponse(snapshot=message, resume_token=token.encode()).SerializeToString()
        if watcher.job_ids and not self._open:
            yield _checkpoint(token.encode())
            return
        after = token.position
        while after < until:
            events = await self._log.range(shard, after, until, REPLAY_COUNT)
            for stored in events:
                after = stored.position
                if stored.owner_id == watcher.owner_id and watcher.wants(stored.job_id):
                    data = self._accept(self._hub.ready(stored))
                    if data is not None:
                        yield data
            if len(events) < REPLAY_COUNT:
                break
        self._after = max(token.position, until)

    async def _next(self, request: WatchRequest, watcher: Watcher, last_sent: float) -> list[bytes]:
        """What to send next, as soon as there is something: events, a checkpoint, or snapshots to start over with. May be nothing."""
        while True:
            self._check_alive(request)
            if watcher.lost:
                watcher.start_over()
                here = self._hub.token(request.owner_id)
                known = await self._again(request)
                self._versions.clear()
                self._after = START
                return self._begin(here, known)
            if watcher.waiting:
                return self._events(request, watcher)
            silence_s = time.monotonic() - last_sent
            if silence_s >= self._checkpoint_interval_s:
                # Nothing is waiting, so everything up to the hub's position has been sent.
                here = self._hub.token(request.owner_id)
                return [_checkpoint(replace(here, position=max(self._after, here.position)).encode())]
            timeout_s = self._checkpoint_interval_s - silence_s
            if request.caller.expire_time is not None:
                timeout_s = min(timeout_s, max(0.0, request.caller.expire_time - time.time()))
            await watcher.wait(timeout_s)

    def _events(self, request: WatchRequest, watcher: Watcher) -> list[bytes]:
        """Events that wait, up to `BATCH`: what is taken out of the slot can no longer make room for newer ones."""
        batch: list[bytes] = []
        while len(batch) < BATCH and (event := watcher.next()) is not None:
            if self._after is not START:
                if event.position <= self._after:
                    continue
                self._after = START  # so is everything that comes now
            # Nearly every event is one of a state that the client knows.
            known_state = not event.is_state and event.version == self._versions.get(event.job_id)
            data = event.data if known_state else self._accept(event)
            if data is not None:
                batch.append(data)
                if event.final and request.job_ids and not self._open:
                    break
        return batch

    async def _again(self, request: WatchRequest) -> list[tuple[Job, jobs_pb2.Job]]:
        """Snapshots to start over with: also of jobs that the client takes for unfinished, as their end may be what was lost."""
        if request.job_ids:
            return await self._snapshots(replace(request, job_ids=tuple(sorted(self._open))))
        # Jobs, too, that began and ended in what was lost: the client has never heard of them.
        known = await self._snapshots(replace(request, ended_since=self._hub.sure_until - ANNOUNCED_WITHIN))
        missing = self._open - {str(job.job_id) for job, _ in known}
        self._open.clear()
        return await self._still_there(request, sorted(missing)) + known if missing else known

    async def _still_there(self, request: WatchRequest, job_ids: Sequence[str]) -> list[tuple[Job, jobs_pb2.Job]]:
        try:
            return await self._snapshots(replace(request, job_ids=tuple(job_ids)))
        except MeshError as refusal:
            if refusal.code is not grpc.StatusCode.NOT_FOUND:
                raise
        if len(job_ids) == 1:
            return []
        # One of them has been deleted, which is rare: each is asked for by itself.
        return [found for job_id in job_ids for found in await self._still_there(request, [job_id])]

    def _check_alive(self, request: WatchRequest) -> None:
        if self._hub.draining:
            raise unavailable("this server is going away; resume the watch", 0.1)
        request.caller.check_alive()

    def _accept(self, event: Ready) -> bytes | None:
        """The event's bytes, or None for what the client knows already."""
        version = self._versions.get(event.job_id, 0)
        if event.version < version:
            return None
        if event.version == version and not event.is_state:
            return event.data
        self._told(event.job_id, event.version, ended=event.final)
        if event.final:
            # Nothing more comes of this version, and what comes of a later one is news.
            del self._versions[event.job_id]
        return event.data if event.version > version else None

    def _told(self, job_id: str, version: int, *, ended: bool) -> None:
        self._versions[job_id] = version
        if ended:
            self._open.discard(job_id)
        else:
            self._open.add(job_id)
        if len(self._versions) > KNOWN_MAX:
            oldest = next(iter(self._versions))
            del self._versions[oldest]
            self._open.discard(oldest)


def _checkpoint(token: str) -> bytes:
    return jobs_pb2.WatchJobsResponse(checkpoint=jobs_pb2.Checkpoint(), resume_token=token).SerializeToString()
