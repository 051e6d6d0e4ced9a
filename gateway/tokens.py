"""Signing keys of access tokens: Ed25519 private keys in a directory, their public halves as a JWK set.

Keys are replaced with overlap: a new one is published at once, signs when everybody has had time to fetch it, and is removed when no
token that it signed can be alive any more. All of that follows from the files and their modification times, so that replicas that
share a directory agree without talking. What a token says is `identity`'s business.
"""

import asyncio
import base64
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key

from servicekit.identity import ALGORITHM
from servicekit.revocations import TOKEN_LIFE_MAX_S

JWKS_PATH = "/.well-known/jwks.json"
FIRST_KEY = "first.pem"
"""Every replica that finds the directory empty makes this same name, so that only one of them succeeds."""
ACTIVATION_S = 120.0
"""A key signs so long after it appeared: twice as long as Envoy keeps the key set."""
RETIREMENT_S = TOKEN_LIFE_MAX_S + 600.0
"""A key is removed so long after its successor began to sign."""
RELOAD_INTERVAL_S = 5.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Key:
    file: Path
    modified_ns: int
    key_id: str
    private: Ed25519PrivateKey
    jwk: dict[str, str]
    public: jwt.PyJWK

    @property
    def active_from_s(self) -> float:
        return self.modified_ns / 1e9 + ACTIVATION_S


