"""Watches: one Redis reader a process, every event serialised once, fanned out as bytes.

A watcher that does not keep up loses intermediate progress (newest wins), never a change of state; its memory is bounded.
"""

import asyncio
import time
import uuid
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime

import structlog
from prometheus_client import Counter, Gauge
from redis.exceptions import RedisError

from genmesh.jobs.v1 import jobs_pb2
from jobs_service.events import START, EventLog, Position, StoredEvent, Token, owner_tag, shard_of
from jobs_service.lifecycle import Job
from servicekit.errors import Reason, unauthenticated, unavailable
from servicekit.streams import BLOCK_MS

READ_COUNT = 512
REPLAY_COUNT = 256
BACKLOG_SOFT = 128
"""Events a watcher may lag before intermediate ones are dropped."""
BACKLOG_HARD = 2048
"""Changes of state a watcher may lag before it is sent snapshots instead."""
RETRY_S = 0.5

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
        self._wake = asyncio.Event()

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
        self._wake.set()

    def lose(self) -> None:
        """Make the watcher start over."""
        self._backlog.clear()
        self.lost = True
        self._wake.set()

    def start_over(self) -> None:
        """Forget what was offered so far: snapshots read from now on have it."""
        self._backlog.clear()
        self.lost = False

    def wake(self) -> None:
        """Make `wait` return."""
        self._wake.set()

    def next(self) -> Ready | None:
        """The oldest event not taken yet."""
        if not self._backlog:
            self._wake.clear()
            return None
        return self._backlog.popleft()

    async def wait(self) -> None:
        """Return when there may be something to take."""
        await self._wake.wait()


class Hub:
    """Reads all event streams and hands each event to the watchers of its owner."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._watchers: defaultdict[str, set[Watcher]] = defaultdict(set)
        self._positions: dict[int, Position] = {}
        self.epoch = ""
        self.reading = asyncio.Event()
        """Set while the streams can be read."""
        self._moved = asyncio.Event()
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

    @contextmanager
    def watching(self, owner_id: uuid.UUID, job_ids: Sequence[str]):
        """A watcher that is offered events while the block runs."""
        watcher = Watcher(str(owner_id), frozenset(job_ids))
        self._watchers[watcher.owner_id].add(watcher)
        WATCHERS.inc()
        try:
            yield watcher
        finally:
            WATCHERS.dec()
            mine = self._watchers[watcher.owner_id]
            mine.discard(watcher)
            if not mine:
                del self._watchers[watcher.owner_id]

    def drain(self) -> None:
        """End all watches."""
        self.draining = True
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.wake()

    async def run(self) -> None:
        """Read until cancelled. Redis away: tries again; Redis emptied: every watcher starts over with snapshots."""
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
            for watchers in self._watchers.values():
                for watcher in watchers:
                    watcher.lose()
        self.reading.set()
        batches = await self._log.read(self._positions, count=READ_COUNT, block_ms=BLOCK_MS)
        full = {shard for shard, events in batches if len(events) >= READ_COUNT}
        for shard, events in batches:
            for event in events:
                self._hand_out(event)
            self._positions[shard] = events[-1].position
        for shard, position in self._positions.items():
            # A quiet stream moves on too, or its tokens would grow old without anything having been missed.
            if shard not in full and position < before:
                self._positions[shard] = before
        self._moved.set()
        self._moved = asyncio.Event()

    def _hand_out(self, stored: StoredEvent) -> None:
        watchers = self._watchers.get(stored.owner_id)
        if not watchers:
            return
        interested = [watcher for watcher in watchers if watcher.wants(stored.job_id)]
        if interested:
            ready = self.ready(stored)
            for watcher in interested:
                watcher.offer(ready)
            DELIVERED.inc(len(interested))

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
    expire_time: float | None
    """When the caller's access token ends (Unix time), and the watch with it."""
    ended_since: datetime | None = None
    """Watching everything, with a token that is too old to replay from: jobs that ended since then are told too."""


Snapshots = Callable[[WatchRequest], Awaitable[list[tuple[Job, jobs_pb2.Job]]]]
"""Reads the jobs to begin with, from the store: NOT_FOUND if one of `job_ids` is not the owner's."""


class _AllEndedError(Exception):
    """Every job that was asked for has ended, and the client knows."""


