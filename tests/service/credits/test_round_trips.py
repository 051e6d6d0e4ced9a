"""What goes over the wire to PostgreSQL: an operation on the ledger is one round trip, and a connection that broke is not used again."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import grpc
import pytest
import pytest_asyncio
from pydantic import SecretStr
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import app, store
from credit_service.balances import BalanceFeed
from credit_service.ledger import Outcome
from credit_service.servicer import LedgerServicer
from credit_service.settings import CreditSettings
from genmesh.credits.v1 import credits_pb2 as pb
from servicekit.database import autocommit, create_engine, fetch_row, transaction, translate

Fund = Callable[[uuid.UUID, int], Awaitable[None]]

SSL_REQUEST = 80877103
TIMEOUT_S = 30


class Wire:
    """Stands between a client and PostgreSQL, and notes the kinds of messages that the client sends after it has signed in."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self.port = 0
        self.sent = ""
        """A letter a message: Q query, P parse, B bind, E execute, S sync …"""

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator[None]:
        """Listen on a free `port` while the block runs."""
        async with await asyncio.start_server(self._accept, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            yield

    @property
    def round_trips(self) -> int:
        """How often the client has waited: PostgreSQL answers a query or a sync with "ready", and nothing else."""
        return self.sent.count("Q") + self.sent.count("S")

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(*self._upstream)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._answers(server_reader, writer))
                await self._requests(reader, server_writer)
        except* (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for one in (writer, server_writer):
                one.close()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        signed_in = False
        while True:
            kind = b"" if not signed_in else await reader.readexactly(1)
            length = await reader.readexactly(4)
            body = await reader.readexactly(int.from_bytes(length) - 4)
            # The first messages have no kind: perhaps a question for TLS, then the sign-in.
            signed_in = signed_in or int.from_bytes(body[:4]) != SSL_REQUEST
            if kind not in (b"", b"p"):  # p: a password
                self.sent += kind.decode()
            writer.write(kind + length + body)

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while some := await reader.read(65_536):
            writer.write(some)
        writer.close()


@pytest_asyncio.fixture
async def wire(credit_settings: CreditSettings) -> AsyncIterator[Wire]:
    """A wire to the database of the session."""
    url = make_url(credit_settings.database_url.get_secret_value())
    assert url.host is not None
    assert url.port is not None
    wire = Wire(url.host, url.port)
    async with wire.listening():
        yield wire


@pytest_asyncio.fixture
async def wired(credit_settings: CreditSettings, wire: Wire) -> AsyncIterator[AsyncEngine]:
    """The service's engine, with one connection, over the wire."""
    url = make_url(credit_settings.database_url.get_secret_value()).set(host="127.0.0.1", port=wire.port)
    secret = SecretStr(url.render_as_string(hide_password=False))
    engine = app.create_engine(credit_settings.model_copy(update={"database_url": secret, "database_pool_size": 1}))
    yield engine
    await engine.dispose()


def holds_of(user_id: uuid.UUID) -> pb.ReserveCreditsRequest:
    request = pb.ReserveCreditsRequest(reservation_id=str(uuid.uuid4()), user_id=str(user_id), amount_millicredits=10, model="small")
    request.ttl.FromSeconds(60)
    return request


async def test_an_operation_is_one_round_trip(wired: AsyncEngine, wire: Wire, feed: BalanceFeed, fund: Fund, user_id: uuid.UUID):
    await fund(user_id, 1000)
    servicer = LedgerServicer(wired, feed)
    context: Any = None

    async def captured() -> None:
        hold = holds_of(user_id)
        await servicer.ReserveCredits(hold, context)
        line = pb.ReceiptLine(description="image", quantity=20, unit="step", amount_millicredits=6)
        request = pb.CaptureReservationRequest(reservation_id=hold.reservation_id, amount_millicredits=6, lines=[line])
        await servicer.CaptureReservation(request, context)

    async def released() -> None:
        hold = holds_of(user_id)
        await servicer.ReserveCredits(hold, context)
        await servicer.ReleaseReservation(pb.ReleaseReservationRequest(reservation_id=hold.reservation_id), context)

    async def by_the_engine_alone() -> None:
        hold_id = uuid.uuid4()
        hold: dict[str, Any] = {
            "reservation_id": hold_id,
            "job_id": hold_id,
            "user_id": user_id,
            "amount_millicredits": 10,
            "ttl": timedelta(minutes=1),
        }
        assert (await store.reserve(wired, **hold)).outcome is Outcome.OK
        assert (await store.capture(wired, reservation_id=hold_id, amount_millicredits=6)).outcome is Outcome.OK

    for pair in (captured, released, by_the_engine_alone):
        await pair()  # a statement is prepared when a connection first meets it
        wire.sent = ""
        await pair()
        assert wire.sent == 2 * "BES"


async def test_what_goes_through_sqlalchemy_is_one_round_trip_too(wired: AsyncEngine, wire: Wire, user_id: uuid.UUID):
    async def grant() -> None:
        async with transaction(wired) as connection:
            given: dict[str, Any] = {
                "actor_id": uuid.uuid4(),
                "request_id": uuid.uuid4(),
                "user_id": user_id,
                "amount_millicredits": 10,
                "reason": "test",
            }
            assert (await store.grant(connection, **given)).outcome is Outcome.OK

    async def read() -> None:
        async with autocommit(wired) as connection:
            assert (await store.balance(connection, user_id=user_id)).available_millicredits > 0

    for operation in (grant, read):
        await operation()
        wire.sent = ""
        await operation()
        assert wire.round_trips == 1


async def test_a_connection_that_was_closed_meanwhile_is_replaced(
    wired: AsyncEngine, engine: AsyncEngine, feed: BalanceFeed, fund: Fund, user_id: uuid.UUID
):
    await fund(user_id, 1000)
    servicer = LedgerServicer(wired, feed)
    context: Any = None
    await servicer.ReserveCredits(holds_of(user_id), context)
    async with autocommit(wired) as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
    closed = asyncio.Event()
    driver.add_termination_listener(lambda _: closed.set())
    await fetch_row(engine, "SELECT pg_terminate_backend($1)", driver.get_server_pid())
    async with asyncio.timeout(TIMEOUT_S):
        await closed.wait()
    await servicer.ReserveCredits(holds_of(user_id), context)


async def test_a_statement_cut_off_is_out_of_reach_and_the_next_one_works(wired: AsyncEngine, engine: AsyncEngine):
    process_id = (await fetch_row(wired, "SELECT pg_backend_pid() AS id"))["id"]
    sleeping = asyncio.create_task(fetch_row(wired, "SELECT pg_sleep($1)", TIMEOUT_S))
    await state_of(engine, process_id, "PgSleep")
    await fetch_row(engine, "SELECT pg_terminate_backend($1)", process_id)
    with pytest.raises(asyncpg.PostgresError) as raised:
        await sleeping
    translated = translate(raised.value)
    assert translated is not None
    assert translated.code is grpc.StatusCode.UNAVAILABLE
    assert (await fetch_row(wired, "SELECT 1 AS one"))["one"] == 1


@pytest.mark.parametrize("lent", [False, True])
async def test_a_cancelled_statement_stops_and_leaves_the_pool_whole(wired: AsyncEngine, engine: AsyncEngine, lent: bool):
    async def sleep() -> None:
        if not lent:
            await fetch_row(wired, "SELECT pg_sleep($1)", TIMEOUT_S)
            return
        async with autocommit(wired) as connection:
            await fetch_row(connection, "SELECT pg_sleep($1)", TIMEOUT_S)

    process_id = (await fetch_row(wired, "SELECT pg_backend_pid() AS id"))["id"]
    sleeping = asyncio.create_task(sleep())
    await state_of(engine, process_id, "PgSleep")
    sleeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sleeping
    await state_of(engine, process_id, None)
    # The pool has one connection.
    assert (await fetch_row(wired, "SELECT 1 AS one"))["one"] == 1


async def test_a_statement_that_is_refused_keeps_its_connection(wired: AsyncEngine):
    process_id = (await fetch_row(wired, "SELECT pg_backend_pid() AS id"))["id"]
    with pytest.raises(asyncpg.DivisionByZeroError) as raised:
        await fetch_row(wired, "SELECT 1 / $1::int AS none", 0)
    assert translate(raised.value) is None
    assert (await fetch_row(wired, "SELECT pg_backend_pid() AS id"))["id"] == process_id


async def test_a_transaction_takes_no_statement_past_it(wired: AsyncEngine):
    async with wired.connect() as connection:
        await connection.execution_options(isolation_level="READ COMMITTED")
        with pytest.raises(RuntimeError, match="transaction"):
            await fetch_row(connection, "SELECT 1 AS one")


async def test_a_connection_goes_back_to_transactions_after_autocommit(credit_settings: CreditSettings):
    transactional = create_engine(credit_settings.model_copy(update={"database_pool_size": 1}), schema="credits", application="test")
    try:
        async with autocommit(transactional) as connection:
            assert (await fetch_row(connection, "SELECT 1 AS one"))["one"] == 1
        async with transaction(transactional) as connection:
            with pytest.raises(RuntimeError, match="transaction"):
                await fetch_row(connection, "SELECT 1 AS one")
    finally:
        await transactional.dispose()


async def state_of(engine: AsyncEngine, process_id: int, waits_for: str | None) -> None:
    """Wait until a backend waits for that, or is gone."""
    query = "SELECT (SELECT coalesce(wait_event, '') FROM pg_stat_activity WHERE pid = $1) AS waits_for"
    async with asyncio.timeout(TIMEOUT_S):
        while (await fetch_row(engine, query, process_id))["waits_for"] != waits_for:  # noqa: ASYNC110  # nobody would set an event
            await asyncio.sleep(0.01)
