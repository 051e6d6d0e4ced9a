"""mTLS inside the mesh: which files prove a service, and the credentials made of them.

Every service has a certificate signed by the mesh CA with DNS SAN `<service-with-hyphens>.genmesh.internal` and URI SAN
`spiffe://genmesh/<service>`. Making certificates is the operator's business (`genmesh up` makes its own).
"""

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

DOMAIN = "genmesh.internal"


def server_name(service: str) -> str:
    """DNS name in the certificate of a service: `jobs_service` → `jobs-service.genmesh.internal`."""
    return f"{service.replace('_', '-')}.{DOMAIN}"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The three files that prove a service and tell it whom to trust."""

    ca: Path
    certificate: Path
    key: Path

    @classmethod
    def of(cls, directory: Path, service: str) -> "TlsFiles":
        """Files of `service` in a certificates directory."""
        return cls(ca=directory / "ca.crt", certificate=directory / f"{service}.crt", key=directory / f"{service}.key")


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials of a server that accepts only peers with a mesh certificate."""
    return grpc.ssl_server_credentials(
        [(files.key.read_bytes(), files.certificate.read_bytes())], root_certificates=files.ca.read_bytes(), require_client_auth=True
    )


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Credentials of a client inside the mesh."""
    return grpc.ssl_channel_credentials(files.ca.read_bytes(), files.key.read_bytes(), files.certificate.read_bytes())


def client_ssl_context(files: TlsFiles) -> ssl.SSLContext:
    """Context for HTTPS requests inside the mesh."""
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.certificate, files.key)
    # Addresses inside the mesh are often bare IPs; the mesh CA alone decides who is trusted.
    context.check_hostname = False
    return context


def server_ssl_context(files: TlsFiles) -> ssl.SSLContext:
    """Context of an HTTPS server that accepts only peers with a mesh certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(files.ca))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(files.certificate, files.key)
    return context
