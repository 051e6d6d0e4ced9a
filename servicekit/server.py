"""A gRPC server as every service runs it: mTLS, health, reflection, the layers of `interceptors`, graceful drain."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from servicekit.audit import AuditTrail, LogTrail, Recorder
from servicekit.errors import MeshError
from servicekit.identity import TokenVerifier
from servicekit.interceptors import Audit, Authentication, Errors, Interceptor, Telemetry, Validation
from servicekit.settings import ServerSettings
from servicekit.tls import TlsFiles, server_credentials

HEALTH_INTERVAL_S = 2.0
HEALTH_TIMEOUT_S = 1.5
METADATA_MAX_BYTES = 64 * 1024
"""Twice what Envoy lets through: what it adds must fit too."""

_log = structlog.get_logger(__name__)

Check = Callable[[], Awaitable[object]]


class MeshServer:
    """A server under construction or running. Register servicers on `grpc`, then enter `running()`."""

    def __init__(
        self,
        settings: ServerSettings,
        *,
        service: str,
        verifier: TokenVerifier,
        checks: Mapping[str, Check],
        translate: Callable[[Exception], MeshError | None] = lambda _: None,
        audit: AuditTrail | None = None,
    ) -> None:
        """`checks` are awaited every 2 s: one that raises or takes 1.5 s makes the server NOT_SERVING.

        `translate` turns exceptions of libraries (a database that is gone …) into typed errors. `audit` is where entries of the
        audit trail go; None: to the log.
        """
        self._settings = settings
        self._service = service
        self._checks = dict(checks)
        self._names: tuple[str, ...] = ()
        self.draining = asyncio.Event()
        """Set when the server is told to stop: long streams should end, so that their clients go on elsewhere."""
        recorder = Recorder(audit or LogTrail())
        layers = [Telemetry(), Errors(translate), Authentication(verifier, recorder), Validation(), Audit(recorder)]
        self.grpc = grpc.aio.server(
            interceptors=[Interceptor(layers)],
            maximum_concurrent_rpcs=settings.max_concurrent_rpcs,
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.so_reuseport", 0),
                # Above its soft limit (8 KiB) gRPC refuses at random; Envoy's limit on headers is the one that counts.
                ("grpc.max_metadata_size", METADATA_MAX_BYTES),
                ("grpc.absolute_max_metadata_size", METADATA_MAX_BYTES),
                # Envoy and long-lived clients may ping idle streams; the default answers "too many pings" and cuts them.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]  # missing in the stubs
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        self.port = 0

    @asynccontextmanager
    async def running(self, *names: str) -> AsyncGenerator["MeshServer"]:
        """Serve while the block runs; `names` are the full names of the registered services, for health and reflection.

        On leaving: NOT_SERVING first, then running calls get `drain_s` to end.
        """
        self._names = ("", *names)
        for name in self._names:
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self.grpc)
        credentials = server_credentials(TlsFiles.of(self._settings.certificates_dir, self._service))
        self.port = self.grpc.add_secure_port(self._settings.listen_address, credentials)
        await self.grpc.start()
        _log.info("server.listening", port=self.port)
        watch = asyncio.create_task(self._watch_health(), name="health")
        try:
            yield self
        finally:
            watch.cancel()
            await self._health.enter_graceful_shutdown()
            self.draining.set()
            await self.grpc.stop(self._settings.drain_s)
            _log.info("server.stopped")

    async def _watch_health(self) -> None:
        serving: bool | None = None
        while True:
            failed = await self._failed_checks()
            if serving is not (not failed):
                serving = not failed
                _log.info("server.health", serving=serving, failed=failed)
                status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
                for name in self._names:
                    await self._health.set(name, status)
            await asyncio.sleep(HEALTH_INTERVAL_S if serving else HEALTH_INTERVAL_S / 10)

    async def _failed_checks(self) -> list[str]:
        failed: list[str] = []
        for name, check in self._checks.items():
            try:
                async with asyncio.timeout(HEALTH_TIMEOUT_S):
                    await check()
            except Exception as error:  # whatever a store's driver raises, the answer is the same
                failed.append(f"{name}: {error!r}"[:200])
        return failed
