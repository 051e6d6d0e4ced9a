"""Signing keys: made once, whole, for their owner only; replaced with overlap by replicas together; ids follow from the key."""

import asyncio
import base64
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import jwt
import pytest
import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gateway import tokens
from gateway.tokens import ACTIVATION_S, FIRST_KEY, RETIREMENT_S, SigningKeys
from servicekit.revocations import TOKEN_LIFE_MAX_S

ROTATION_S = 30 * 24 * 3600.0
DEADLINE_S = 30

PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey


def write_key(file: Path, *, modified_at_s: float = 0, key: PrivateKey | None = None) -> None:
    key = key or Ed25519PrivateKey.generate()
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    os.utime(file, (modified_at_s, modified_at_s))


class Clock:
    """Unix time as a test sets it."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - it comes about in a thread
            await asyncio.sleep(0.01)


def published(keys: SigningKeys) -> dict[str, dict[str, str]]:
    content_type, body = keys.jwks_page()
    assert content_type == "application/json"
    return {key["kid"]: key for key in json.loads(body)["keys"]}


def test_the_first_key_is_made_for_its_owner_only_and_stays(tmp_path: Path) -> None:
    directory = tmp_path / "state" / "keys"
    first = SigningKeys.open(directory)
    assert os.listdir(directory) == [FIRST_KEY]  # no draft is left
    assert stat.S_IMODE((directory / FIRST_KEY).stat().st_mode) == 0o600
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert SigningKeys.open(directory).key_id == first.key_id


def test_replicas_that_start_together_agree_on_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = {keys.key_id for keys in pool.map(SigningKeys.open, [tmp_path] * 32)}
    assert len(ids) == 1
    assert os.listdir(tmp_path) == [FIRST_KEY]


def test_files_of_one_age_go_by_name(tmp_path: Path) -> None:
    write_key(tmp_path / "2026-01.pem", modified_at_s=1_000)
    older = SigningKeys.open(tmp_path).key_id
    write_key(tmp_path / "2026-02.pem", modified_at_s=1_000)
    assert SigningKeys.open(tmp_path).key_id != older


# --- rotation


def test_a_new_key_is_published_at_once_signs_later_and_outlives_no_token_it_signed(tmp_path: Path) -> None:
    clock = Clock()
    keys = SigningKeys.open(tmp_path, clock=clock)
    old = keys.key_id
    clock.pass_s(1)
    new = keys.rotate()
    assert set(published(keys)) == {old, new}
    clock.pass_s(ACTIVATION_S - 0.001)
    assert keys.key_id == jwt.get_unverified_header(keys.sign({}))["kid"] == old
    clock.pass_s(0.001)  # nothing is read again: replicas change over together
    assert keys.key_id == jwt.get_unverified_header(keys.sign({}))["kid"] == new
    clock.pass_s(RETIREMENT_S - 0.001)
    keys.reload()
    assert set(published(keys)) == {old, new}
    clock.pass_s(0.001)
    assert set(published(keys)) == {new}
    assert len(os.listdir(tmp_path)) == 2
    keys.reload()
    assert len(os.listdir(tmp_path)) == 1
    assert SigningKeys.open(tmp_path, clock=clock).key_id == new


async def test_a_token_of_the_older_key_verifies_until_the_key_is_retired(tmp_path: Path) -> None:
    clock = Clock()
    keys = SigningKeys.open(tmp_path, clock=clock)
    clock.pass_s(1)
    keys.rotate()
    clock.pass_s(ACTIVATION_S - 1)
    token = keys.sign({"sub": "ann"})
    key_id = jwt.get_unverified_header(token)["kid"]
    clock.pass_s(TOKEN_LIFE_MAX_S)
    key = await keys.get(key_id)
    assert key is not None
    assert jwt.decode(token, key, algorithms=["EdDSA"]) == {"sub": "ann"}
    clock.pass_s(RETIREMENT_S)
    assert await keys.get(key_id) is None


def test_a_replica_takes_over_what_another_one_rotated(tmp_path: Path) -> None:
    clock = Clock()
    first, second = (SigningKeys.open(tmp_path, clock=clock) for _ in range(2))
    clock.pass_s(1)
    new = first.rotate()
    assert new not in published(second)
    second.reload()
    assert published(second) == published(first)
    clock.pass_s(ACTIVATION_S)
    assert second.key_id == first.key_id == new


def test_age_makes_one_successor_however_many_replicas_look(tmp_path: Path) -> None:
    clock = Clock()
    replicas = [SigningKeys.open(tmp_path, rotation_s=ROTATION_S, clock=clock) for _ in range(8)]
    clock.pass_s(ROTATION_S)
    for replica in replicas:
        replica.reload()
    assert os.listdir(tmp_path) == [FIRST_KEY]
    clock.pass_s(1)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(SigningKeys.reload, replicas))
    assert len(os.listdir(tmp_path)) == 2
    clock.pass_s(ACTIVATION_S)
    for replica in replicas:
        replica.reload()
    assert len({replica.key_id for replica in replicas}) == 1
    assert len(os.listdir(tmp_path)) == 2


def test_without_an_age_nothing_rotates_by_itself(tmp_path: Path) -> None:
    clock = Clock()
    keys = SigningKeys.open(tmp_path, clock=clock)
    clock.pass_s(100 * ROTATION_S)
    keys.reload()
    assert os.listdir(tmp_path) == [FIRST_KEY]


def test_rotating_again_makes_a_successor_of_the_successor(tmp_path: Path) -> None:
    clock = Clock()
    keys = SigningKeys.open(tmp_path, clock=clock)
    made = [keys.key_id, keys.rotate(), keys.rotate()]  # in one moment: the order of the files is that of the keys all the same
    assert list(published(keys)) == made
    clock.pass_s(ACTIVATION_S + 1)
    assert keys.key_id == made[-1]


def test_of_two_young_keys_the_older_signs(tmp_path: Path) -> None:
    clock = Clock()
    write_key(tmp_path / "b.pem", modified_at_s=clock.now)
    old = SigningKeys.open(tmp_path, clock=clock).key_id
    write_key(tmp_path / "a.pem", modified_at_s=clock.now + 1)
    assert SigningKeys.open(tmp_path, clock=clock).key_id == old


def test_a_key_that_was_taken_away_is_gone_at_once(tmp_path: Path) -> None:
    clock = Clock()
    keys = SigningKeys.open(tmp_path, clock=clock)
    leaked = keys.key_id
    new = keys.rotate()
    (tmp_path / FIRST_KEY).unlink()
    keys.reload()
    assert keys.key_id == new
    assert leaked not in published(keys)


def test_a_file_that_is_no_key_changes_nothing_for_those_who_run(tmp_path: Path) -> None:
    keys = SigningKeys.open(tmp_path)
    before = published(keys)
    (tmp_path / "half.pem").write_bytes(b"-----BEGIN PRIV")
    with pytest.raises(ValueError, match=r"half\.pem"):
        keys.reload()
    assert published(keys) == before
    assert keys.sign({})


def test_a_directory_that_cannot_be_written_is_enough_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    write_key(tmp_path / "old.pem", modified_at_s=clock.now - 10 * RETIREMENT_S)
    write_key(tmp_path / "new.pem", modified_at_s=clock.now - 9 * RETIREMENT_S)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with structlog.testing.capture_logs() as logs:
        keys = SigningKeys.open(tmp_path, rotation_s=60, clock=clock)
        keys.reload()
    assert len(published(keys)) == 1
    assert [log["event"] for log in logs] == ["keys.not_rotated", "keys.retired_key_stays"]  # said once


async def test_a_running_gateway_reads_the_directory_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "RELOAD_INTERVAL_S", 0.01)
    keys = SigningKeys.open(tmp_path)
    running = asyncio.create_task(keys.keep_current())
    try:
        other = SigningKeys.open(tmp_path)
        (tmp_path / "half.pem").write_bytes(b"")
        with structlog.testing.capture_logs() as logs:
            # Others may log, too: servers of other tests run on this loop.
            await until(lambda: any(log["event"].startswith("keys.") for log in logs))
        assert {log["event"] for log in logs if log["event"].startswith("keys.")} == {"keys.reload_failed"}
        (tmp_path / "half.pem").unlink()
        new = other.rotate()
        await until(lambda: new in published(keys))
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


# --- the key set


async def test_an_unknown_id_has_no_key(tmp_path: Path) -> None:
    assert await SigningKeys.open(tmp_path).get("other") is None


def test_the_key_set_has_public_halves_with_rfc_7638_ids(tmp_path: Path) -> None:
    (jwk,) = published(SigningKeys.open(tmp_path)).values()
    assert set(jwk) == {"kty", "crv", "x", "alg", "use", "kid"}  # no "d"
    assert (jwk["kty"], jwk["crv"], jwk["alg"], jwk["use"]) == ("OKP", "Ed25519", "EdDSA", "sig")
    thumbprint = hashlib.sha256(f'{{"crv":"Ed25519","kty":"OKP","x":"{jwk["x"]}"}}'.encode()).digest()
    assert jwk["kid"] == base64.urlsafe_b64encode(thumbprint).decode().rstrip("=")


def test_the_id_is_that_of_rfc_8037(tmp_path: Path) -> None:
    """Key of RFC 8037 appendix A.1, thumbprint of A.3."""
    private = base64.urlsafe_b64decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A=")
    write_key(tmp_path / "rfc.pem", key=Ed25519PrivateKey.from_private_bytes(private))
    assert SigningKeys.open(tmp_path).key_id == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


@pytest.mark.parametrize("content", [b"", b"not a key", None], ids=["empty", "text", "other algorithm"])
def test_a_file_that_is_no_signing_key_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "broken.pem"
    if content is None:
        write_key(file, key=ec.generate_private_key(ec.SECP256R1()))
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.pem"):
        SigningKeys.open(tmp_path)
