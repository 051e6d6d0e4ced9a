"""Readiness of each kind of process: the cheapest question that only a working one answers."""

import asyncio
from pathlib import Path
from typing import Any

import asyncpg
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cli.stack.process import Check
from servicekit.tls import TlsFiles, channel_credentials, server_name

PROBE_TIMEOUT_S = 2


class NotReadyError(Exception):
    """The process answered, but not what a working one answers."""


def postgres_ready(dsn: str) -> Check:
    """PostgreSQL accepts a query."""

    async def check() -> None:
        connection = await asyncpg.connect(dsn, timeout=PROBE_TIMEOUT_S)
        try:
            await connection.execute("SELECT 1")
        finally:
            await connection.close(timeout=PROBE_TIMEOUT_S)

    return check


def redis_ready(host: str, port: int, password: str) -> Check:
    """Redis answers PING, which it refuses while it still loads its data."""

    async def check() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(b"AUTH " + password.encode() + b"\r\nPING\r\n")
            answers = [(await reader.readline()).strip(), (await reader.readline()).strip()]
            if answers != [b"+OK", b"+PONG"]:
                raise NotReadyError(answers[-1].decode(errors="replace"))
        finally:
            writer.close()

    return check


def http_ready(host: str, port: int, path: str, *, statuses: tuple[int, ...] = (200,), method: str = "GET") -> Check:
    """An HTTP server answers `path` with one of `statuses`."""

    async def check() -> None:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(f"{method} {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
            line = (await reader.readline()).decode(errors="replace").strip()
            if line.split(" ")[1:2] not in [[str(status)] for status in statuses]:
                raise NotReadyError(f"{path}: {line or 'no answer'}")
        finally:
            writer.close()

    return check


def all_of(*checks: Check) -> Check:
    """Every one of `checks` passes."""

    async def check() -> None:
        for one in checks:
            await one()

    return check


def grpc_ready(certificates_dir: Path, address: str, service: str) -> Check:
    """A gRPC server of the mesh is SERVING, asked over mTLS as `cli`."""

    host, _, port = address.rpartition(":")
    channel: grpc.aio.Channel | None = None

    async def check() -> None:
        nonlocal channel
        if channel is None:
            # While nobody listens, a plain connection costs next to nothing; a channel with its handshake does not.
            _, writer = await asyncio.open_connection(host, int(port))
            writer.close()
            credentials = channel_credentials(TlsFiles.of(certificates_dir, "cli"))
            options = [("grpc.ssl_target_name_override", server_name(service)), ("grpc.use_local_subchannel_pool", 1)]
            channel = grpc.aio.secure_channel(address, credentials, options=options)
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its methods are made at run time
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            # A new one next time: the pause between attempts is the supervisor's, not the channel's backoff.
            failed, channel = channel, None
            await failed.close()
            raise NotReadyError(f"{error.code().name}: {error.details()}") from error
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise NotReadyError("NOT_SERVING")

    return check
