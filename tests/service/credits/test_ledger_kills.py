"""Whoever works on the ledger is killed between any two steps; all is asked again with the same ids and is as if nothing had happened.

Killed are the function in PostgreSQL while it waits for any table that it writes, the client that waits for its answer, and the server.
"""

import asyncio
import json
import os
import random
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncConnection

from credit_service import app, store
from credit_service.ledger import EntryQuery, ReceiptLine
from credit_service.settings import CreditSettings
from genmesh.credits.v1 import credits_pb2 as pb
from genmesh.credits.v1 import credits_pb2_grpc as pb_grpc
from servicekit.client import mesh_channel
from servicekit.telemetry import HttpServer
from servicekit.tls import TlsFiles
from tests.gateway_stand_in import stand_in_gateway
from tests.service.credits.callers import Signer
from tests.service.credits.clocked_ledger import ClockedLedger, clocked_ledger
from tests.service.credits.ledger_model import Model, Operation, see

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
TABLES = ("accounts", "lots", "ceilings", "reservations", "events", "entries", "grants", "clawbacks", "plan_grants")
"""All that any operation writes."""
LAST_TABLES = ("ceilings", "entries")
"""Each operation writes one of them, and at its end."""
DEADLINE_S = 60
RETRY_INTERVAL_S = 0.05

# In the function.


class Script:
    """A user with some history, and one more operation of each kind that could come next."""

    def __init__(self, ledger: ClockedLedger) -> None:
        self.user_id, self.key = uuid.uuid4(), uuid.uuid4()
        self._ledger = ledger
        self.to_capture, self.to_release, self.overdue = (self._hold(amount, ttl) for amount, ttl in ((50, DAY), (15, DAY), (12, HOUR)))
        now = ledger.now
        gift = {"actor_id": uuid.uuid4(), "user_id": self.user_id, "reason": "test"}
        bounds = {"user_id": self.user_id, "daily_millicredits": 500, "monthly_millicredits": None}
        self.history = [
            Operation("grant", {**gift, "request_id": uuid.uuid4(), "amount_millicredits": 100, "expire_time": None}),
            Operation("grant", {**gift, "request_id": uuid.uuid4(), "amount_millicredits": 40, "expire_time": now + 2 * DAY}),
            Operation("set_ceiling", {**bounds, "api_key_id": None}),
            Operation("set_ceiling", {**bounds, "api_key_id": self.key}),
            self.to_capture,
            self.to_release,
            self.overdue,
            Operation("grant", {**gift, "request_id": uuid.uuid4(), "amount_millicredits": 9, "expire_time": now + HOUR}),
        ]
        self.next = {
            "grant": Operation("grant", {**gift, "request_id": uuid.uuid4(), "amount_millicredits": 7, "expire_time": now + DAY}),
            "clawback": Operation("clawback", {**gift, "request_id": uuid.uuid4(), "amount_millicredits": 8}),
            "grant_plan": Operation(
                "grant_plan",
                {
                    "user_id": self.user_id,
                    "plan": "PLAN_PRO",
                    "start_time": now,
                    "end_time": now + 30 * DAY,
                    "expire_time": now + 32 * DAY,
                    "amount_millicredits": 11,
                },
            ),
            "reserve": self._hold(20, DAY),
            "capture": Operation(
                "capture",
                {
                    "reservation_id": self.to_capture.arguments["reservation_id"],
                    "amount_millicredits": 33,
                    "lines": (ReceiptLine("picture", 1, "image", 33),),
                },
            ),
            "release": Operation("release", {"reservation_id": self.to_release.arguments["reservation_id"]}),
            "late release": Operation("release", {"reservation_id": self.overdue.arguments["reservation_id"]}),
            "set_ceiling": Operation("set_ceiling", {**bounds, "api_key_id": None, "daily_millicredits": 600}),
            "expire_holds": Operation("expire_holds", {"limit": 100}),
            "lapse_due": Operation("lapse_due", {"limit": 100}),
        }

    def _hold(self, amount: int, ttl: timedelta) -> Operation:
        reservation_id = uuid.uuid4()
        return Operation(
            "reserve",
            {
                "reservation_id": reservation_id,
                "job_id": reservation_id,
                "user_id": self.user_id,
                "amount_millicredits": amount,
                "ttl": ttl,
                "model": "fast",
                "api_key_id": self.key,
            },
        )


