"""What a call costs more on a mesh channel, which follows its certificate files, than on the gRPC channel inside it. Prints one JSON line.

    .venv/bin/python -m benchmarks.channel [--calls N]

Both make empty unary calls to one server in the same process over mTLS, in turns call by call, so that what else the machine
does hits both alike. `facade_us` is the facade alone, around a method that does nothing.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import uvloop

from cli.stack.certificates import ensure_certificates
from servicekit.client import mesh_channel
from servicekit.settings import MeshSettings
from servicekit.tls import TlsFiles, server_credentials

SERVER = "credit_service"
METHOD = "/genmesh.benchmarks.v1.Echo/Echo"
WARM_UP = 500
FACADE_CALLS = 200_000


async def echo(request: bytes, _context: Any) -> bytes:
    """The request."""
    return request


def seconds(call: Callable[..., Any], calls: int) -> float:
    """Seconds of `calls` calls of a plain function, each."""
    started = time.perf_counter()
    for _ in range(calls):
        call(b"", timeout=5)
    return (time.perf_counter() - started) / calls


async def measure(directory: Path, calls: int) -> dict[str, float]:
    """Medians of both, in microseconds."""
    ensure_certificates(directory, directory)
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(echo)  # pyright: ignore[reportArgumentType]
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("genmesh.benchmarks.v1.Echo", {"Echo": handler})])
    port = server.add_secure_port("127.0.0.1:0", server_credentials(TlsFiles.of(directory, SERVER)))
    await server.start()
    settings = MeshSettings(certificates_dir=directory)  # pyright: ignore[reportCallIssue]  # the rest has defaults
    async with mesh_channel(settings, f"127.0.0.1:{port}", caller="jobs_service", service=SERVER) as channel:
        inner: grpc.aio.Channel = channel.newest()  # pyright: ignore[reportAttributeAccessIssue]  # of the facade
        # Both over the same connection.
        methods: list[Any] = [inner.unary_unary(METHOD), channel.unary_unary(METHOD)]
        took: tuple[list[float], list[float]] = ([], [])
        for index in range(WARM_UP + calls):
            for side in (0, 1) if index % 2 else (1, 0):
                started = time.perf_counter()
                await methods[side](b"", timeout=5)
                if index >= WARM_UP:
                    took[side].append(time.perf_counter() - started)
        bare_s, mesh_s = (statistics.median(one) for one in took)

        def nothing(*_: Any, **__: Any) -> None:
            return

        around_nothing: Any = channel.unary_unary(METHOD)
        around_nothing._bound = nothing
        facade_s = min(seconds(around_nothing, FACADE_CALLS) - seconds(nothing, FACADE_CALLS) for _ in range(3))
    await server.stop(None)
    return {
        "bare_us": round(bare_s * 1e6, 1),
        "mesh_us": round(mesh_s * 1e6, 1),
        "ratio": round(mesh_s / bare_s, 4),
        "facade_us": round(facade_s * 1e6, 2),
        "facade_share": round(facade_s / bare_s, 4),
    }


def main() -> None:
    """Run, print."""
    parser = argparse.ArgumentParser(description="A mesh channel against the gRPC channel inside it")
    parser.add_argument("--calls", type=int, default=20_000)
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(uvloop.run(measure(Path(directory), parser.parse_args().calls))))


if __name__ == "__main__":
    main()
