"""What servicekit remembers: verified tokens until they expire, the gateway's keys while it is away."""

import asyncio
import base64
import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from servicekit import identity
from servicekit.errors import MeshError, Reason
from servicekit.identity import RemoteKeys, TokenVerifier
from servicekit.revocations import TOKEN_LIFE_MAX_S
from servicekit.tls import TlsFiles

KEY = Ed25519PrivateKey.generate()
JWK = {
    "kty": "OKP",
    "crv": "Ed25519",
    "alg": "EdDSA",
    "kid": "known",
    "x": base64.urlsafe_b64encode(KEY.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).decode().rstrip("="),
}


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(identity.time, "time", made)
    monkeypatch.setattr(identity.time, "monotonic", made)
    return made


class OneKey:
    """One key, until it is taken away."""

    def __init__(self) -> None:
        self.key: jwt.PyJWK | None = jwt.PyJWK.from_dict(JWK | {"kid": "known"})

    async def get(self, key_id: str) -> jwt.PyJWK | None:
        return self.key if key_id == "known" else None


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tokens whose signature was checked."""
    checked: list[str] = []
    decode = jwt.decode

    def count(token: str, *args: Any, **kwargs: Any) -> Any:
        checked.append(token)
        return decode(token, *args, **kwargs)

    monkeypatch.setattr(identity.jwt, "decode", count)
    return checked


def token(subject: str, expire_time: float, **more: Any) -> str:
    claims = {"iss": "i", "aud": "a", "sub": subject, "iat": int(expire_time) - 900, "exp": int(expire_time), **more}
    return jwt.encode(claims, KEY, algorithm="EdDSA", headers={"kid": "known"})


async def test_a_token_is_checked_once_until_it_expires(clock: Clock, checks: list[str]) -> None:
    verifier = TokenVerifier(OneKey(), issuer="i", audience="a")
    ann, ben = token("ann", clock.now + 60), token("ben", clock.now + 60)
    assert [(await verifier.verify(ann)).user_id for _ in range(3)] == ["ann"] * 3
    assert checks == [ann]
    assert (await verifier.verify(ben)).user_id == "ben"
    assert checks == [ann, ben]
    clock.now += 60 + identity.CLOCK_SKEW_S
    await verifier.verify(ann)
    assert checks == [ann, ben, ann]  # what is remembered does not outlive the token: the signature check decides again


async def test_a_token_does_not_outlive_its_key(clock: Clock) -> None:
    keys = OneKey()
    verifier = TokenVerifier(keys, issuer="i", audience="a")
    ann = token("ann", clock.now + 60)
    await verifier.verify(ann)
    keys.key = None
    with pytest.raises(MeshError) as raised:
        await verifier.verify(ann)
    assert raised.value.reason == Reason.ERROR_REASON_TOKEN_INVALID


async def test_no_token_lives_for_ever(clock: Clock) -> None:
    """Whoever had the key for a moment could make one that outlives every list of revocations."""
    verifier = TokenVerifier(OneKey(), issuer="i", audience="a")
    now = int(clock.now)
    await verifier.verify(token("ann", now + 60, iat=now + 60 - TOKEN_LIFE_MAX_S))
    with pytest.raises(MeshError) as raised:
        await verifier.verify(token("ann", now + 60, iat=now + 59 - TOKEN_LIFE_MAX_S))
    assert raised.value.reason == Reason.ERROR_REASON_TOKEN_INVALID


async def test_what_is_remembered_is_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch, checks: list[str]) -> None:
    monkeypatch.setattr(identity, "VERIFIED_TOKENS_MAX", 2)
    verifier = TokenVerifier(OneKey(), issuer="i", audience="a")
    ann, ben, eve = (token(name, clock.now + 60) for name in ("ann", "ben", "eve"))
    for each in (ann, ben, ann, eve, ann):
        await verifier.verify(each)
    assert checks == [ann, ben, eve]
    await verifier.verify(ben)  # the one not used for longest was dropped
    assert checks == [ann, ben, eve, ben]


@pytest.mark.parametrize(
    ("claims", "api_key_id"),
    [
        ({}, None),
        ({"api_key_id": None}, None),
        ({"api_key_id": "0a6b2f0e-6f5e-4d8a-9b1c-3f2e1d0c9b8a"}, "0a6b2f0e-6f5e-4d8a-9b1c-3f2e1d0c9b8a"),
        ({"api_key_id": "0A6B2F0E6F5E4D8A9B1C3F2E1D0C9B8A"}, "0a6b2f0e-6f5e-4d8a-9b1c-3f2e1d0c9b8a"),
    ],
    ids=["signed in", "null", "a key", "the same key in other letters"],
)
async def test_a_token_says_which_api_key_it_was_made_for(clock: Clock, claims: dict[str, Any], api_key_id: str | None) -> None:
    verifier = TokenVerifier(OneKey(), issuer="i", audience="a")
    assert (await verifier.verify(token("ann", clock.now + 60, **claims))).api_key_id == api_key_id


@pytest.mark.parametrize("claim", ["", "mine", 5, 0, False, ["0a6b2f0e-6f5e-4d8a-9b1c-3f2e1d0c9b8a"], {}])
async def test_a_token_whose_key_is_no_key_is_refused_each_time(clock: Clock, claim: Any) -> None:
    verifier = TokenVerifier(OneKey(), issuer="i", audience="a")
    for _ in range(2):
        with pytest.raises(MeshError) as raised:
            await verifier.verify(token("ann", clock.now + 60, api_key_id=claim))
        assert raised.value.reason == Reason.ERROR_REASON_TOKEN_INVALID


class Gateway:
    """What the gateway would answer; `get_jwk_set` of PyJWT's client."""

    def __init__(self) -> None:
        self.fetches = 0
        self.error: Exception | None = None

    def __call__(self, _refresh: bool) -> jwt.PyJWKSet:
        self.fetches += 1
        if self.error is not None:
            raise self.error
        return jwt.PyJWKSet.from_dict({"keys": [JWK]})


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    made = Gateway()
    monkeypatch.setattr(jwt.PyJWKClient, "get_jwk_set", lambda _client, refresh: made(refresh))  # pyright: ignore[reportUnknownLambdaType]
    return made