@pytest.mark.parametrize("killed", ["the function", "the client, who takes it back", "the client, who says nothing"])
@pytest.mark.parametrize(
    "kind",
    ["grant", "clawback", "grant_plan", "reserve", "capture", "release", "late release", "set_ceiling", "expire_holds", "lapse_due"],
)
async def test_an_operation_is_whole_or_not_at_all_and_can_be_asked_again(clocked: ClockedLedger, kind: str, killed: str):
    stopped = 0
    # What is done once is done wherever it waited; what is undone has to be undone from everywhere.
    for table in TABLES if killed == "the function" else LAST_TABLES:
        await clocked.start_over()
        script, model = Script(clocked), Model(clocked.now)
        for operation in script.history:
            assert await clocked.do(operation) == operation.on(model)
        # Now a hold is overdue, and some promotional credits are over.
        await clocked.advance(HOUR)
        model.set_time(clocked.now)
        operation, before = script.next[kind], model.copy()
        expected = operation.on(model)
        users = [script.user_id]

        connected: asyncio.Future[AsyncConnection] = asyncio.get_running_loop().create_future()

        async def ask(operation: Operation = operation, connected: asyncio.Future[AsyncConnection] = connected) -> Any:
            connection = await clocked.engine.connect()
            connected.set_result(connection)
            try:
                return await operation(connection)
            finally:
                await connection.invalidate()
                await connection.close()

        async with clocked.locked(f"LOCK TABLE credits.{table} IN SHARE MODE"):
            task = asyncio.create_task(ask())
            await clocked.wait_until(lambda waiting, task=task: waiting == 1 or task.done())
            if task.done():
                assert task.result() == expected  # this table is not written
                continue
            stopped += 1
            (pid,) = await clocked.waiting()
            match killed:
                case "the function":
                    await clocked.query("SELECT pg_terminate_backend(:pid)", pid=pid)
                case "the client, who takes it back":
                    task.cancel()
                case _:
                    raw: Any = await (await connected).get_raw_connection()
                    raw.driver_connection.terminate()
            with pytest.raises((Exception, asyncio.CancelledError)):  # what the driver makes of it
                await task
            if killed != "the client, who says nothing":
                await clocked.wait_until(lambda waiting: waiting == 0)
                assert await see(clocked, users) == before.seen(users)
        if killed == "the client, who says nothing":
            # Nobody is there for the answer, and yet it is done.
            await wait_until_gone(clocked, pid)
            assert await see(clocked, users) == model.seen(users)
            if kind == "expire_holds":
                expected = []
        assert await clocked.do(operation) == (store.PLAN_GRANT_KNOWN if kind == "grant_plan" and killed.endswith("nothing") else expected)
        assert await see(clocked, users) == model.seen(users)
        await clocked.check_books()
    assert stopped >= (3 if killed == "the function" and kind != "set_ceiling" else 1)


async def wait_until_gone(ledger: ClockedLedger, pid: int) -> None:
    """Until a backend has ended, as it does when it finds its client gone."""
    async with asyncio.timeout(DEADLINE_S):
        while await ledger.query("SELECT 1 FROM pg_stat_activity WHERE pid = :pid", pid=pid):  # noqa: ASYNC110  # PostgreSQL gives no sign
            await asyncio.sleep(RETRY_INTERVAL_S)


# Over the wire.

Ask = Callable[[Any, Any, Any], Awaitable[Any]]
"""Makes a call (method, request, metadata) in whatever way the test wants it made, and comes back when it was answered."""


class Scene:
    """What a user goes through, step by step; every step can be repeated."""

    def __init__(self, signer: Signer) -> None:
        self.user_id, self.key, ids = uuid.uuid4(), uuid.uuid4(), [str(uuid.uuid4()) for _ in range(5)]
        user, key = str(self.user_id), str(self.key)
        admin, own = signer.metadata(uuid.uuid4(), "admin"), signer.metadata(self.user_id)
        grant = pb.GrantCreditsRequest(request_id=ids[0], user_id=user, amount_millicredits=100, reason="welcome")
        promotion = pb.GrantCreditsRequest(request_id=ids[1], user_id=user, amount_millicredits=50, reason="spring")
        promotion.expire_time.FromJsonString("2999-01-01T00:00:00Z")
        first, second = (
            pb.ReserveCreditsRequest(reservation_id=one, user_id=user, amount_millicredits=60, api_key_id=key, model="fast")
            for one in (ids[2], ids[3])
        )
        for reservation in (first, second):
            reservation.ttl.FromSeconds(3600)
        paid = pb.CaptureReservationRequest(
            reservation_id=ids[2],
            amount_millicredits=35,
            lines=[pb.ReceiptLine(description="picture", quantity=1, unit="image", amount_millicredits=35)],
        )
        self.steps: list[tuple[str, str, Any, Any]] = [
            ("LedgerAdminService", "GrantCredits", grant, admin),
            ("LedgerAdminService", "GrantCredits", promotion, admin),
            ("LedgerAdminService", "SetUserCeiling", pb.SetUserCeilingRequest(user_id=user, daily_millicredits=10**6), admin),
            ("CreditsService", "SetKeyCeiling", pb.SetKeyCeilingRequest(api_key_id=key, monthly_millicredits=10**6), own),
            ("LedgerService", "ReserveCredits", first, None),
            ("LedgerService", "CaptureReservation", paid, None),
            ("LedgerService", "ReserveCredits", second, None),
            ("LedgerService", "ReleaseReservation", pb.ReleaseReservationRequest(reservation_id=ids[3]), None),
            (
                "LedgerAdminService",
                "ClawbackCredits",
                pb.ClawbackCreditsRequest(request_id=ids[4], user_id=user, amount_millicredits=20, reason="error"),
                admin,
            ),
        ]

    async def play(self, stubs: "Stubs", ask: Ask, steps: int | None = None) -> None:
        for service, method, request, metadata in self.steps[:steps]:
            await ask(stubs.method(service, method), request, metadata)

    async def end(self, connection: AsyncConnection) -> tuple[Any, ...]:
        """Where all of it has led."""
        entries = await store.list_entries(connection, EntryQuery(self.user_id), before=None, limit=1000)
        return (
            await store.balance(connection, user_id=self.user_id),
            [(one.available_millicredits, one.reserved_millicredits) for one in await store.promotions(connection, user_id=self.user_id)],
            [
                (one.api_key_id == self.key, one.daily_millicredits, one.monthly_millicredits, one.spent_today_millicredits)
                for one in await store.list_ceilings(connection, user_id=self.user_id)
            ],
            [
                (one.kind, one.account, one.amount_millicredits, one.balance_after_millicredits, one.reason, one.lines, one.expire_time)
                for one in entries
            ],
        )


