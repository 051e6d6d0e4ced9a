"""Limits on rates: how often somebody may do something in a sliding window, counted in Redis for all replicas together.

While Redis is away each process counts by itself, so that an outage neither opens the door nor shuts it.
"""

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog
from limits import RateLimitItem, parse
from limits.aio.storage import MemoryStorage, RedisClusterStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.exceptions import RedisError

from servicekit.errors import duration_in_words, limit_reached
from servicekit.settings import RedisSettings
from servicekit.streams import COMMAND_TIMEOUT_S, CONNECTIONS_MAX

REDIS_PAUSE_S = 2.0
"""After a failure Redis is left alone for so long: nobody should wait for a time-out a call."""

OWN_COUNTS_MAX = 100_000
"""Counts that a process keeps by itself."""

T = TypeVar("T")

_log = structlog.get_logger(__name__)


class RateLimiter:
    """Counts what somebody does and refuses what goes beyond a limit such as `5/15minutes` (`limits` has the notation).

    `name` is the limit's for programs (metadata, metrics, keys in Redis), `what` says what is counted to people: `new jobs`.
    """

    def __init__(self, settings: RedisSettings) -> None:
        self._storage = _storage(settings)
        self._shared = SlidingWindowCounterRateLimiter(self._storage)
        self._own_storage = MemoryStorage()
        self._own = SlidingWindowCounterRateLimiter(self._own_storage)
        self._away_until = 0.0
        self._items: dict[str, RateLimitItem] = {}

    async def aclose(self) -> None:
        """Close the connections to Redis."""
        await self._storage.bridge.storage.aclose()  # pyright: ignore[reportAttributeAccessIssue]  # known only to the bridge in use

    async def hit(self, limit: str, name: str, *who: str, what: str, cost: int = 1) -> None:
        """Count `cost` for `who` under the limit called `name`. Raises RESOURCE_EXHAUSTED (LIMIT_REACHED); then nothing is counted."""
        item = self._item(limit)
        if not await self._ask(lambda strategy: strategy.hit(item, name, *who, cost=cost)):
            await self._refuse(item, name, *who, what=what)

    async def check(self, limit: str, name: str, *who: str, what: str, cost: int = 1) -> None:
        """As `hit`, but counts nothing: for what counts only once it has failed."""
        item = self._item(limit)
        if not await self._ask(lambda strategy: strategy.test(item, name, *who, cost=cost)):
            await self._refuse(item, name, *who, what=what)

    async def count(self, limit: str, name: str, *who: str, cost: int = 1) -> None:
        """Count without refusing."""
        item = self._item(limit)
        await self._ask(lambda strategy: strategy.hit(item, name, *who, cost=cost))

    async def _refuse(self, item: RateLimitItem, name: str, *who: str, what: str) -> None:
        window = await self._ask(lambda strategy: strategy.get_window_stats(item, name, *who))
        retry_after_s = min(window.reset_time - time.time(), float(item.get_expiry()))
        bound = f"too many {what}: at most {item.amount} in {duration_in_words(item.get_expiry())}"
        raise limit_reached(name, bound, retry_after_s=retry_after_s)

    async def _ask(self, ask: Callable[[SlidingWindowCounterRateLimiter], Awaitable[T]]) -> T:
        if time.monotonic() >= self._away_until:
            try:
                return await ask(self._shared)
            except (RedisError, OSError) as error:
                self._away_until = time.monotonic() + REDIS_PAUSE_S
                _log.warning("limits.redis_away", error=repr(error))
        if len(self._own_storage.storage) > OWN_COUNTS_MAX:
            # Whoever floods us while Redis is away starts everybody's counts anew; the edge's limits on rates go on.
            await self._own_storage.reset()
        return await ask(self._own)

    def _item(self, limit: str) -> RateLimitItem:
        item = self._items.get(limit)
        if item is None:
            item = self._items[limit] = parse(limit)
        return item


def _storage(settings: RedisSettings) -> RedisStorage:
    url = settings.redis_url.get_secret_value()
    kind, scheme = (RedisClusterStorage, "redis+cluster") if settings.redis_cluster else (RedisStorage, "redis")
    return kind(
        f"async+{scheme}{url.removeprefix('redis')}",
        implementation="redispy",
        key_prefix=f"{settings.redis_prefix}:limits",
        socket_timeout=COMMAND_TIMEOUT_S,
        socket_connect_timeout=COMMAND_TIMEOUT_S,
        max_connections=CONNECTIONS_MAX,
    )
