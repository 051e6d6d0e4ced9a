"""The mesh's own certificate authority and the certificates it signs: made on first start, renewed before they expire.

File names and subject alternative names are what `servicekit.tls` and Envoy's configuration expect.
"""

import ipaddress
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from servicekit.identity import SPIFFE_PREFIX
from servicekit.tls import server_name

MEMBERS = ("gateway", "jobs_service", "credit_service", "inference_service", "envoy", "cli")
EDGE = "edge"
AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 365
RENEW_BEFORE = timedelta(days=30)
CLOCK_SKEW = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class _Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def ensure_certificates(directory: Path, authority_dir: Path) -> list[str]:
    """Make what is missing, no longer valid in 30 days, or signed by an older authority; names of what was made."""
    authority = _load_authority(directory, authority_dir)
    made: list[str] = []
    if authority is None:
        authority = _make_authority(directory, authority_dir)
        made.append("ca")
    for name in (*MEMBERS, EDGE):
        if not _is_valid(directory / f"{name}.crt", directory / f"{name}.key", authority):
            _make_certificate(directory, name, authority)
            made.append(name)
    return made


def _load_authority(directory: Path, authority_dir: Path) -> _Authority | None:
    try:
        certificate = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())
        key = serialization.load_pem_private_key((authority_dir / "ca.key").read_bytes(), password=None)
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        return None
    # Certificates must not outlive their authority.
    if certificate.not_valid_after_utc - datetime.now(UTC) < timedelta(days=CERTIFICATE_DAYS):
        return None
    return _Authority(certificate, key)


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
    _write(authority_dir / "ca.key", _pem(key))
    _write(directory / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))
    return _Authority(certificate, key)


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
    _write(directory / f"{name}.key", _pem(key))
    _write(directory / f"{name}.crt", certificate.public_bytes(serialization.Encoding.PEM))


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


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
    temporary.replace(path)