class SigningKeys:
    """The keys of a directory: signs access tokens, and knows all public keys (a `servicekit.identity.KeySource`)."""

    def __init__(self, directory: Path, *, rotation_s: float = 0, clock: Callable[[], float] = time.time) -> None:
        """`rotation_s`: a key older than that gets a successor; 0: only `rotate` makes one. `clock`: Unix time. Call `reload` first."""
        self._directory = directory
        self._rotation_s = rotation_s
        self._clock = clock
        self._keys: Sequence[_Key] = ()
        self._warned: set[tuple[str, str]] = set()

    @classmethod
    def open(cls, directory: Path, *, rotation_s: float = 0, clock: Callable[[], float] = time.time) -> "SigningKeys":
        """The keys of `directory`, by modification time and then by name; makes the first where there is none.

        Raises ValueError for a file that is not an Ed25519 private key.
        """
        keys = cls(directory, rotation_s=rotation_s, clock=clock)
        keys.reload()
        return keys

    @property
    def key_id(self) -> str:
        """Id of the key that signs."""
        return self._signing().key_id

    def sign(self, claims: Mapping[str, Any]) -> str:
        """A compact JWT with these claims."""
        key = self._signing()
        return jwt.encode(dict(claims), key.private, algorithm=ALGORITHM, headers={"kid": key.key_id})

    async def get(self, key_id: str) -> jwt.PyJWK | None:
        """See `servicekit.identity.KeySource`."""
        return next((key.public for key in self._published() if key.key_id == key_id), None)

    def jwks_page(self) -> tuple[str, bytes]:
        """Content type and body of the JWK set (RFC 7517), as a page of `servicekit.telemetry.HttpServer`."""
        return "application/json", json.dumps({"keys": [key.jwk for key in self._published()]}).encode()

    def reload(self) -> None:
        """Read the directory again: take new keys in, remove retired ones, make a successor where the newest key is too old.

        Raises ValueError for a file that is not an Ed25519 private key, OSError; then everything stays as it was.
        """
        self._read_directory()
        newest = self._keys[-1]
        if self._rotation_s and self._clock() - newest.modified_ns / 1e9 > self._rotation_s:
            try:
                self._succeed(newest)
            except OSError as error:
                self._warn_once("keys.not_rotated", newest, error)
        for key in self._keys[: len(self._keys) - len(self._published())]:
            try:
                key.file.unlink(missing_ok=True)
            except OSError as error:  # not published all the same
                self._warn_once("keys.retired_key_stays", key, error)
            else:
                _log.info("keys.retired", key_id=key.key_id)

    def rotate(self) -> str:
        """Make a successor of the newest key and answer with the newest's id."""
        self._read_directory()
        self._succeed(self._keys[-1])
        return self._keys[-1].key_id

    def _succeed(self, predecessor: _Key) -> None:
        """Make a successor of this very key. Of several that do this at once, one succeeds for all."""
        # The name follows from the predecessor: no other replica makes a second successor of it.
        name = f"after-{predecessor.key_id}.pem"
        _make_key(self._directory, name, modified_ns=max(self._now_ns(), predecessor.modified_ns + 1_000_000))
        self._read_directory()
        _log.info("keys.rotated", key_id=self._keys[-1].key_id, predecessor=predecessor.key_id)

    async def keep_current(self) -> None:
        """Reload every few seconds, for ever. Where that fails, the keys that are known go on."""
        failure = ""
        while True:
            await asyncio.sleep(RELOAD_INTERVAL_S)
            try:
                await asyncio.to_thread(self.reload)
            except (OSError, ValueError) as error:
                if str(error) != failure:
                    _log.error("keys.reload_failed", error=repr(error))
                failure = str(error)
            else:
                failure = ""

    def _warn_once(self, event: str, key: _Key, error: OSError) -> None:
        """Of a directory that cannot be written, which is not worth a line every few seconds."""
        if (event, key.key_id) not in self._warned:
            self._warned.add((event, key.key_id))
            _log.warning(event, key_id=key.key_id, file=key.file.name, error=repr(error))

    def _read_directory(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(self._directory.glob("*.pem")):
            _make_key(self._directory, FIRST_KEY, modified_ns=self._now_ns())
        known = {(key.file.name, key.modified_ns): key for key in self._keys}
        keys: list[_Key] = []
        for file in self._directory.glob("*.pem"):
            try:
                modified_ns = file.stat().st_mtime_ns
                keys.append(known.get((file.name, modified_ns)) or _describe(file, modified_ns, _read(file)))
            except FileNotFoundError:  # another replica retired it just now
                continue
        if keys:
            # One assignment, as other threads read: the server of the key set is one.
            self._keys = sorted(keys, key=lambda key: (key.modified_ns, key.file.name))

    def _signing(self) -> _Key:
        """The newest key that everybody has had time to fetch; the oldest while there is none."""
        keys, now = self._keys, self._clock()
        return next((key for key in reversed(keys) if key.active_from_s <= now), keys[0])

    def _published(self) -> Sequence[_Key]:
        """All keys but those whose successor has signed for longer than a token lives."""
        keys, now = self._keys, self._clock()
        retired = sum(1 for successor in keys[1:] if successor.active_from_s + RETIREMENT_S <= now)
        return keys[retired:]

    def _now_ns(self) -> int:
        return int(self._clock() * 1e9)


def _read(file: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.name} in the signing keys directory is not a private key in PEM form without a password") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{file.name} in the signing keys directory is not an Ed25519 key")
    return key


def _make_key(directory: Path, name: str, *, modified_ns: int) -> None:
    """Write a key whole or not at all, readable by its owner only; keep the other's if a replica was faster."""
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    descriptor, draft_name = tempfile.mkstemp(dir=directory, prefix=".", suffix=".new")  # made with mode 0600
    draft = Path(draft_name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        os.utime(draft, ns=(modified_ns, modified_ns))
        # link, unlike rename, never replaces a file that is there.
        (directory / name).hardlink_to(draft)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _describe(file: Path, modified_ns: int, key: Ed25519PrivateKey) -> _Key:
    raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    required = {"crv": "Ed25519", "kty": "OKP", "x": _base64url(raw)}
    # RFC 7638 (and 8037): the id follows from the key, so replicas and restarts agree on it.
    thumbprint = hashlib.sha256(json.dumps(required, sort_keys=True, separators=(",", ":")).encode()).digest()
    jwk = {**required, "alg": ALGORITHM, "use": "sig", "kid": _base64url(thumbprint)}
    return _Key(file, modified_ns, jwk["kid"], key, jwk, jwt.PyJWK.from_dict(jwk))


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
