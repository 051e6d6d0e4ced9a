"""What other services ask the gateway for, where a test runs one of them without it: nothing was revoked, everything is written down.

Synchronous, so that tests without an event loop have it too.
"""

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from servicekit.tls import TlsFiles

THREADS = 2


class _Revocations(identity_pb2_grpc.RevocationServiceServicer):
    def ListRevocations(self, request: Any, context: Any) -> identity_pb2.ListRevocationsResponse:  # noqa: N802
        return identity_pb2.ListRevocationsResponse()


class _Audit(identity_pb2_grpc.AuditServiceServicer):
    def BeginAuditEntry(self, request: Any, context: Any) -> identity_pb2.BeginAuditEntryResponse:  # noqa: N802
        return identity_pb2.BeginAuditEntryResponse()

    def FinishAuditEntry(self, request: Any, context: Any) -> identity_pb2.FinishAuditEntryResponse:  # noqa: N802
        return identity_pb2.FinishAuditEntryResponse()


@contextmanager
def stand_in_gateway(certificates: Path) -> Generator[str]:
    """Serves while the block runs; its address."""
    files = TlsFiles.of(certificates, "gateway")
    credentials = grpc.ssl_server_credentials(
        [(files.key.read_bytes(), files.certificate.read_bytes())], files.ca.read_bytes(), require_client_auth=True
    )
    with ThreadPoolExecutor(THREADS) as threads:
        server = grpc.server(threads)
        identity_pb2_grpc.add_RevocationServiceServicer_to_server(_Revocations(), server)
        identity_pb2_grpc.add_AuditServiceServicer_to_server(_Audit(), server)
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(grace=None).wait()