class Stubs:
    """Each service by the channel of who may call it."""

    def __init__(self, jobs: grpc.aio.Channel, edge: grpc.aio.Channel) -> None:
        self._stubs: dict[str, Any] = {
            "LedgerService": pb_grpc.LedgerServiceStub(jobs),
            "LedgerAdminService": pb_grpc.LedgerAdminServiceStub(edge),
            "CreditsService": pb_grpc.CreditsServiceStub(edge),
        }

    def method(self, service: str, name: str) -> Any:
        return getattr(self._stubs[service], name)


async def answered(method: Any, request: Any, metadata: Any) -> None:
    """Ask until there is an answer."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await method(request, metadata=metadata, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(RETRY_INTERVAL_S)
            else:
                return


async def test_clients_that_go_away_at_any_moment_and_ask_again_change_nothing(
    clocked: ClockedLedger, credit_settings: CreditSettings, jobs_channel: grpc.aio.Channel, edge_channel: grpc.aio.Channel, signer: Signer
):
    stubs, longest_s = Stubs(jobs_channel, edge_channel), 0.012

    async def impatient(method: Any, request: Any, metadata: Any) -> None:
        for _ in range(3):
            call = method(request, metadata=metadata)
            await asyncio.wait([asyncio.ensure_future(call)], timeout=random.uniform(0, longest_s))
            call.cancel()
            with suppress(asyncio.CancelledError):
                await call
        await answered(method, request, metadata)

    undisturbed, scenes = Scene(signer), [Scene(signer) for _ in range(8)]
    await undisturbed.play(stubs, answered)
    await asyncio.gather(*(scene.play(stubs, impatient) for scene in scenes))
    engine = app.create_engine(credit_settings)
    try:
        async with engine.connect() as connection:
            expected = await undisturbed.end(connection)
            for scene in scenes:
                assert await scene.end(connection) == expected
    finally:
        await engine.dispose()


class Served:
    """`credit_service serve`, which can be killed and started again at the same address."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None
        self._log: asyncio.Task[None] | None = None
        self.port = 0

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "credit_service", "serve"),
            env=self._environment | {"GENMESH_LISTEN_ADDRESS": f"127.0.0.1:{self.port}"},
            stderr=asyncio.subprocess.PIPE,
        )
        assert self._process.stderr is not None
        async with asyncio.timeout(DEADLINE_S):
            while '"server.listening"' not in (line := (await self._process.stderr.readline()).decode()):
                print(line, end="")
                assert line, "the process ended before it listened"
        self.port = json.loads(line)["port"]
        self._log = asyncio.create_task(self._read(self._process.stderr))

    async def _read(self, stderr: asyncio.StreamReader) -> None:
        while line := await stderr.readline():
            print(line.decode(), end="")

    async def kill(self) -> None:
        """End it with SIGKILL."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGKILL)
            await self._process.wait()
        if self._log is not None:
            await self._log


@pytest_asyncio.fixture
async def own_ledger(migrated_database: Callable[[], str]) -> AsyncIterator[ClockedLedger]:
    """A look at the database of the process, whose clock is PostgreSQL's own."""
    async with clocked_ledger(migrated_database()) as ledger:
        await ledger.set_up()
        yield ledger
        await ledger.check_books()


