"""A certificate authority for tests that need what the stack's own never makes: foreign names, several names, certificates that ended."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from servicekit.tls import server_name

HOUR = timedelta(hours=1)


def replace(path: Path, content: bytes) -> None:
    """As every writer of certificates has to: by renaming."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(content)
    temporary.replace(path)


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key, unencrypted."""
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


@dataclass(frozen=True)
class Issued:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        """The certificate as in a file."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def write(self, directory: Path, name: str) -> int:
        """Put the pair where service `name` looks for it; the serial number."""
        replace(directory / f"{name}.key", pem(self.key))
        replace(directory / f"{name}.crt", self.certificate_pem)
        return self.certificate.serial_number


@dataclass
class Authority:
    """Signs anything."""

    name: str = "test CA"
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))
    certificate: x509.Certificate = field(init=False)

    def __post_init__(self) -> None:
        self.certificate = self._sign(
            self.name, self.key, -HOUR, 1000 * HOUR, x509.BasicConstraints(ca=True, path_length=None), critical=True
        )

    @property
    def pem(self) -> bytes:
        """Its certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, service: str, *, uris: Sequence[str] | None = None, start: timedelta = -HOUR, end: timedelta = 1000 * HOUR) -> Issued:
        """A certificate with the names of `service`, or with other URIs; `start` and `end` are counted from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.DNSName(server_name(service)), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        names += [x509.UniformResourceIdentifier(uri) for uri in ([f"spiffe://genmesh/{service}"] if uris is None else uris)]
        return Issued(self._sign(service, key, start, end, x509.SubjectAlternativeName(names)), key)

    def _sign(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        start: timedelta,
        end: timedelta,
        extension: x509.ExtensionType,
        critical: bool = False,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + start)
            .not_valid_after(now + end)
            .add_extension(extension, critical=critical)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
        )