class WatchStream:
    """One call of WatchJobs: snapshots or replay first, then live events, checkpoints in between."""

    def __init__(self, hub: Hub, log: EventLog, snapshots: Snapshots, *, checkpoint_interval_s: float) -> None:
        self._hub = hub
        self._log = log
        self._snapshots = snapshots
        self._checkpoint_interval_s = checkpoint_interval_s
        # What the client knows, by job: the numbers of the newest event, the jobs it asked for that have not ended.
        self._sequences: dict[str, int] = {}
        self._versions: dict[str, int] = {}
        self._remaining: set[str] = set()
        self._after = START
        """Events up to here were sent by the replay, or seen by the client before."""

    async def run(self, request: WatchRequest) -> AsyncGenerator[bytes, None]:
        """Serialised WatchJobsResponses until every job asked for has ended (never, when all are watched)."""
        shard = shard_of(request.owner_id)
        token = Token.decode(request.resume_token, owner_id=request.owner_id) if request.resume_token else None
        self._remaining = set(request.job_ids)
        # What was published before the snapshots are read lies before their token: resuming there does not repeat it.
        await self._hub.reach(shard, START if token else await self._log.end(shard))
        with self._hub.watching(request.owner_id, request.job_ids) as watcher, suppress(_AllEndedError):
            until = self._hub.position(shard)
            honoured = token is not None and self._log.honours(token, self._hub.epoch)
            if token is not None and not honoured:
                request = replace(request, ended_since=token.time)
            known = await self._snapshots(request)
            if token is not None and honoured:
                first = self._replay(shard, token, until, watcher, known)
            else:
                first = self._begin(request, until, known)
            async with aclosing(first) as messages:
                async for data in messages:
                    yield data
            async with aclosing(self._live(request, shard, watcher)) as messages:
                async for data in messages:
                    yield data

    async def _begin(self, request: WatchRequest, position: Position, known: list[tuple[Job, jobs_pb2.Job]]) -> AsyncGenerator[bytes, None]:
        # The snapshots were read after `position` was taken: whoever resumes there misses nothing that they lack.
        token = Token(self._hub.epoch, owner_tag(request.owner_id), position).encode()
        for job, message in known:
            key = str(job.job_id)
            self._versions[key] = job.version
            if job.state.terminal:
                self._remaining.discard(key)
            yield jobs_pb2.WatchJobsResponse(snapshot=message, resume_token=token).SerializeToString()
        if not known:
            yield _checkpoint(token)
        self._check_ended(request)

    async def _replay(
        self, shard: int, token: Token, until: Position, watcher: Watcher, known: list[tuple[Job, jobs_pb2.Job]]
    ) -> AsyncGenerator[bytes, None]:
        ends = await self._log.final_positions(sorted(self._remaining))
        for key, position in ends.items():
            if position <= token.position:
                self._remaining.discard(key)  # the client has seen it end
        for job, message in known:
            if job.state.terminal and str(job.job_id) in self._remaining - ends.keys():
                # Its last event is not published yet, or long forgotten: the client need not wait for it.
                self._remaining.discard(str(job.job_id))
                self._versions[str(job.job_id)] = job.version
                yield jobs_pb2.WatchJobsResponse(snapshot=message, resume_token=token.encode()).SerializeToString()
        if watcher.job_ids and not self._remaining:
            yield _checkpoint(token.encode())
            raise _AllEndedError
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
        if watcher.job_ids and not self._remaining:
            raise _AllEndedError
        self._after = max(token.position, until)

    async def _live(self, request: WatchRequest, shard: int, watcher: Watcher) -> AsyncGenerator[bytes, None]:
        last_sent = time.monotonic()
        while True:
            self._check_alive(request)
            if watcher.lost:
                watcher.start_over()
                position = self._hub.position(shard)
                known = await self._again(request)
                self._versions.clear()
                self._after = START
                async with aclosing(self._begin(request, position, known)) as messages:
                    async for data in messages:
                        yield data
                last_sent = time.monotonic()
            event = watcher.next()
            if event is not None:
                data = self._accept(event) if event.position > self._after else None
                if data is not None:
                    yield data
                    last_sent = time.monotonic()
                    self._check_ended(request)
                continue
            silence_s = time.monotonic() - last_sent
            if silence_s >= self._checkpoint_interval_s:
                # Nothing is waiting, so everything up to the hub's position has been sent.
                position = max(self._after, self._hub.position(shard))
                yield _checkpoint(Token(self._hub.epoch, owner_tag(request.owner_id), position).encode())
                last_sent = time.monotonic()
                continue
            timeout_s = self._checkpoint_interval_s - silence_s
            if request.expire_time is not None:
                timeout_s = min(timeout_s, max(0.0, request.expire_time - time.time()))
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await watcher.wait()

    async def _again(self, request: WatchRequest) -> list[tuple[Job, jobs_pb2.Job]]:
        """Snapshots to start over with: also of jobs that the client takes for unfinished, as their end may be what was lost."""
        known = await self._snapshots(request)
        if not request.job_ids:
            told = (self._versions.keys() | self._sequences.keys()) - {str(job.job_id) for job, _ in known}
            if told:
                known = await self._snapshots(replace(request, job_ids=tuple(sorted(told)))) + known
        return known

    def _check_alive(self, request: WatchRequest) -> None:
        if self._hub.draining:
            raise unavailable("this server is going away; resume the watch", 0.1)
        if request.expire_time is not None and time.time() >= request.expire_time:
            raise unauthenticated(Reason.ERROR_REASON_TOKEN_EXPIRED, "the access token expired; resume the watch with a new one")

    def _accept(self, event: Ready) -> bytes | None:
        """The event's bytes, or None for what the client knows already."""
        if event.sequence <= self._sequences.get(event.job_id, 0):
            return None
        version = self._versions.get(event.job_id, 0)
        if event.version < version or (event.is_state and event.version == version):
            return None
        self._sequences[event.job_id] = event.sequence
        self._versions[event.job_id] = event.version
        if event.final:
            self._remaining.discard(event.job_id)
            # Nothing comes after the end: a watch of everything need not remember every job there ever was.
            self._sequences.pop(event.job_id)
            if not self._remaining:
                self._versions.pop(event.job_id)
        return event.data

    def _check_ended(self, request: WatchRequest) -> None:
        if request.job_ids and not self._remaining:
            raise _AllEndedError


def _checkpoint(token: str) -> bytes:
    return jobs_pb2.WatchJobsResponse(checkpoint=jobs_pb2.Checkpoint(), resume_token=token).SerializeToString()
