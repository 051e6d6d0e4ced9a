"""A watcher's slot: the newest balance wins and versions never go back; a notice is short enough for PostgreSQL."""

import asyncio
import uuid
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from credit_service.balances import NOTICE_USERS_MAX, Watcher, notices
from credit_service.ledger import Balance

PAYLOAD_MAX_BYTES = 8_000
"""PostgreSQL refuses a payload as long as this."""


def balance(version: int, available: int = 0, *, next_expire_time: datetime | None = None) -> Balance:
    return Balance(
        available_millicredits=available,
        reserved_millicredits=0,
        promotional_millicredits=0,
        next_expire_time=next_expire_time,
        version=version,
    )


def test_the_newest_balance_replaces_one_that_was_not_taken():
    watcher = Watcher()
    for version in range(1_000):
        watcher.offer(balance(version))
    assert watcher.waiting
    assert watcher.take() == balance(999)
    assert not watcher.waiting


def test_the_same_balance_is_not_sent_again():
    watcher = Watcher()
    watcher.offer(balance(1))
    watcher.take()
    watcher.offer(balance(1))
    assert not watcher.waiting


def test_what_was_asked_to_be_repeated_is_sent_again_once():
    watcher = Watcher()
    watcher.offer(balance(1))
    watcher.take()
    watcher.repeat()
    watcher.offer(balance(1))
    assert watcher.take() == balance(1)
    watcher.offer(balance(1))
    assert not watcher.waiting


def test_after_a_silence_an_older_balance_is_believed():
    # Of a database that failed over, and lost what it had.
    watcher = Watcher()
    watcher.offer(balance(7, 100))
    watcher.take()
    watcher.offer(balance(5, 40))
    assert not watcher.waiting
    watcher.repeat()
    watcher.offer(balance(5, 40))
    assert watcher.take() == balance(5, 40)


def test_credits_that_lapse_are_told_though_the_version_is_the_same():
    watcher = Watcher()
    watcher.offer(balance(1, 100, next_expire_time=datetime(2026, 1, 1, tzinfo=UTC)))
    watcher.take()
    watcher.offer(balance(1, 60))
    assert watcher.take() == balance(1, 60)


def test_nothing_can_be_taken_before_something_was_offered():
    with pytest.raises(RuntimeError, match="no balance"):
        Watcher().take()


@given(versions=st.lists(st.integers(0, 20)), takes=st.sets(st.integers(0, 20)))
def test_versions_never_go_back_and_the_newest_always_arrives(versions: list[int], takes: set[int]):
    watcher = Watcher()
    told: list[int] = []
    for step, version in enumerate(versions):
        watcher.offer(balance(version))
        if step in takes and watcher.waiting:
            told.append(watcher.take().version)
    if watcher.waiting:
        told.append(watcher.take().version)
    assert told == sorted(set(told))
    assert told[-1:] == ([max(versions)] if versions else [])


async def test_a_wake_before_the_wait_is_not_lost():
    watcher = Watcher()
    watcher.wake()
    async with asyncio.timeout(10):
        await watcher.wait(3_600)


async def test_a_wait_ends_after_its_time():
    async with asyncio.timeout(10):
        await Watcher().wait(0.001)


@pytest.mark.parametrize("count", [0, 1, NOTICE_USERS_MAX, NOTICE_USERS_MAX + 1, 3 * NOTICE_USERS_MAX + 7])
def test_notices_name_every_user_once_and_are_short_enough(count: int):
    users = [uuid.uuid4() for _ in range(count)]
    payloads = notices(users)
    assert [uuid.UUID(name) for payload in payloads for name in payload.split(",")] == users
    assert all(0 < len(payload.encode()) < PAYLOAD_MAX_BYTES for payload in payloads)
