"""Limits on rates over the real Redis: shared by replicas, and counted by each alone while Redis is away."""

import asyncio
import uuid
from collections.abc import AsyncGenerator

import grpc
import pytest
import pytest_asyncio

from servicekit.errors import MeshError, Reason, duration_in_words
from servicekit.limits import RateLimiter
from servicekit.settings import RedisSettings

LIMIT = "3/hour"


def settings(url: str, prefix: str | None = None) -> RedisSettings:
    return RedisSettings.model_validate({"redis_url": url, "redis_prefix": prefix or f"t{uuid.uuid4().hex}"})


@pytest_asyncio.fixture
async def limiters(redis_url: str) -> AsyncGenerator[tuple[RateLimiter, RateLimiter]]:
    """Two replicas."""
    shared = settings(redis_url)
    pair = RateLimiter(shared), RateLimiter(shared)
    yield pair
    for limiter in pair:
        await limiter.aclose()


async def test_replicas_count_together(limiters: tuple[RateLimiter, RateLimiter]) -> None:
    one, other = limiters
    await one.hit(LIMIT, "sign_in", "alice", what="sign-ins")
    await other.hit(LIMIT, "sign_in", "alice", what="sign-ins", cost=2)
    with pytest.raises(MeshError) as caught:
        await one.hit(LIMIT, "sign_in", "alice", what="sign-ins")
    refusal = caught.value
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED)
    assert [subject for subject, _ in refusal.quota] == ["sign_in"]
    assert refusal.retry_after_s is not None
    assert 0 < refusal.retry_after_s <= 3600
    assert refusal.message == f"too many sign-ins: at most 3 in 1 hour; try again in {duration_in_words(refusal.retry_after_s)}"
    await one.hit(LIMIT, "sign_in", "bob", what="sign-ins")
    await one.hit(LIMIT, "register", "alice", what="new accounts")


async def test_many_at_once_get_exactly_the_limit(limiters: tuple[RateLimiter, RateLimiter]) -> None:
    async def attempt(limiter: RateLimiter) -> bool:
        try:
            await limiter.hit("10/hour", "submit", "alice", what="new jobs")
        except MeshError:
            return False
        return True

    outcomes = await asyncio.gather(*(attempt(limiters[index % 2]) for index in range(40)))
    assert sum(outcomes) == 10


async def test_a_check_counts_nothing_and_a_count_refuses_nothing(limiters: tuple[RateLimiter, RateLimiter]) -> None:
    limiter, _ = limiters
    for _ in range(5):
        await limiter.check(LIMIT, "sign_in", "alice", what="sign-ins")
    for _ in range(5):
        await limiter.count(LIMIT, "sign_in", "alice")
    with pytest.raises(MeshError):
        await limiter.check(LIMIT, "sign_in", "alice", what="sign-ins")


async def test_without_redis_each_process_counts_by_itself() -> None:
    limiter = RateLimiter(settings("redis://127.0.0.1:1/0"))
    for _ in range(3):
        await limiter.hit(LIMIT, "sign_in", "alice", what="sign-ins")
    with pytest.raises(MeshError) as caught:
        await limiter.hit(LIMIT, "sign_in", "alice", what="sign-ins")
    assert caught.value.reason == Reason.ERROR_REASON_LIMIT_REACHED
    await limiter.hit(LIMIT, "sign_in", "bob", what="sign-ins")
    await limiter.aclose()
