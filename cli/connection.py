"""The way to an edge: its address, the connection, and how long to wait before another try."""

import random
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import grpc

from cli.failures import usage

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 3.0
PROBE_TIMEOUT_S = 2.0
CONNECT_TIMEOUT_MS = 5_000


@dataclass(frozen=True, slots=True)
class EdgeAddress:
    """Where an edge listens."""

    host: str
    port: int
    tls: bool

    @classmethod
    def parse(cls, url: str) -> Self:
        """`http://HOST[:PORT]` or `https://HOST[:PORT]`; raises CommandError (usage)."""
        parts = urlsplit(url.strip())
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path not in {"", "/"} or port == 0:
            raise usage(f"not the address of an edge: {url!r}", "give it as http://HOST:PORT or https://HOST:PORT")
        return cls(parts.hostname, port or (443 if parts.scheme == "https" else 80), parts.scheme == "https")

    @property
    def target(self) -> str:
        """HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The address in one normal form."""
        return f"{'https' if self.tls else 'http'}://{self.target}"

    @property
    def loopback(self) -> bool:
        """Whether it is this machine: then no proxy stands between."""
        return self.host in {"localhost", "::1"} or self.host.startswith("127.")

    def listening(self) -> bool:
        """Whether anything accepts connections there."""
        try:
            with closing(socket.create_connection((self.host, self.port), PROBE_TIMEOUT_S)):
                return True
        except OSError:
            return False

    def check_certificate(self, ca_file: Path | None) -> None:
        """Raise CommandError when what listens there has no certificate that can be trusted: waiting does not mend that."""
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
        context.set_alpn_protocols(["h2"])
        try:
            with socket.create_connection((self.host, self.port), PROBE_TIMEOUT_S) as connection:
                context.wrap_socket(connection, server_hostname=self.host).close()
        except ssl.SSLCertVerificationError as error:
            advice = "name the certificate of its authority with GENMESH_EDGE_CA_FILE"
            raise usage(f"the certificate at {self.url} is not trusted: {error.verify_message}", advice) from error
        except OSError:
            pass  # gone, or no TLS at all: the call says so


class Backoff:
    """Growing, jittered waits inside a window of time that starts with the first failure."""

    def __init__(self, window_s: float, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self._window_s = window_s
        self._sleep = sleep
        self.reset()

    def reset(self) -> None:
        """Something worked: the next failure is a first one."""
        self._delay_s = BACKOFF_FIRST_S
        self._since: float | None = None

    def wait(self, at_least_s: float | None = None) -> bool:
        """Wait before the next try; False at once when the window is over."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        delay_s = max(at_least_s or 0.0, self._delay_s * random.uniform(0.5, 1.0))  # noqa: S311  # jitter, not a secret
        if now + delay_s - self._since > self._window_s:
            return False
        self._delay_s = min(self._delay_s * 2, BACKOFF_MAX_S)
        self._sleep(delay_s)
        return True


def open_channel(address: EdgeAddress, ca_file: Path | None) -> grpc.Channel:
    """A channel to an edge; `ca_file` None: the system's authorities. Raises CommandError (usage) where a CA cannot be read."""
    options: list[tuple[str, str | int]] = [
        ("grpc.max_receive_message_length", 16 * 1024 * 1024),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # What its name hides: how long an attempt to connect may take. A busy machine is no lost connection.
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", 3_000),
    ]
    if address.loopback:
        options.append(("grpc.enable_http_proxy", 0))
    if not address.tls:
        return grpc.insecure_channel(address.target, options=options)
    try:
        roots = ca_file.read_bytes() if ca_file else _system_roots()
    except OSError as error:
        raise usage(f"the CA certificate cannot be read: {error.strerror}: {ca_file}", "set GENMESH_EDGE_CA_FILE") from error
    return grpc.secure_channel(address.target, grpc.ssl_channel_credentials(roots), options=options)


def _system_roots() -> bytes | None:
    """The system's CA bundle; gRPC alone would use only the one it brings along."""
    bundle = ssl.get_default_verify_paths().cafile
    return Path(bundle).read_bytes() if bundle else None
