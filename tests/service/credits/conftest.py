"""credit_service for its tests: a migrated database, the server over mTLS, stubs for each kind of caller.

After every test the books are checked: nothing that a test does may leave a ledger that does not add up.
"""

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import app
from credit_service.balances import BalanceFeed
from credit_service.settings import CreditSettings
from genmesh.credits.v1 import credits_pb2 as pb
from genmesh.credits.v1 import credits_pb2_grpc as pb_grpc
from servicekit.client import mesh_channel
from servicekit.doorkeeper import Doorkeeper
from servicekit.server import MeshServer
from tests.service.credits.callers import Signer
from tests.service.credits.clocked_ledger import ClockedLedger, clocked_ledger

if TYPE_CHECKING:
    from genmesh.credits.v1.credits_pb2_grpc import CreditsServiceAsyncStub, LedgerAdminServiceAsyncStub, LedgerServiceAsyncStub

PROCESS_TIMEOUT_S = 30


class Databases(Protocol):
    """The part of the shared PostgreSQL that is used here."""

    def create_database(self) -> str:
        """URL of a fresh, empty database."""
        ...


@pytest.fixture(scope="session")
def migrated_database(postgres: Databases) -> Callable[[], str]:
    """Makes fresh databases with the schema in them, by the command an operator runs."""

    def create() -> str:
        url = postgres.create_database()
        subprocess.run(
            [sys.executable, "-m", "credit_service", "migrate"],
            env={**os.environ, "GENMESH_DATABASE_URL": url},
            check=True,
            timeout=PROCESS_TIMEOUT_S,
        )
        return url

    return create


@pytest_asyncio.fixture(scope="session")
async def shared_clocked_ledger(migrated_database: Callable[[], str]) -> AsyncIterator[ClockedLedger]:
    """A ledger whose clock the tests set."""
    async with clocked_ledger(migrated_database()) as ledger:
        await ledger.set_up()
        yield ledger


@pytest_asyncio.fixture
async def clocked(shared_clocked_ledger: ClockedLedger) -> AsyncIterator[ClockedLedger]:
    """The same, its clock at START, with nothing that earlier tests left to end; its books add up after the test."""
    await shared_clocked_ledger.start_over()
    yield shared_clocked_ledger
    await shared_clocked_ledger.check_books()


@pytest.fixture(scope="session")
def credit_settings(migrated_database: Callable[[], str], certificates: Path) -> CreditSettings:
    """Settings of the server of the session."""
    return CreditSettings.model_validate({"database_url": migrated_database(), "certificates_dir": certificates, "drain_s": 0})


@pytest.fixture(scope="session")
def signer() -> Signer:
    """Signs the access tokens that the server believes."""
    return Signer()


@pytest_asyncio.fixture(scope="session")
async def engine(credit_settings: CreditSettings) -> AsyncIterator[AsyncEngine]:
    """The server's own engine, for what no RPC shows."""
    engine = app.create_engine(credit_settings)
    yield engine
    await engine.dispose()


@pytest_asyncio.fixture(scope="session")
async def feed(engine: AsyncEngine) -> AsyncIterator[BalanceFeed]:
    """The server's feed of balances, running."""
    feed = BalanceFeed(engine)
    running = asyncio.create_task(feed.run())
    yield feed
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


@pytest_asyncio.fixture(scope="session")
async def server(credit_settings: CreditSettings, engine: AsyncEngine, feed: BalanceFeed, signer: Signer) -> AsyncIterator[MeshServer]:
    """The server, as `credit_service serve` builds it; holds expire only when a test says so."""
    deps = app.Dependencies(engine, Doorkeeper(signer), feed)
    async with app.build_server(credit_settings, deps).running(*app.GRPC_SERVICES) as server:
        yield server


@pytest_asyncio.fixture(scope="session")
async def jobs_channel(credit_settings: CreditSettings, server: MeshServer) -> AsyncIterator[grpc.aio.Channel]:
    """A channel of jobs_service."""
    async with mesh_channel(credit_settings, f"127.0.0.1:{server.port}", caller="jobs_service", service=app.SERVICE) as channel:
        yield channel


@pytest_asyncio.fixture(scope="session")
async def edge_channel(credit_settings: CreditSettings, server: MeshServer) -> AsyncIterator[grpc.aio.Channel]:
    """A channel of Envoy, which carries the calls of users."""
    async with mesh_channel(credit_settings, f"127.0.0.1:{server.port}", caller="envoy", service=app.SERVICE) as channel:
        yield channel


@pytest.fixture
def ledger_stub(jobs_channel: grpc.aio.Channel) -> "LedgerServiceAsyncStub":
    """LedgerService, as jobs_service calls it."""
    return pb_grpc.LedgerServiceStub(jobs_channel)


@pytest.fixture
def credits_stub(edge_channel: grpc.aio.Channel) -> "CreditsServiceAsyncStub":
    """CreditsService, as users call it."""
    return pb_grpc.CreditsServiceStub(edge_channel)


@pytest.fixture
def admin_stub(edge_channel: grpc.aio.Channel) -> "LedgerAdminServiceAsyncStub":
    """LedgerAdminService, as administrators call it."""
    return pb_grpc.LedgerAdminServiceStub(edge_channel)


@pytest.fixture
def user_id() -> uuid.UUID:
    """A user nobody has heard of yet."""
    return uuid.uuid4()


@pytest.fixture
def fund(admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer) -> Callable[[uuid.UUID, int], Awaitable[None]]:
    """Grants credits to a user."""

    async def grant(user_id: uuid.UUID, amount_millicredits: int) -> None:
        request = pb.GrantCreditsRequest(
            request_id=str(uuid.uuid4()), user_id=str(user_id), amount_millicredits=amount_millicredits, reason="test"
        )
        await admin_stub.GrantCredits(request, metadata=signer.metadata(uuid.uuid4(), "admin"))

    return grant


@pytest.fixture
def balance_of(credits_stub: "CreditsServiceAsyncStub", signer: Signer) -> Callable[[uuid.UUID], Awaitable[tuple[int, int]]]:
    """(available, reserved) of a user, as the user sees it."""

    async def balance(user_id: uuid.UUID) -> tuple[int, int]:
        response = await credits_stub.GetBalance(pb.GetBalanceRequest(), metadata=signer.metadata(user_id))
        return response.available_millicredits, response.reserved_millicredits

    return balance


@pytest_asyncio.fixture(autouse=True)
async def _books_add_up(engine: AsyncEngine) -> AsyncIterator[None]:  # pyright: ignore[reportUnusedFunction]
    yield
    async with engine.connect() as connection:
        discrepancies = (await connection.execute(sa.text("SELECT * FROM credits.discrepancies"))).all()
    assert discrepancies == []
