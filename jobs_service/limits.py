"""What one user may ask for, by plan: submits a minute, open jobs and their cost, watches. docs/limits.md has the table.

Rates and watches are counted in Redis for all replicas together; open jobs and their cost in PostgreSQL, in the statement that notes a
submit (`store.note_requests`), so that no number of parallel submits gets past them.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

import structlog
from redis import asyncio as redis
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError

from jobs_service.lifecycle import Priority
from jobs_service.settings import PlanLimits
from jobs_service.store import OpenWork
from servicekit.errors import limit_reached
from servicekit.limits import REDIS_PAUSE_S, RateLimiter

ESTIMATES_PER_SUBMIT = 10
"""Estimates a minute for each submit a minute: prices change while somebody chooses settings."""
OPEN_RETRY_S = 5.0
"""Nobody knows when a job ends; a client that asks so often finds its place soon and costs little."""
WATCH_RETRY_S = 5.0
LEASE_S = 30.0
"""The watches of a replica that died are forgotten after this."""
RENEW_INTERVAL_S = LEASE_S / 3
RENEWALS_AT_ONCE = 16

_NOW = """
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
"""
# KEYS: the leases of an owner, by the moment when they end. ARGV: life in ms, most leases, the lease.
_TAKE = (
    _NOW
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now_ms)
if not redis.call('ZSCORE', KEYS[1], ARGV[3]) and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[2]) then
    return 0
end
redis.call('ZADD', KEYS[1], now_ms + ARGV[1], ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
"""
)
# ARGV: life in ms, the leases.
_RENEW = (
    _NOW
    + """
for i = 2, #ARGV do
    redis.call('ZADD', KEYS[1], now_ms + ARGV[1], ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
"""
)

_log = structlog.get_logger(__name__)


class WatchLeases:
    """The open watches of each user, over all replicas: a lease for each, renewed while it is open.

    While Redis is away this process counts its own watches only; what is open then is told to Redis once it is back.
    """

    def __init__(self, client: "redis.Redis", prefix: str, *, lease_s: float = LEASE_S, renew_interval_s: float = RENEW_INTERVAL_S) -> None:
        self._redis: Any = client
        self._prefix = prefix
        self._lease_ms = int(lease_s * 1000)
        self._renew_interval_s = renew_interval_s
        self._take, self._renew = AsyncScript(client, _TAKE), AsyncScript(client, _RENEW)
        self._open: dict[uuid.UUID, set[str]] = {}
        self._away_until = 0.0

    @asynccontextmanager
    async def held(self, owner_id: uuid.UUID, most: int) -> AsyncGenerator[None]:
        """One watch of the owner, open while the block runs. Raises RESOURCE_EXHAUSTED (LIMIT_REACHED) when `most` are open."""
        mine = self._open.setdefault(owner_id, set())
        if len(mine) >= most:
            raise _too_many_watches(most)
        lease = uuid.uuid4().hex
        mine.add(lease)
        try:
            if not await self._taken(owner_id, lease, most):
                raise _too_many_watches(most)
            yield
        finally:
            mine.discard(lease)
            if not mine:
                del self._open[owner_id]
            await self._drop(owner_id, [lease])

    async def run(self) -> None:
        """Renew the leases, round after round."""
        while True:
            await asyncio.sleep(self._renew_interval_s)
            await self.renew()

    async def renew(self) -> None:
        """Renew the leases of all open watches, and tell a Redis that was emptied of them."""
        owners = list(self._open)
        try:
            for first in range(0, len(owners), RENEWALS_AT_ONCE):
                await asyncio.gather(*map(self._renew_of, owners[first : first + RENEWALS_AT_ONCE]))
        except (RedisError, OSError) as error:  # the next round comes before a lease ends
            _log.warning("limits.watches_not_renewed", error=repr(error))

    async def _renew_of(self, owner_id: uuid.UUID) -> None:
        leases = list(self._open.get(owner_id, ()))
        if leases:
            await self._renew([self._key(owner_id)], [self._lease_ms, *leases])
        # What ended meanwhile was taken out before it was renewed.
        if ended := set(leases) - self._open.get(owner_id, set()):
            await self._drop(owner_id, ended)

    async def _taken(self, owner_id: uuid.UUID, lease: str, most: int) -> bool:
        if time.monotonic() >= self._away_until:
            try:
                return bool(await self._take([self._key(owner_id)], [self._lease_ms, most, lease]))
            except (RedisError, OSError) as error:
                self._away_until = time.monotonic() + REDIS_PAUSE_S
                _log.warning("limits.redis_away", error=repr(error))
        return True

    async def _drop(self, owner_id: uuid.UUID, leases: Collection[str]) -> None:
        if time.monotonic() < self._away_until:
            return  # they end by themselves
        try:
            await self._redis.zrem(self._key(owner_id), *leases)
        except (RedisError, OSError) as error:
            self._away_until = time.monotonic() + REDIS_PAUSE_S
            _log.warning("limits.redis_away", error=repr(error))

    def _key(self, owner_id: uuid.UUID) -> str:
        return f"{self._prefix}:watches:{owner_id}"


class Limits:
    """The limits of every plan, and what has been used of them."""

    def __init__(self, plans: Mapping[Priority, PlanLimits], rates: RateLimiter, leases: WatchLeases) -> None:
        self._plans = plans
        self._rates = rates
        self._leases = leases

    def of(self, plan: str) -> PlanLimits:
        """What a user of the plan may ask for."""
        return self._plans[Priority.of_plan(plan)]

    async def count_submits(self, owner_id: uuid.UUID, plan: str, count: int = 1) -> None:
        """Count new jobs, all or none. Raises RESOURCE_EXHAUSTED (LIMIT_REACHED)."""
        await self._count("submits_per_minute", "new jobs", owner_id, self.of(plan).submits_per_minute, count)

    async def count_estimate(self, owner_id: uuid.UUID, plan: str) -> None:
        """Count an estimate. Raises RESOURCE_EXHAUSTED (LIMIT_REACHED)."""
        await self._count("estimates_per_minute", "estimates", owner_id, self.of(plan).submits_per_minute * ESTIMATES_PER_SUBMIT, 1)

    async def _count(self, name: str, what: str, owner_id: uuid.UUID, most: int, count: int) -> None:
        if most:
            await self._rates.hit(f"{most}/minute", name, str(owner_id), what=what, cost=count)

    def check_open(self, plan: str, work: OpenWork) -> None:
        """Raises RESOURCE_EXHAUSTED (LIMIT_REACHED) when this is more than a user of the plan may have open."""
        limits = self.of(plan)
        if 0 < limits.open_jobs < work.jobs:
            count = f"too many open jobs: at most {limits.open_jobs} may wait or run at once"
            raise limit_reached("open_jobs", count, retry_after_s=OPEN_RETRY_S)
        if 0 < limits.queued_millicredits < work.cost_millicredits:
            cost = f"open jobs cost too much: those that wait or run may cost at most {limits.queued_millicredits} millicredits together"
            raise limit_reached("queued_millicredits", cost, retry_after_s=OPEN_RETRY_S)

    def watching(self, owner_id: uuid.UUID, plan: str) -> AbstractAsyncContextManager[None]:
        """One open watch of a user, counted while the block runs. Raises RESOURCE_EXHAUSTED (LIMIT_REACHED)."""
        most = self.of(plan).watches
        return self._leases.held(owner_id, most) if most else nullcontext()


def _too_many_watches(most: int) -> Exception:
    return limit_reached("watches", f"too many watches: at most {most} may be open at once", retry_after_s=WATCH_RETRY_S)
