"""Events of jobs in Redis: how they are published, numbered, fenced and read.

A fixed number of streams, sharded by owner; trimmed by age. Beside them a small hash per job: the version and sequence
published last, and the newest progress. One script does a publish, so that of one job the versions only grow, sequence
numbers have no holes (but where Redis began a new life), and a worker that lost its job publishes nothing any more.
"""

import base64
import binascii
import hashlib
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from redis import asyncio as redis

from genmesh.jobs.v1 import jobs_pb2
from servicekit.errors import invalid

SHARDS = 8
JOB_TTL_MS = 48 * 3600 * 1000
FORGOTTEN_TTL_MS = 3600 * 1000
VERSION_MAX = 2**31 - 1
NUMBER_MAX = 2**64 - 1
TRIM_SLACK_S = 60
"""Events are kept this much longer than tokens are honoured, so that a token is never honoured over a trimmed event."""

# Which life of Redis this is. `life` is a hash: the run id of the process that wrote it, and the epoch. Another run id means a
# restart or a fail-over, in which the newest events may have been lost: the epoch changes before anything else happens.
LIFE = """
local function epoch_now(life, fresh)
  local server = redis.call('INFO', 'server')
  local at = string.find(server, 'run_id:', 1, true) + 7
  local run_id = string.sub(server, at, at + 39)
  local known = redis.call('HMGET', life, 'run_id', 'epoch')
  if known[1] == run_id then return known[2] end
  redis.call('HSET', life, 'run_id', run_id, 'epoch', fresh)
  return fresh
end
"""

# KEYS: life. ARGV: epoch of a new life. Returns the epoch and the time: seconds, microseconds.
EPOCH = (
    LIFE
    + """
local epoch, now = epoch_now(KEYS[1], ARGV[1]), redis.call('TIME')
return {epoch, now[1], now[2]}
"""
)

# KEYS: stream, job hash, life. ARGV: version, "1" for a change of state, "1" for a final one, owner, job id, event (without
# sequence), progress ("" for none), oldest id to keep, ttl of the hash, epoch of a new life, "1" for an event that may be the
# first of its version.
# Returns the sequence number, or 0 when the event is stale or a repetition.
#
# A job whose hash is missing or of another life (a new job, or what was lost with Redis) goes on at the server's time in
# microseconds: more than any number given out before a loss, and again more after the next one. What was announced of it may
# be lost too: then any event but a place in the queue may be the first of a version.
PUBLISH = (
    LIFE
    + """
local version, is_state = tonumber(ARGV[1]), ARGV[2] == '1'
local epoch = epoch_now(KEYS[3], ARGV[10])
local known = redis.call('HMGET', KEYS[2], 'version', 'sequence', 'final', 'epoch')
local current, sequence = tonumber(known[1] or 0), tonumber(known[2] or 0) + 1
local complete = known[4] == epoch
if is_state then
  if version <= current then return 0 end
elseif version == current then
  if known[3] == '1' then return 0 end
elseif complete or version < current or ARGV[11] ~= '1' then
  return 0
end
if not complete then
  local now = redis.call('TIME')
  sequence = math.max(sequence, tonumber(now[1]) * 1000000 + tonumber(now[2]))
end
sequence = string.format('%.0f', sequence)
local id = redis.call('XADD', KEYS[1], 'MINID', '~', ARGV[8], '*', 'o', ARGV[4], 'j', ARGV[5], 'e', ARGV[6],
  's', sequence, 'v', ARGV[1], 'k', ARGV[2], 'f', ARGV[3])
redis.call('HSET', KEYS[2], 'version', ARGV[1], 'sequence', sequence, 'final', ARGV[3], 'last', id, 'epoch', epoch)
if is_state or version > current then redis.call('HDEL', KEYS[2], 'progress') end
if ARGV[7] ~= '' then redis.call('HSET', KEYS[2], 'progress', ARGV[7]) end
redis.call('PEXPIRE', KEYS[2], ARGV[9])
return sequence
"""
)


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in an event stream."""

    milliseconds: int
    number: int

    @classmethod
    def parse(cls, text: str) -> "Position":
        """From Redis' `milliseconds-number`."""
        milliseconds, _, number = text.partition("-")
        position = cls(int(milliseconds), int(number))
        if max(position.milliseconds, position.number) > NUMBER_MAX:
            raise ValueError("beyond what Redis counts to")
        return position

    def __str__(self) -> str:
        return f"{self.milliseconds}-{self.number}"


