"""Channels to other services of the mesh: mTLS, keepalive, request id and trace carried on."""

import uuid
from typing import Any

import grpc
import structlog
from opentelemetry import propagate

from servicekit.settings import MeshSettings
from servicekit.tls import TlsFiles, channel_credentials, server_name


def mesh_channel(settings: MeshSettings, address: str, *, caller: str, service: str) -> grpc.aio.Channel:
    """A channel from `caller` to `service` at `address`; close it (it is an async context manager).

    The server's certificate has to name `service`: a stolen certificate of another service does not impersonate it.
    """
    return grpc.aio.secure_channel(
        address,
        channel_credentials(TlsFiles.of(settings.certificates_dir, caller)),
        options=[
            ("grpc.ssl_target_name_override", server_name(service)),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.max_receive_message_length", 16 * 1024 * 1024),
            # A service that restarts is back in a second or two; the default backoff would wait up to two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ],
    )


def call_metadata() -> list[tuple[str, Any]]:
    """Request id and trace context of the current task, to send along with a call."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    request_id = structlog.contextvars.get_contextvars().get("request_id") or str(uuid.uuid4())
    return [("x-request-id", request_id), *carrier.items()]
