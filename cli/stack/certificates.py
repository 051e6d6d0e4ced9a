"""The mesh's own certificate authority and the certificates it signs: made on first start, renewed before they expire, rotated at will.

File names and subject alternative names are what `servicekit.tls` and Envoy's configuration expect. Files are only ever replaced by
renaming, which both of them see: nothing has to be restarted. A new authority comes in three stages, so that no two members of a
running mesh ever distrust each other: trust it beside the earlier one, sign everything by it, trust it alone.
"""

import asyncio
import fcntl
import ipaddress
import logging
import os
import time
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from servicekit.identity import SPIFFE_PREFIX
from servicekit.tls import RELOAD_INTERVAL_S, server_name

MEMBERS = ("gateway", "jobs_service", "credit_service", "inference_service", "envoy", "cli")
EDGE = "edge"
AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 365
RENEW_BEFORE = timedelta(days=30)
RENEW_INTERVAL_S = 3600.0
CLOCK_SKEW = timedelta(minutes=5)
SETTLE_S = 3 * RELOAD_INTERVAL_S
"""Between the stages of a rotation: whoever makes a connection has seen the last one by then."""
EARLIER_MAX = 2
"""Authorities that are trusted beside a new one."""
LOCK_TIMEOUT_S = 30.0
LOCK_POLL_S = 0.1

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    earlier: tuple[x509.Certificate, ...] = ()
    """Still trusted beside it."""


def ensure_certificates(directory: Path, authority_dir: Path) -> list[str]:
    """For a mesh that does not run yet: make what is missing, about to end, or signed by an earlier authority; names of what was made."""
    with _locked(authority_dir):
        authority = _load_authority(directory, authority_dir)
        made = [] if authority else ["ca"]
        authority = authority or _make_authority(directory, authority_dir)
        made += _make_certificates(directory, authority)
        _drop_earlier(directory, authority)
    return made


def renew(directory: Path, authority_dir: Path) -> list[str]:
    """For a mesh that runs: make what is about to end, one stage a call; names of what was made.

    The next stage is for the next call, `SETTLE_S` later at least.
    """
    with _locked(authority_dir):
        authority = _load_authority(directory, authority_dir)
        if authority is None:
            _make_authority(directory, authority_dir)
            return ["ca"]
        made = _make_certificates(directory, authority)
        if not made:
            _drop_earlier(directory, authority)
        return made


def rotate(directory: Path, authority_dir: Path, new_authority: bool = False, *, settle_s: float = SETTLE_S) -> list[str]:
    """Replace every certificate and key now, on request the authority too, whether the mesh runs or not; names of what was made.

    With a new authority it waits `settle_s` twice, and the earlier one is trusted no longer when it returns. Renewal waits meanwhile;
    TimeoutError when another rotation takes too long.
    """
    with _locked(authority_dir):
        authority = None if new_authority else _load_authority(directory, authority_dir)
        made = [] if authority else ["ca"]
        if authority is None:
            authority = _make_authority(directory, authority_dir)
        if authority.earlier:
            time.sleep(settle_s)
        made += _make_certificates(directory, authority, even_valid=True)
        if authority.earlier:
            time.sleep(settle_s)
            _drop_earlier(directory, authority)
    return made


async def keep_renewed(directory: Path, authority_dir: Path, *, interval_s: float = RENEW_INTERVAL_S) -> None:
    """`renew` every hour until cancelled. What fails is logged and tried again: there is a month of such hours before the end."""
    while True:
        await asyncio.sleep(interval_s)
        try:
            made = await asyncio.to_thread(renew, directory, authority_dir)
        except (OSError, ValueError) as error:
            _log.warning("the certificates of the mesh cannot be renewed: %s", error)
        else:
            if made:
                _log.info("renewed certificates: %s", ", ".join(made))


@contextmanager
def _locked(authority_dir: Path) -> Generator[None]:
    """One writer at a time, also among processes."""
    with open(os.open(authority_dir / ".lock", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process writes certificates of {authority_dir} and does not end") from None
                time.sleep(LOCK_POLL_S)
        yield


def _load_trusted(directory: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates((directory / "ca.crt").read_bytes())
    except (FileNotFoundError, ValueError):
        return []


def _load_authority(directory: Path, authority_dir: Path) -> _Authority | None:
    try:
        key = serialization.load_pem_private_key((authority_dir / "ca.key").read_bytes(), password=None)
    except (FileNotFoundError, ValueError):
        return None
    trusted = _load_trusted(directory)
    own = [certificate for certificate in trusted if certificate.public_key() == key.public_key()]
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not own:
        return None
    # Certificates must not outlive their authority.
    if own[0].not_valid_after_utc - datetime.now(UTC) < timedelta(days=CERTIFICATE_DAYS):
        return None
    return _Authority(own[0], key, tuple(certificate for certificate in trusted if certificate != own[0]))


def _make_certificates(directory: Path, authority: _Authority, *, even_valid: bool = False) -> list[str]:
    made: list[str] = []
    for name in (*MEMBERS, EDGE):
        if even_valid or not _is_valid(directory / f"{name}.crt", directory / f"{name}.key", authority):
            _make_certificate(directory, name, authority)
            made.append(name)
    return made


def _drop_earlier(directory: Path, authority: _Authority) -> None:
    if authority.earlier:
        _replace({directory / "ca.crt": authority.certificate.public_bytes(serialization.Encoding.PEM)})


def _is_valid(certificate_file: Path, key_file: Path, authority: _Authority) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
        certificate.verify_directly_issued_by(authority.certificate)
    except Exception:  # missing, damaged, signed by another: the answer is a new one
        return False
    return key.public_key() == certificate.public_key() and certificate.not_valid_after_utc - datetime.now(UTC) > RENEW_BEFORE


def _make_authority(directory: Path, authority_dir: Path) -> _Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Genmesh embedded stack CA")])
    certificate = (
        _builder(name, name, key, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    earlier = tuple(_load_trusted(directory)[:EARLIER_MAX])
    bundle = b"".join(one.public_bytes(serialization.Encoding.PEM) for one in (certificate, *earlier))
    # In this order: a key whose certificate is lost would be lost itself, a certificate too many goes at the next stage.
    _replace({directory / "ca.crt": bundle})
    _replace({authority_dir / "ca.key": _pem(key)})
    return _Authority(certificate, key, earlier)


def _make_certificate(directory: Path, name: str, authority: _Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _builder(subject, authority.certificate.subject, key, CERTIFICATE_DAYS)
        .add_extension(x509.SubjectAlternativeName(_names(name)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    _replace({directory / f"{name}.key": _pem(key), directory / f"{name}.crt": certificate.public_bytes(serialization.Encoding.PEM)})


def _names(name: str) -> Iterable[x509.GeneralName]:
    yield x509.DNSName("localhost")
    yield x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    if name != EDGE:  # the public certificate proves nobody inside the mesh
        yield x509.DNSName(server_name(name))
        yield x509.UniformResourceIdentifier(SPIFFE_PREFIX + name)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _replace(contents: Mapping[Path, bytes]) -> None:
    """Files that belong together are renamed one right after the other; readers that see them mixed look again."""
    written = [(path.with_name(f".{path.name}.new"), path) for path in contents]
    for temporary, path in written:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(contents[path])
            file.flush()
            os.fsync(file.fileno())
    for temporary, path in written:
        temporary.replace(path)