START = Position(0, 0)


@dataclass(frozen=True, slots=True)
class Token:
    """A resume token: a position in the stream that has an owner's events, in one life of the Redis process (`epoch`)."""

    epoch: str
    owner: str
    """`owner_tag` of whom it was given to."""
    position: Position

    @property
    def time(self) -> datetime:
        """When the position was the newest, at the latest now."""
        return datetime.fromtimestamp(min(self.position.milliseconds / 1000, time.time()), UTC)

    def encode(self) -> str:
        """The opaque form that clients keep."""
        return base64.urlsafe_b64encode(f"{self.epoch}.{self.owner}.{self.position}".encode()).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str, *, owner_id: uuid.UUID) -> "Token":
        """Read a token back; INVALID_ARGUMENT when it is none, or was given to somebody else."""
        try:
            raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode("ascii")
            epoch, owner, position = raw.split(".")
            token = cls(epoch, owner, Position.parse(position))
        except (ValueError, binascii.Error) as error:
            raise invalid("resume_token", "is not a token of this service") from error
        if token.owner != owner_tag(owner_id) or token.encode() != text.rstrip("="):
            raise invalid("resume_token", "is not a token of this caller")
        return token


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """An event as it lies in a stream."""

    position: Position
    owner_id: str
    job_id: str
    event: bytes
    """JobEvent without its sequence number."""
    sequence: int
    version: int
    is_state: bool
    final: bool

    def message(self, token: str) -> bytes:
        """The WatchJobsResponse that clients get, serialised."""
        event = jobs_pb2.JobEvent.FromString(self.event)
        event.sequence = self.sequence
        return jobs_pb2.WatchJobsResponse(event=event, resume_token=token).SerializeToString()


@dataclass(frozen=True, slots=True)
class Newest:
    """The event of a job that was published last."""

    position: Position
    version: int
    final: bool


def shard_of(owner_id: uuid.UUID | str) -> int:
    """The stream that has an owner's events."""
    return int.from_bytes(hashlib.blake2s(str(owner_id).encode(), digest_size=2).digest(), "big") % SHARDS


def owner_tag(owner_id: uuid.UUID | str) -> str:
    """What a token says of its owner: enough to refuse somebody else's by mistake. It protects nothing, events are filtered by owner."""
    return hashlib.blake2s(str(owner_id).encode(), digest_size=4).hexdigest()


class Keys:
    """Names of the keys. The braces are a Redis Cluster hash tag: one script and one XREAD can reach them all."""

    def __init__(self, prefix: str) -> None:
        self._tag = f"{{{prefix}:events}}"
        self.life = f"{self._tag}:life"
        self.cancel = f"{self._tag}:cancel"

    def stream(self, shard: int) -> str:
        """Stream of a shard."""
        return f"{self._tag}:{shard}"

    def job(self, job_id: uuid.UUID | str) -> str:
        """Hash of a job."""
        return f"{self._tag}:job:{job_id}"


