"""mTLS inside the mesh: which files prove a service, and the credentials made of them, which follow the files as they are replaced.

Every service has a certificate signed by the mesh CA with DNS SAN `<service-with-hyphens>.genmesh.internal` and URI SAN
`spiffe://genmesh/<service>`. Making certificates is the operator's business (`genmesh up` makes its own); see docs/mtls.md.
"""

import os
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import grpc
import prometheus_client
import structlog
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

DOMAIN = "genmesh.internal"
RELOAD_INTERVAL_S = 1.0
"""Files are looked at when a connection or a call asks for them, this often at most."""
READ_ATTEMPTS = 5
READ_PAUSE_S = 0.1

EXPIRE_TIME = prometheus_client.Gauge(
    "genmesh_certificate_expire_time_seconds", "When the mesh certificate in use ends, in Unix time", ["certificate"]
)

_log = structlog.get_logger(__name__)

T = TypeVar("T")


def server_name(service: str) -> str:
    """DNS name in the certificate of a service: `jobs_service` → `jobs-service.genmesh.internal`."""
    return f"{service.replace('_', '-')}.{DOMAIN}"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The three files that prove a service and tell it whom to trust."""

    ca: Path
    """One authority, or several while one replaces another."""
    certificate: Path
    key: Path

    @classmethod
    def of(cls, directory: Path, service: str) -> "TlsFiles":
        """Files of `service` in a certificates directory."""
        return cls(ca=directory / "ca.crt", certificate=directory / f"{service}.crt", key=directory / f"{service}.key")


class UnusableFilesError(Exception):
    """The files are missing, damaged, half-written, or key and certificate are no pair."""


@dataclass(frozen=True, slots=True)
class TlsMaterial:
    """What was in the files at one moment: a key, its certificate with intermediates, the authorities; all PEM."""

    ca: bytes
    certificate: bytes
    key: bytes
    serial_number: int
    start_time: datetime
    expire_time: datetime

    @property
    def problem(self) -> str:
        """Why peers would not accept the certificate now, or nothing."""
        now = datetime.now(UTC)
        if now < self.start_time:
            return f"the certificate is not valid before {self.start_time:%Y-%m-%dT%H:%M:%SZ}"
        return f"the certificate ended at {self.expire_time:%Y-%m-%dT%H:%M:%SZ}" if now >= self.expire_time else ""


def read_material(files: TlsFiles) -> TlsMaterial:
    """Read files that belong together; waits half a second for a replacement that is under way. Raises UnusableFilesError."""
    return _patiently(lambda: _read(files), UnusableFilesError)


class WatchedFiles:
    """The newest usable material of `files`: what is damaged, mixed or not valid now is logged and the old kept. Thread-safe."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises UnusableFilesError. A certificate that is not valid is taken here: the process heals once it is replaced."""
        self._files = files
        self._seen = _versions(files)
        self._material = read_material(files)
        self._refused = ""
        self._looking = threading.Lock()
        self._look_time_s = time.monotonic() + RELOAD_INTERVAL_S
        # Asked at every scrape, so that the files of a process that neither calls nor is called are looked at too.
        EXPIRE_TIME.labels(files.certificate.stem).set_function(lambda: self.current().expire_time.timestamp())
        if self._material.problem:
            _log.warning("tls.files_not_valid", certificate=str(files.certificate), problem=self._material.problem)

    def current(self) -> TlsMaterial:
        """The same object until there is something new."""
        # Who finds another thread looking goes on with what is known.
        if time.monotonic() >= self._look_time_s and self._looking.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._looking.release()
        return self._material

    def _look(self) -> None:
        self._look_time_s = time.monotonic() + RELOAD_INTERVAL_S
        try:
            # Before the content: a change in between is seen next time.
            versions = _versions(self._files)
            if versions == self._seen:
                return
            material = _read(self._files)
            if material.problem:
                raise UnusableFilesError(material.problem)
        except UnusableFilesError as error:
            # Asked again each time, for a certificate may become valid; told once.
            if str(error) != self._refused:
                self._refused = str(error)
                _log.warning("tls.files_refused", certificate=str(self._files.certificate), problem=self._refused)
            return
        self._seen = versions
        self._refused = ""
        if material != self._material:
            self._material = material
            _log.info(
                "tls.files_replaced",
                certificate=str(self._files.certificate),
                serial_number=f"{material.serial_number:x}",
                expire_time=material.expire_time.isoformat(),
            )


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Credentials of a server that accepts only peers with a mesh certificate; new connections get what is newest in the files."""
    watched = WatchedFiles(files)
    given = watched.current()

    def newest() -> grpc.ServerCertificateConfiguration | None:
        # gRPC asks at every new connection, in a thread of its own; None: go on with the last.
        nonlocal given
        material = watched.current()
        if material is given:
            return None
        given = material
        return _server_configuration(material)

    return grpc.dynamic_ssl_server_credentials(
        _server_configuration(given),
        newest,  # pyright: ignore[reportArgumentType]  # the stubs know no None
        require_client_authentication=True,
    )


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """Credentials of a client inside the mesh, of what the files hold now."""
    return material_credentials(read_material(files))


def material_credentials(material: TlsMaterial) -> grpc.ChannelCredentials:
    """Credentials of a client inside the mesh."""
    return grpc.ssl_channel_credentials(material.ca, material.key, material.certificate)


class WatchedContext:
    """The SSL context for the newest files; ask for it at every connection. Thread-safe."""

    def __init__(self, files: TlsFiles, make: Callable[[TlsFiles], ssl.SSLContext]) -> None:
        """`make` builds a context of the files. Raises UnusableFilesError."""
        self._files = files
        self._make = make
        self._watched = WatchedFiles(files)
        self._material = self._watched.current()
        self._context = _patiently(lambda: make(files), OSError)

    def current(self) -> ssl.SSLContext:
        """The same object until there is something new."""
        material = self._watched.current()
        if material is not self._material:
            try:
                # `ssl` reads files only. It refuses a mixed pair, and newer files than `material` are as good.
                self._context = self._make(self._files)
            except OSError as error:
                _log.warning("tls.files_refused", certificate=str(self._files.certificate), problem=str(error))
            else:
                self._material = material
        return self._context


class _PeerContext(ssl.SSLContext):
    """Checks the name of a mesh service in the server's certificate: addresses inside the mesh are often bare IPs."""

    peer_name: str

    def wrap_socket(self, *args: Any, server_hostname: str | bytes | None = None, **kwargs: Any) -> ssl.SSLSocket:
        """See SSLContext; the host name of the URL does not count."""
        return super().wrap_socket(*args, server_hostname=self.peer_name, **kwargs)


