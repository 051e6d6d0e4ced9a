"""Signing keys of access tokens: Ed25519 private keys in a directory, their public halves as a JWK set.

What a token says is `identity`'s business.
"""

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key

from servicekit.identity import ALGORITHM

JWKS_PATH = "/.well-known/jwks.json"
FIRST_KEY = "first.pem"
"""Every replica that finds the directory empty makes this same name, so that only one of them succeeds."""


@dataclass(frozen=True, slots=True)
class _Key:
    key_id: str
    private: Ed25519PrivateKey
    jwk: dict[str, str]


class SigningKeys:
    """Signs access tokens with the newest key; knows all public keys (a `servicekit.identity.KeySource`)."""

    def __init__(self, keys: list[Ed25519PrivateKey]) -> None:
        """`keys` from oldest to newest, at least one."""
        described = [_describe(key) for key in keys]
        self._newest = described[-1]
        self._public = {key.key_id: jwt.PyJWK.from_dict(key.jwk) for key in described}
        self._jwks = json.dumps({"keys": [key.jwk for key in described]}).encode()

    @classmethod
    def open(cls, directory: Path) -> "SigningKeys":
        """Read all keys of `directory`, by modification time and then by name; make the first where there is none.

        Raises ValueError for a file that is not an Ed25519 private key.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(directory.glob("*.pem")):
            _make_first_key(directory)
        files = sorted(directory.glob("*.pem"), key=lambda file: (file.stat().st_mtime_ns, file.name))
        return cls([_read(file) for file in files])

    @property
    def key_id(self) -> str:
        """Id of the key that signs."""
        return self._newest.key_id

    def sign(self, claims: Mapping[str, Any]) -> str:
        """A compact JWT with these claims."""
        return jwt.encode(dict(claims), self._newest.private, algorithm=ALGORITHM, headers={"kid": self._newest.key_id})

    async def get(self, key_id: str) -> jwt.PyJWK | None:
        """See `servicekit.identity.KeySource`."""
        return self._public.get(key_id)

    def jwks_page(self) -> tuple[str, bytes]:
        """Content type and body of the JWK set (RFC 7517), as a page of `servicekit.telemetry.HttpServer`."""
        return "application/json", self._jwks


def _read(file: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(file.read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.name} in the signing keys directory is not a private key in PEM form without a password") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{file.name} in the signing keys directory is not an Ed25519 key")
    return key


def _make_first_key(directory: Path) -> None:
    """Write a key whole or not at all, readable by its owner only; keep the other's if a replica was faster."""
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    descriptor, name = tempfile.mkstemp(dir=directory, prefix=".", suffix=".new")  # made with mode 0600
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        # link, unlike rename, never replaces a file that is there.
        (directory / FIRST_KEY).hardlink_to(draft)
    except FileExistsError:
        pass
    finally:
        draft.unlink()


def _describe(key: Ed25519PrivateKey) -> _Key:
    raw = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    required = {"crv": "Ed25519", "kty": "OKP", "x": _base64url(raw)}
    # RFC 7638 (and 8037): the id follows from the key, so replicas and restarts agree on it.
    thumbprint = hashlib.sha256(json.dumps(required, sort_keys=True, separators=(",", ":")).encode()).digest()
    key_id = _base64url(thumbprint)
    return _Key(key_id, key, {**required, "alg": ALGORITHM, "use": "sig", "kid": key_id})


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