class EventLog:
    """The event streams: publish, read, resume."""

    def __init__(self, client: "redis.Redis", prefix: str, *, retention_s: int, blocking: "redis.Redis | None" = None) -> None:
        self._redis = client
        self._blocking = blocking or client
        self.keys = Keys(prefix)
        self._retention_s = retention_s
        self._publish = client.register_script(PUBLISH)
        self._epoch = client.register_script(EPOCH)

    async def publish(self, event: jobs_pb2.JobEvent, *, owner_id: uuid.UUID, version: int, final: bool = False) -> int:
        """Publish an event of the job's lifecycle `version`; its sequence number, or 0 when it was stale or known.

        Fill in everything but the sequence. A place in the queue is no first event of a job: it would pass for the
        announcement of the state that is still to come.
        """
        progress = event.progress.SerializeToString() if event.HasField("progress") else b""
        oldest_ms = int((time.time() - self._retention_s - TRIM_SLACK_S) * 1000)
        sequence = await self._publish(
            keys=[self.keys.stream(shard_of(owner_id)), self.keys.job(event.job_id), self.keys.life],
            args=[
                version,
                int(event.HasField("state_change")),
                int(final),
                str(owner_id),
                event.job_id,
                event.SerializeToString(),
                progress,
                f"{oldest_ms}-0",
                JOB_TTL_MS,
                uuid.uuid4().hex,
                int(not event.HasField("queue_update")),
            ],
        )
        return int(sequence)

    async def progress(self, job_ids: list[uuid.UUID]) -> dict[uuid.UUID, jobs_pb2.Progress]:
        """Newest progress of those jobs that have any."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hget(self.keys.job(job_id), "progress")
            values: list[bytes | None] = await pipe.execute()
        return {job_id: jobs_pb2.Progress.FromString(value) for job_id, value in zip(job_ids, values, strict=True) if value}

    async def newest(self, job_ids: list[str]) -> dict[str, Newest]:
        """What was published last of those jobs of which anything is known."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for job_id in job_ids:
                pipe.hmget(self.keys.job(job_id), "version", "final", "last")
            values: list[tuple[bytes | None, bytes | None, bytes | None]] = await pipe.execute()
        return {
            job_id: Newest(Position.parse(last.decode()), int(version), final == b"1")
            for job_id, (version, final, last) in zip(job_ids, values, strict=True)
            if version and last
        }

    async def forget(self, job_id: uuid.UUID) -> None:
        """Remove what is kept of a deleted job beside the streams. Its events leave them by age.

        What stays for a while says that nothing comes any more: an attempt that was thought dead may still publish.
        """
        key = self.keys.job(job_id)
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(key)
            pipe.hset(key, mapping={"version": VERSION_MAX, "final": "1"})
            pipe.pexpire(key, FORGOTTEN_TTL_MS)
            await pipe.execute()

    async def epoch(self) -> tuple[str, Position]:
        """Which life of Redis this is (it changes when events may be lost), and a position before all that is yet to come."""
        epoch, seconds, microseconds = await self._epoch(keys=[self.keys.life], args=[uuid.uuid4().hex])
        return epoch.decode(), Position(int(seconds) * 1000 + int(microseconds) // 1000 - 1, NUMBER_MAX)

    async def ends(self) -> dict[int, Position]:
        """The newest position of every shard."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for shard in range(SHARDS):
                pipe.xrevrange(self.keys.stream(shard), count=1)
            newest: list[Any] = await pipe.execute()
        return {shard: Position.parse(entries[0][0].decode()) if entries else START for shard, entries in enumerate(newest)}

    async def end(self, shard: int) -> Position:
        """The newest position of one shard."""
        newest: Any = await self._redis.xrevrange(self.keys.stream(shard), count=1)
        return Position.parse(newest[0][0].decode()) if newest else START

    async def read(self, after: dict[int, Position], *, count: int, block_ms: int) -> list[tuple[int, list[StoredEvent]]]:
        """Events after the given positions, by shard; waits up to `block_ms` for the first."""
        streams: dict[Any, Any] = {self.keys.stream(shard): str(position) for shard, position in after.items()}
        shards = {self.keys.stream(shard).encode(): shard for shard in after}
        reply: Any = await self._blocking.xread(streams, count=count, block=block_ms)
        return [(shards[stream], [_stored(entry) for entry in entries]) for stream, entries in reply or ()]

    async def range(self, shard: int, after: Position, until: Position, count: int) -> list[StoredEvent]:
        """Up to `count` events of a shard after one position and not beyond another."""
        entries: Any = await self._redis.xrange(self.keys.stream(shard), min=f"({after}", max=str(until), count=count)
        return [_stored(entry) for entry in entries]

    def honours(self, token: Token, epoch: str) -> bool:
        """Whether everything after the token is still there."""
        return token.epoch == epoch and token.position.milliseconds >= (time.time() - self._retention_s) * 1000

    async def ask_to_cancel(self, job_id: uuid.UUID) -> None:
        """Tell the worker that runs a job, wherever it is, to stop. Best effort: workers also look into PostgreSQL."""
        await self._redis.publish(self.keys.cancel, str(job_id))


def _stored(entry: Any) -> StoredEvent:
    entry_id, fields = entry
    return StoredEvent(
        position=Position.parse(entry_id.decode()),
        owner_id=fields[b"o"].decode(),
        job_id=fields[b"j"].decode(),
        event=fields[b"e"],
        sequence=int(fields[b"s"]),
        version=int(fields[b"v"]),
        is_state=fields[b"k"] == b"1",
        final=fields[b"f"] == b"1",
    )
