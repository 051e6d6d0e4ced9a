"""Passwords: argon2id, decoy for unknown accounts, renewed parameters, a bounded pool."""

import asyncio
import threading
from collections.abc import Generator

import argon2
import grpc
import pytest

from gateway.passwords import Passwords
from servicekit.errors import MeshError, Reason

PASSWORD = "correct horse battery"


@pytest.fixture
def passwords() -> Generator[Passwords]:
    made = Passwords(memory_kib=1024, iterations=1, threads=2, waiting_max=1, client_max=2)
    yield made
    made.close()


async def test_hashes_are_argon2id_and_salted(passwords: Passwords) -> None:
    first, second = await passwords.hash(PASSWORD), await passwords.hash(PASSWORD)
    assert first.startswith("$argon2id$v=19$m=1024,t=1,p=1$")
    assert first != second


async def test_right_and_wrong_passwords(passwords: Passwords) -> None:
    stored = await passwords.hash(PASSWORD)
    assert (await passwords.verify(stored, PASSWORD)).correct
    assert not (await passwords.verify(stored, PASSWORD + "!")).correct


async def test_the_same_characters_in_another_form_are_the_same_password(passwords: Passwords) -> None:
    stored = await passwords.hash("zw\u00f6lf Boxk\u00e4mpfer")
    assert (await passwords.verify(stored, "zwo\u0308lf Boxka\u0308mpfer")).correct


async def test_no_account_does_the_work_of_one_and_no_password_is_right(passwords: Passwords, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    verify = argon2.PasswordHasher.verify

    def record(self: argon2.PasswordHasher, stored: str | bytes, password: str | bytes) -> bool:
        compared.append(argon2.extract_parameters(str(stored)).__repr__())
        return verify(self, stored, password)

    monkeypatch.setattr(argon2.PasswordHasher, "verify", record)
    stored = await passwords.hash(PASSWORD)
    assert not (await passwords.verify(stored, "wrong password")).correct
    assert not (await passwords.verify(None, "wrong password")).correct
    assert not (await passwords.verify(None, "no account has this password")).correct
    assert len(compared) == 3
    assert len(set(compared)) == 1  # same memory, passes and lanes: same time


async def test_a_hash_of_other_parameters_is_outdated(passwords: Passwords) -> None:
    stronger = Passwords(memory_kib=2048, iterations=2, threads=1, waiting_max=0, client_max=1)
    try:
        stored = await passwords.hash(PASSWORD)
        assert not (await passwords.verify(stored, PASSWORD)).outdated
        verdict = await stronger.verify(stored, PASSWORD)
        assert (verdict.correct, verdict.outdated) == (True, True)
        assert not (await stronger.verify(stored, "wrong password")).outdated
    finally:
        stronger.close()


async def test_more_than_the_pool_holds_is_refused_at_once_and_the_loop_goes_on(
    passwords: Passwords, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    running = threading.Semaphore(0)

    def block(_self: argon2.PasswordHasher, _password: str | bytes) -> str:
        running.release()
        release.wait()
        return "hashed"

    monkeypatch.setattr(argon2.PasswordHasher, "hash", block)
    accepted = [asyncio.create_task(passwords.hash(PASSWORD)) for _ in range(3)]  # two threads and one waiting
    for _ in range(2):
        await asyncio.to_thread(running.acquire)
    try:
        with pytest.raises(MeshError) as caught:
            await passwords.hash(PASSWORD)
        assert (caught.value.code, caught.value.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            Reason.ERROR_REASON_LIMIT_REACHED,
        )
        assert caught.value.retry_after_s is not None
        assert not any(task.done() for task in accepted)
    finally:
        release.set()
    assert await asyncio.gather(*accepted) == ["hashed"] * 3
    assert await passwords.hash(PASSWORD) == "hashed"  # the places are free again


async def test_one_client_takes_a_few_of_the_places_only(passwords: Passwords, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(argon2.PasswordHasher, "hash", lambda *_: release.wait(30) and "hashed")
    accepted = [asyncio.create_task(passwords.hash(PASSWORD, client="192.0.2.1")) for _ in range(2)]
    await asyncio.sleep(0)
    try:
        for call in (passwords.hash(PASSWORD, client="192.0.2.1"), passwords.verify(None, PASSWORD, client="192.0.2.1")):
            with pytest.raises(MeshError) as caught:
                await call
            assert caught.value.reason == Reason.ERROR_REASON_LIMIT_REACHED
        accepted.append(asyncio.create_task(passwords.hash(PASSWORD, client="192.0.2.2")))
        await asyncio.sleep(0)
        assert not any(task.done() for task in accepted)
    finally:
        release.set()
    assert await asyncio.gather(*accepted) == ["hashed"] * 3
    assert await passwords.hash(PASSWORD, client="192.0.2.1") == "hashed"