def client_ssl_context(files: TlsFiles, service: str | None = None) -> ssl.SSLContext:
    """Context for HTTPS requests to `service` inside the mesh, of what the files hold now; None: any peer that the mesh CA signed."""
    context = _PeerContext(ssl.PROTOCOL_TLS_CLIENT) if service else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if isinstance(context, _PeerContext):
        context.peer_name = server_name(service or "")
    else:
        context.check_hostname = False
    context.load_verify_locations(files.ca)
    context.load_cert_chain(files.certificate, files.key)
    return context


def server_ssl_context(files: TlsFiles) -> ssl.SSLContext:
    """Context of an HTTPS server that accepts only peers with a mesh certificate, of what the files hold now."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(files.ca))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(files.certificate, files.key)
    return context


def _server_configuration(material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key, material.certificate)], root_certificates=material.ca)


def _read(files: TlsFiles) -> TlsMaterial:
    try:
        ca, certificate, key = (path.read_bytes() for path in (files.ca, files.certificate, files.key))
        x509.load_pem_x509_certificates(ca)
        leaf = x509.load_pem_x509_certificates(certificate)[0]
        pair = serialization.load_pem_private_key(key, password=None).public_key() == leaf.public_key()
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        # The libraries' messages quote nothing of the key.
        raise UnusableFilesError(f"{files.certificate.name}, its key or {files.ca.name} cannot be read: {error}") from error
    if not pair:
        raise UnusableFilesError(f"{files.key.name} is not the key of {files.certificate.name}")
    return TlsMaterial(ca, certificate, key, leaf.serial_number, leaf.not_valid_before_utc, leaf.not_valid_after_utc)


def _versions(files: TlsFiles) -> list[tuple[int, ...]]:
    """What tells a replaced file from the old; links are followed, for Kubernetes swaps a linked directory."""
    try:
        found = [os.stat(path) for path in (files.ca, files.certificate, files.key)]
    except OSError as error:
        raise UnusableFilesError(str(error)) from error
    return [(one.st_dev, one.st_ino, one.st_mtime_ns, one.st_size) for one in found]


def _patiently(read: Callable[[], T], error: type[Exception]) -> T:
    for _ in range(READ_ATTEMPTS - 1):
        try:
            return read()
        except error:
            time.sleep(READ_PAUSE_S)
    return read()