@pytest_asyncio.fixture
async def served(own_ledger: ClockedLedger, certificates: Path, signer: Signer) -> AsyncIterator[Served]:
    with (
        HttpServer("127.0.0.1:0", {"/jwks": signer.key_set_page}, tls=TlsFiles.of(certificates, "gateway")) as keys,
        stand_in_gateway(certificates) as gateway_address,
    ):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GENMESH_")} | {
            "GENMESH_DATABASE_URL": own_ledger.url,
            "GENMESH_DATABASE_POOL_SIZE": "20",
            "GENMESH_CERTIFICATES_DIR": str(certificates),
            "GENMESH_JWKS_URL": f"https://127.0.0.1:{keys.port}/jwks",
            "GENMESH_GATEWAY_ADDRESS": gateway_address,
            "GENMESH_METRICS_ADDRESS": "127.0.0.1:0",
            "GENMESH_PLAN_GRANT_INTERVAL_S": "0",
            "GENMESH_LOG_LEVEL": "info",
            "GENMESH_LOG_FORMAT": "json",
        }
        served = Served(environment)
        await served.start()
        try:
            yield served
        finally:
            await served.kill()


@pytest_asyncio.fixture
async def served_stubs(served: Served, credit_settings: CreditSettings) -> AsyncIterator[Stubs]:
    address = f"127.0.0.1:{served.port}"
    async with (
        mesh_channel(credit_settings, address, caller="jobs_service", service=app.SERVICE) as jobs,
        mesh_channel(credit_settings, address, caller="envoy", service=app.SERVICE) as edge,
    ):
        yield Stubs(jobs, edge)


async def test_a_server_killed_in_the_middle_of_every_operation_is_as_if_it_had_not_been(
    own_ledger: ClockedLedger, served: Served, served_stubs: Stubs, signer: Signer
):
    """Once so that what was under way is done without an answer, once so that it is undone."""
    undisturbed = Scene(signer)
    await undisturbed.play(served_stubs, answered)
    expected = await own_ledger.do(undisturbed.end)
    for fate in ("done", "undone"):
        # One user before each step.
        scenes = [Scene(signer) for _ in undisturbed.steps]
        await asyncio.gather(*(scene.play(served_stubs, answered, steps) for steps, scene in enumerate(scenes)))
        before = [await own_ledger.do(scene.end) for scene in scenes]
        async with own_ledger.locked("LOCK TABLE credits.entries, credits.ceilings IN SHARE MODE"):
            pending = [
                asyncio.ensure_future(served_stubs.method(service, method)(request, metadata=metadata))
                for service, method, request, metadata in (scene.steps[place] for place, scene in enumerate(scenes))
            ]
            await own_ledger.wait_until(lambda waiting: waiting >= len(undisturbed.steps))
            pids = await own_ledger.waiting()
            await served.kill()
            results = await asyncio.gather(*pending, return_exceptions=True)
            assert all(isinstance(result, grpc.aio.AioRpcError) for result in results)
            if fate == "undone":
                await own_ledger.query("SELECT pg_terminate_backend(pid) FROM unnest(CAST(:pids AS int[])) AS pid", pids=pids)
        for pid in pids:
            await wait_until_gone(own_ledger, pid)
        after = [await own_ledger.do(scene.end) for scene in scenes]
        assert all((one == other) == (fate == "undone") for one, other in zip(before, after, strict=True))
        await own_ledger.check_books()
        await served.start()
        await asyncio.gather(*(scene.play(served_stubs, answered) for scene in scenes))
        for scene in scenes:
            assert await own_ledger.do(scene.end) == expected


async def test_a_server_killed_again_and_again_is_as_if_it_had_not_been(
    own_ledger: ClockedLedger, served: Served, served_stubs: Stubs, signer: Signer
):
    undisturbed, scenes = Scene(signer), [Scene(signer) for _ in range(10)]
    await undisturbed.play(served_stubs, answered)
    expected = await own_ledger.do(undisturbed.end)
    steps = len(scenes) * len(undisturbed.steps)
    answers, enough = 0, asyncio.Event()
    kill_after = random.randint(1, steps // 3)

    async def counted(method: Any, request: Any, metadata: Any) -> None:
        nonlocal answers
        await answered(method, request, metadata)
        answers += 1
        if answers >= kill_after:
            enough.set()

    playing = asyncio.gather(*(scene.play(served_stubs, counted) for scene in scenes))
    for _ in range(2):
        await enough.wait()
        await served.kill()
        kill_after = random.randint(answers + 1, steps - 1)
        enough.clear()
        await served.start()
    await playing
    for scene in scenes:
        await scene.play(served_stubs, answered)
        assert await own_ledger.do(scene.end) == expected
