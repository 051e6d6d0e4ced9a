"""What a service knows of revoked tokens: how it learns, how long it remembers, what it does when it cannot ask."""

import time
import uuid
from collections.abc import Iterable
from typing import Any

import grpc
import pytest

from servicekit import revocations
from servicekit.errors import MeshError, Reason
from servicekit.identity import Principal
from servicekit.revocations import STALE_AFTER_S, Revocations, Revoked

USER_ID = str(uuid.uuid4())


class Gateway:
    """Answers in pages of two."""

    def __init__(self) -> None:
        self.revoked: list[Revoked] = []
        self.asked: list[str] = []
        self.away = False

    async def fetch(self, cursor: str) -> tuple[Iterable[Revoked], str, bool]:
        self.asked.append(cursor)
        if self.away:
            raise ConnectionError("the gateway is away")
        start = int(cursor or 0)
        page = self.revoked[start : start + 2]
        return page, str(start + len(page)), start + len(page) < len(self.revoked)


def check(known: Revocations, *, issue_time: float = 0.0, user_id: str = USER_ID) -> None:
    known.check(issue_time=issue_time, session_id=None, api_key_id=None, user_id=user_id)


def reason(caught: pytest.ExceptionInfo[MeshError]) -> Any:
    return caught.value.reason


async def test_nothing_is_let_in_before_the_first_answer() -> None:
    gateway = Gateway()
    known = Revocations(gateway.fetch)
    with pytest.raises(MeshError) as caught:
        check(known)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(MeshError):
        await known.ready()
    await known.poll()
    check(known)
    await known.ready()


async def test_pages_are_read_to_the_end_and_then_only_news() -> None:
    gateway = Gateway()
    now = time.time()
    gateway.revoked = [Revoked("user", str(uuid.uuid4()), now) for _ in range(5)]
    known = Revocations(gateway.fetch)
    await known.poll()
    assert gateway.asked == ["", "2", "4"]
    for one in gateway.revoked:
        with pytest.raises(MeshError) as caught:
            check(known, issue_time=now, user_id=one.subject_id)
        assert reason(caught) == Reason.ERROR_REASON_TOKEN_REVOKED
    gateway.asked.clear()
    gateway.revoked.append(Revoked("user", USER_ID, now))
    await known.poll()
    assert gateway.asked == ["5"]
    with pytest.raises(MeshError):
        check(known, issue_time=now)


async def test_an_older_revocation_takes_nothing_back() -> None:
    known = Revocations()
    known.add(Revoked("user", USER_ID, 200.0))
    known.add(Revoked("user", USER_ID, 100.0))
    with pytest.raises(MeshError):
        check(known, issue_time=150.0)
    check(known, issue_time=201.0)


async def test_a_list_that_is_too_old_lets_nobody_in(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = Gateway()
    known = Revocations(gateway.fetch)
    await known.poll()
    clock = time.monotonic()
    gateway.away = True
    with pytest.raises(ConnectionError):
        await known.poll()
    monkeypatch.setattr(revocations.time, "monotonic", lambda: clock + STALE_AFTER_S - 1)
    check(known)
    monkeypatch.setattr(revocations.time, "monotonic", lambda: clock + STALE_AFTER_S + 1)
    with pytest.raises(MeshError) as caught:
        check(known)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    gateway.away = False
    await known.poll()
    check(known)


async def test_what_can_stop_nothing_any_more_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Revocations(Gateway().fetch)
    known.add(Revoked("user", USER_ID, time.time()))
    await known.poll()
    with pytest.raises(MeshError):
        check(known)
    later = time.time() + revocations.FORGET_AFTER_S + 1
    monkeypatch.setattr(revocations.time, "time", lambda: later)
    await known.poll()
    check(known)


def test_a_program_is_told_whether_its_key_or_its_owner_changed() -> None:
    known = Revocations()
    caller = Principal(user_id=USER_ID, api_key_id="key", issue_time=10.0, expire_time=time.time() + 100, revocations=known)
    known.add(Revoked("user", USER_ID, 10.0))
    with pytest.raises(MeshError) as caught:
        caller.check_alive()
    assert reason(caught) == Reason.ERROR_REASON_TOKEN_REVOKED
    assert "call again" in caught.value.message
    known.add(Revoked("api_key", "key", 10.0))
    with pytest.raises(MeshError) as caught:
        caller.check_alive()
    assert reason(caught) == Reason.ERROR_REASON_API_KEY_INVALID


def test_a_stream_asks_for_its_caller() -> None:
    known = Revocations()
    caller = Principal(user_id=USER_ID, issue_time=10.0, expire_time=time.time() + 100, revocations=known)
    caller.check_alive()
    known.add(Revoked("user", USER_ID, 10.0))
    with pytest.raises(MeshError) as caught:
        caller.check_alive()
    assert reason(caught) == Reason.ERROR_REASON_TOKEN_REVOKED
    with pytest.raises(MeshError) as caught:
        Principal(user_id=USER_ID, expire_time=time.time() - 1, revocations=known).check_alive()
    assert reason(caught) == Reason.ERROR_REASON_TOKEN_EXPIRED
    Principal(service="jobs_service").check_alive()