@pytest.fixture
def remote_keys(certificates: Path, clock: Clock) -> RemoteKeys:
    return RemoteKeys("https://127.0.0.1:1/jwks", TlsFiles.of(certificates, "jobs_service"))


async def test_keys_are_fetched_once_for_all_who_wait(gateway: Gateway, remote_keys: RemoteKeys) -> None:
    found = await asyncio.gather(*(remote_keys.get("known") for _ in range(20)))
    assert all(found)
    assert gateway.fetches == 1


async def test_unknown_ids_do_not_flood_the_gateway(gateway: Gateway, remote_keys: RemoteKeys, clock: Clock) -> None:
    await remote_keys.get("known")
    for _ in range(50):
        assert await remote_keys.get("unknown") is None
    assert gateway.fetches == 1
    clock.now += identity.JWKS_REFETCH_INTERVAL_S + 0.1
    for _ in range(50):
        assert await remote_keys.get("unknown") is None
    assert gateway.fetches == 2


@pytest.mark.parametrize(
    "error", [jwt.PyJWKClientError("refused"), ConnectionResetError(), ValueError("not JSON")], ids=["refused", "reset", "nonsense"]
)
async def test_known_keys_go_on_while_the_gateway_is_away(
    gateway: Gateway, remote_keys: RemoteKeys, clock: Clock, error: Exception
) -> None:
    await remote_keys.get("known")
    gateway.error = error
    clock.now += identity.JWKS_MAX_AGE_S + 1
    for _ in range(50):
        assert await remote_keys.get("known") is not None
    assert gateway.fetches == 2  # one try an interval, not one a call


async def test_without_any_keys_calls_are_refused_until_the_gateway_is_there(gateway: Gateway, remote_keys: RemoteKeys) -> None:
    gateway.error = jwt.PyJWKClientError("refused")
    answers: list[Any] = await asyncio.gather(*(remote_keys.get("known") for _ in range(20)), return_exceptions=True)
    assert {answer.reason for answer in answers if isinstance(answer, MeshError)} == {Reason.ERROR_REASON_UNAVAILABLE}
    assert len([answer for answer in answers if isinstance(answer, MeshError)]) == 20
    assert gateway.fetches == 1  # those who waited share the outcome


async def test_the_first_keys_are_taken_as_soon_as_they_can_be_had(gateway: Gateway, remote_keys: RemoteKeys, clock: Clock) -> None:
    gateway.error = jwt.PyJWKClientError("refused")
    with pytest.raises(MeshError):
        await remote_keys.get("known")
    gateway.error = None
    clock.now += 0.001
    assert await remote_keys.get("known") is not None
