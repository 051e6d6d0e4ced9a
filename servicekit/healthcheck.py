"""`python -m servicekit.healthcheck SERVICE | metrics`: exit code 0 if the process in this container is well.

For container engines. SERVICE asks the standard health RPC as the service itself (its certificate is at hand); `metrics` is
for processes that serve nothing else.
"""

import argparse
import sys
import urllib.request
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from servicekit.settings import ServerSettings, TelemetrySettings, load
from servicekit.tls import TlsFiles, channel_credentials, server_name

TIMEOUT_S = 2.0
METRICS = "metrics"


def serving(settings: ServerSettings, service: str) -> bool:
    """Whether the server of `service` on this host says SERVING."""
    port = settings.listen_address.rpartition(":")[2]
    credentials = channel_credentials(TlsFiles.of(settings.certificates_dir, service))
    with grpc.secure_channel(f"127.0.0.1:{port}", credentials, [("grpc.ssl_target_name_override", server_name(service))]) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # the published stubs know no methods
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError:
            return False
    return reply.status == health_pb2.HealthCheckResponse.SERVING


def answering(settings: TelemetrySettings) -> bool:
    """Whether this host's metrics are served."""
    port = settings.metrics_address.rpartition(":")[2]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=TIMEOUT_S):
            return True
    except OSError:
        return False


def main() -> None:
    """Ask, and exit."""
    parser = argparse.ArgumentParser(prog="python -m servicekit.healthcheck", description="Whether the process on this host is well.")
    parser.add_argument("service", help=f"name of the mesh service that runs here, or `{METRICS}`")
    service: str = parser.parse_args().service
    well = answering(load(TelemetrySettings)) if service == METRICS else serving(load(ServerSettings), service)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
