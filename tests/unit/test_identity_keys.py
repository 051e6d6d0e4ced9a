"""Signing keys: made once, whole, for their owner only; several overlap; ids follow from the key."""

import base64
import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from gateway.tokens import FIRST_KEY, SigningKeys

PrivateKey = Ed25519PrivateKey | ec.EllipticCurvePrivateKey


def write_key(file: Path, *, modified_at_s: int = 0, key: PrivateKey | None = None) -> None:
    key = key or Ed25519PrivateKey.generate()
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    os.utime(file, (modified_at_s, modified_at_s))


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


def test_the_newest_key_signs_and_all_are_published(tmp_path: Path) -> None:
    write_key(tmp_path / "z.pem", modified_at_s=1_000)
    before = SigningKeys.open(tmp_path)
    write_key(tmp_path / "a.pem", modified_at_s=2_000)
    after = SigningKeys.open(tmp_path)
    assert after.key_id != before.key_id
    assert set(published(after)) == {before.key_id, after.key_id}
    assert jwt.get_unverified_header(after.sign({}))["kid"] == after.key_id


def test_files_of_one_age_go_by_name(tmp_path: Path) -> None:
    write_key(tmp_path / "2026-01.pem", modified_at_s=1_000)
    older = SigningKeys.open(tmp_path).key_id
    write_key(tmp_path / "2026-02.pem", modified_at_s=1_000)
    assert SigningKeys.open(tmp_path).key_id != older


async def test_a_token_of_the_older_key_still_verifies(tmp_path: Path) -> None:
    write_key(tmp_path / "old.pem", modified_at_s=1_000)
    token = SigningKeys.open(tmp_path).sign({"sub": "ann"})
    write_key(tmp_path / "new.pem", modified_at_s=2_000)
    key = await SigningKeys.open(tmp_path).get(jwt.get_unverified_header(token)["kid"])
    assert key is not None
    assert jwt.decode(token, key, algorithms=["EdDSA"]) == {"sub": "ann"}


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
