"""Channels to other services of the mesh: mTLS that follows its files, keepalive, request id and trace carried on."""

import asyncio
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
import structlog
from opentelemetry import propagate

from servicekit.settings import MeshSettings
from servicekit.tls import TlsFiles, TlsMaterial, WatchedFiles, material_credentials, server_name

RETIRED_MAX = 8
"""Channels with an earlier certificate that wait for their calls to end; one more cuts the calls of the oldest."""
RETIRED_GRACE_S = 24 * 3600.0


def mesh_channel(settings: MeshSettings, address: str, *, caller: str, service: str) -> grpc.aio.Channel:
    """A channel from `caller` to `service` at `address`; close it (it is an async context manager).

    The server's certificate has to name `service`: a stolen certificate of another service does not impersonate it.
    When the caller's files are replaced, calls from then on use them; calls in flight, streams too, end on the old connection.
    """
    options = [
        ("grpc.ssl_target_name_override", server_name(service)),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.max_receive_message_length", 16 * 1024 * 1024),
        # A service that restarts is back in a second or two; the default backoff would wait up to two minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    return _RotatingChannel(
        lambda material: grpc.aio.secure_channel(address, material_credentials(material), options=options),
        WatchedFiles(TlsFiles.of(settings.certificates_dir, caller)),
    )


class _RotatingChannel(grpc.aio.Channel):
    """A channel that is replaced by another when there are new files: gRPC binds a channel to one certificate for life."""

    def __init__(self, open_channel: Callable[[TlsMaterial], grpc.aio.Channel], files: WatchedFiles) -> None:
        self._open = open_channel
        self._files = files
        self._material = files.current()
        self._channel = open_channel(self._material)
        self._retired: dict[asyncio.Task[None], None] = {}
        """Those that wait for their calls to end, oldest first."""
        self._closed = False

    def newest(self) -> grpc.aio.Channel:
        """The channel for a call that starts now."""
        material = self._files.current()
        if material is not self._material and not self._closed:
            retired, self._channel, self._material = self._channel, self._open(material), material
            self._retire(retired)
        return self._channel

    def _retire(self, channel: grpc.aio.Channel) -> None:
        if len(self._retired) >= RETIRED_MAX:
            next(iter(self._retired)).cancel()
        # Not `close(grace)`: that cannot be cut short, for a second `close` does nothing.
        calls: list[grpc.aio.Call] = list(channel._active_calls)  # pyright: ignore[reportAttributeAccessIssue]
        task = asyncio.create_task(_close_after(channel, calls))
        self._retired[task] = None
        task.add_done_callback(self._retired.pop)

    async def __aenter__(self) -> "_RotatingChannel":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """See Channel; calls on earlier connections get no grace after that."""
        self._closed = True
        await self._channel.close(grace)
        retired = list(self._retired)
        for task in retired:
            task.cancel()
        await asyncio.gather(*retired, return_exceptions=True)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        """See Channel."""
        return self.newest().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        """See Channel."""
        await self.newest().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        """See Channel."""
        await self.newest().channel_ready()

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        """See Channel."""
        return _RotatingMethod(self, lambda channel: channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        """See Channel."""
        return _RotatingMethod(self, lambda channel: channel.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        """See Channel."""
        return _RotatingMethod(self, lambda channel: channel.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        """See Channel."""
        return _RotatingMethod(self, lambda channel: channel.stream_stream(*args, **kwargs))


async def _close_after(channel: grpc.aio.Channel, calls: list[grpc.aio.Call]) -> None:
    """Close when the calls have ended, or at once when cancelled."""
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(RETIRED_GRACE_S):
                for call in calls:
                    await call.code()
    finally:
        await channel.close()


class _RotatingMethod:
    """A method of the newest channel, bound again only after a replacement."""

    __slots__ = ("_bind", "_bound", "_channel", "_rotating")

    def __init__(self, rotating: _RotatingChannel, bind: Callable[[grpc.aio.Channel], Callable[..., Any]]) -> None:
        self._rotating = rotating
        self._bind = bind
        self._channel = rotating.newest()
        self._bound = bind(self._channel)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        channel = self._rotating.newest()
        if channel is not self._channel:
            self._channel, self._bound = channel, self._bind(channel)
        return self._bound(*args, **kwargs)


def call_metadata() -> list[tuple[str, Any]]:
    """Request id and trace context of the current task, to send along with a call."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    request_id = structlog.contextvars.get_contextvars().get("request_id") or str(uuid.uuid4())
    return [("x-request-id", request_id), *carrier.items()]
