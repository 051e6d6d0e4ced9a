"""Redis connections. What is stored in Redis, and every command on it, lives in the service that owns it."""

from typing import Any, cast

from redis import asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from servicekit.errors import MeshError, unavailable
from servicekit.settings import RedisSettings

BLOCK_MS = 2_000
"""Longest wait of a blocking read: below its time-out, so that silence is not taken for a lost server."""
BLOCKING_TIMEOUT_S = 5.0
COMMAND_TIMEOUT_S = 1.5
"""Callers wait for this one: a Redis that hangs costs them no more than their patience. What it should have known it is told later."""

CONNECTIONS_MAX = 512
"""Commands of a client under way at once; one more is refused as if Redis were away."""


def connect(settings: RedisSettings, *, blocking: bool = False) -> "redis.Redis":
    """A client with its own pool; a cancelled command drops its connection rather than leaving a reply for the next.

    `blocking`: for reads that wait up to `BLOCK_MS`. A command that timed out is not tried again: it may have been done.
    Of a cluster, a client that finds the node of a key. It has the same commands; keys of one command have to share a hash tag.
    """
    options: dict[str, Any] = {
        "socket_timeout": BLOCKING_TIMEOUT_S if blocking else COMMAND_TIMEOUT_S,
        "socket_connect_timeout": COMMAND_TIMEOUT_S,
        "health_check_interval": 0,
        "max_connections": CONNECTIONS_MAX,
        "retry": Retry(ExponentialBackoff(cap=0.5, base=0.02), 2, supported_errors=(RedisConnectionError,)),
        "decode_responses": False,
    }
    url = settings.redis_url.get_secret_value()
    if settings.redis_cluster:
        return cast("redis.Redis", redis.RedisCluster.from_url(url, **options))
    return redis.Redis.from_url(url, **options)


def translate(error: Exception) -> MeshError | None:
    """Redis errors as typed errors; None for what is not one of them."""
    if isinstance(error, RedisError):
        return unavailable("Redis is out of reach right now", 0.5)
    return None
