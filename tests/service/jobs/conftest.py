"""jobs_service for its tests: a migrated database emptied before each test, Redis, the real credit_service over mTLS."""

import os
import secrets
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Protocol

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
from redis import asyncio as redis
from sqlalchemy.ext.asyncio import AsyncEngine

from cli.stack.ports import hold_block, is_free
from credit_service import app as credits_app
from credit_service.balances import BalanceFeed
from credit_service.settings import CreditSettings
from genmesh.credits.v1 import credits_pb2, credits_pb2_grpc
from jobs_service.ledger import Ledger
from jobs_service.settings import DispatchSettings
from jobs_service.tables import metadata
from servicekit import database, streams
from servicekit.client import mesh_channel
from servicekit.doorkeeper import Doorkeeper
from servicekit.limits import RateLimiter
from servicekit.objects import ObjectStore
from servicekit.settings import RedisSettings
from tests.service.credits.callers import Signer
from tests.service.jobs.redis_servers import BUS_PORT_OFFSET, RedisProcess, form_cluster
from tests.service.jobs.world import HOLD_TTL_S, ScriptedInference, World

NOWHERE = "127.0.0.1:1"
"""Where nothing listens."""
PROCESS_TIMEOUT_S = 60


class Databases(Protocol):
    """The part of the shared PostgreSQL that is used here."""

    def create_database(self) -> str:
        """URL of a fresh, empty database."""
        ...


def migrated(postgres: Databases, package: str) -> str:
    """A database with the schema of a service in it, by the command an operator runs."""
    url = postgres.create_database()
    environment = {**os.environ, "GENMESH_DATABASE_URL": url}
    subprocess.run([sys.executable, "-m", package, "migrate"], env=environment, check=True, timeout=PROCESS_TIMEOUT_S)
    return url


@pytest.fixture(scope="session")
def jobs_database(postgres: Databases) -> str:
    """jobs_service's database."""
    return migrated(postgres, "jobs_service")


@pytest.fixture(scope="session")
def credits_database(postgres: Databases) -> str:
    """credit_service's database."""
    return migrated(postgres, "credit_service")


@pytest_asyncio.fixture(scope="session")
async def credits_address(credits_database: str, certificates: Path, credits_signer: Signer) -> AsyncIterator[str]:
    """A running credit_service with its own database."""
    settings = CreditSettings.model_validate({"database_url": credits_database, "certificates_dir": certificates, "drain_s": 0})
    engine = credits_app.create_engine(settings)
    deps = credits_app.Dependencies(
        engine=engine, door=Doorkeeper(credits_signer), feed=BalanceFeed(engine)
    )  # nobody here watches a balance
    server = credits_app.build_server(settings, deps)
    try:
        async with server.running(*credits_app.GRPC_SERVICES):
            yield f"127.0.0.1:{server.port}"
    finally:
        await engine.dispose()


@pytest.fixture(scope="session")
def credits_signer() -> Signer:
    """Signs the access tokens that credit_service believes."""
    return Signer()


@pytest.fixture
def settings(jobs_database: str, redis_url: str, certificates: Path, credits_address: str) -> DispatchSettings:
    """Settings of a dispatcher, with keys of its own in a database of Redis that these tests may empty."""
    return DispatchSettings.model_validate(
        {
            "database_url": jobs_database,
            "redis_url": redis_url.removesuffix("/0") + "/5",
            "redis_prefix": f"t{secrets.token_hex(6)}",
            "certificates_dir": certificates,
            "credits_address": credits_address,
            "inference_address": NOWHERE,
            "s3_endpoint_url": f"http://{NOWHERE}",
            "s3_access_key_id": "unused",
            "s3_secret_access_key": "unused",
            "worker_id": "worker-1",
            "lease_seconds": 1.0,
            "max_attempts": 2,
            "drain_s": 0,
            "database_pool_size": 10,
        }
    )


@pytest_asyncio.fixture
async def engine(settings: DispatchSettings) -> AsyncIterator[AsyncEngine]:
    """The service's engine over empty tables."""
    engine = database.create_engine(settings, schema="jobs", application="test")
    async with engine.begin() as connection:
        await connection.execute(sa.text("TRUNCATE " + ", ".join(table.name for table in metadata.sorted_tables)))
    yield engine
    await engine.dispose()


@pytest_asyncio.fixture
async def client(settings: DispatchSettings) -> AsyncIterator["redis.Redis"]:
    """A client of Redis, whose database is emptied after the test."""
    client = streams.connect(settings, blocking=True)
    yield client
    await client.flushdb()
    await client.aclose()


@pytest_asyncio.fixture
async def rates(settings: DispatchSettings) -> AsyncIterator[RateLimiter]:
    """Rates counted in Redis."""
    rates = RateLimiter(settings)
    yield rates
    await rates.aclose()


@pytest_asyncio.fixture
async def no_redis(settings: DispatchSettings) -> AsyncIterator["redis.Redis"]:
    """A client of a Redis that is down."""
    client = streams.connect(RedisSettings.model_validate({"redis_url": f"redis://{NOWHERE}/0"}))
    yield client
    await client.aclose()


@pytest_asyncio.fixture(scope="session")
async def credits_channel(credits_address: str, certificates: Path, jobs_database: str) -> AsyncIterator[grpc.aio.Channel]:
    """jobs_service's channel to credit_service."""
    settings = CreditSettings.model_validate({"database_url": jobs_database, "certificates_dir": certificates})
    async with mesh_channel(settings, credits_address, caller="jobs_service", service="credit_service") as channel:
        yield channel


@pytest.fixture
def ledger(credits_channel: grpc.aio.Channel) -> Ledger:
    """The ledger, as jobs_service sees it."""
    return Ledger(credits_channel, timeout_s=5, hold_ttl_s=HOLD_TTL_S)


@pytest.fixture
def media(settings: DispatchSettings) -> Iterator[ObjectStore]:
    """A media store that is away, but for tests that bring one."""
    with ObjectStore(settings) as store:
        yield store


@pytest_asyncio.fixture
async def no_ledger() -> AsyncIterator[Ledger]:
    """A ledger that cannot be reached."""
    async with grpc.aio.insecure_channel(NOWHERE) as channel:
        yield Ledger(channel, timeout_s=1, hold_ttl_s=HOLD_TTL_S)


Balance = Callable[[uuid.UUID], Awaitable[tuple[int, int]]]
Fund = Callable[[uuid.UUID, int], Awaitable[None]]


@pytest_asyncio.fixture(scope="session")
async def edge_channel_to_credits(credits_address: str, certificates: Path, jobs_database: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel as Envoy has it, which carries the calls of people."""
    settings = CreditSettings.model_validate({"database_url": jobs_database, "certificates_dir": certificates})
    async with mesh_channel(settings, credits_address, caller="envoy", service="credit_service") as channel:
        yield channel


@pytest.fixture
def fund(edge_channel_to_credits: grpc.aio.Channel, credits_signer: Signer) -> Fund:
    """Grants credits to a user."""
    stub = credits_pb2_grpc.LedgerAdminServiceStub(edge_channel_to_credits)

    async def grant(user_id: uuid.UUID, amount_millicredits: int) -> None:
        request = credits_pb2.GrantCreditsRequest(
            request_id=str(uuid.uuid4()), user_id=str(user_id), amount_millicredits=amount_millicredits, reason="test"
        )
        await stub.GrantCredits(request, metadata=credits_signer.metadata(uuid.uuid4(), "admin"))  # pyright: ignore[reportGeneralTypeIssues]

    return grant


@pytest.fixture
def balance(edge_channel_to_credits: grpc.aio.Channel, credits_signer: Signer) -> Balance:
    """(available, reserved) of a user."""
    stub = credits_pb2_grpc.CreditsServiceStub(edge_channel_to_credits)

    async def ask(user_id: uuid.UUID) -> tuple[int, int]:
        metadata = credits_signer.metadata(user_id)
        response = await stub.GetBalance(credits_pb2.GetBalanceRequest(), metadata=metadata)  # pyright: ignore[reportGeneralTypeIssues]
        return response.available_millicredits, response.reserved_millicredits

    return ask


@pytest_asyncio.fixture
async def world(
    engine: AsyncEngine,
    client: "redis.Redis",
    ledger: Ledger,
    media: ObjectStore,
    settings: DispatchSettings,
    rates: RateLimiter,
    fund: Fund,
) -> World:
    """jobs_service over real stores, with an owner who has 1,000 millicredits."""
    world = World(engine, client, ledger, media, settings, rates)
    await fund(world.owner, 1000)
    return world


@pytest_asyncio.fixture
async def inference() -> AsyncIterator[tuple[ScriptedInference, grpc.aio.Channel]]:
    """A scripted inference_service and a channel to it."""
    scripted = ScriptedInference()
    async with scripted.serving() as channel:
        yield scripted, channel


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[list[int]]:
    """Free ports, of which the ports of a cluster's bus are free too."""
    with hold_block(None, tmp_path) as block:
        candidates = [block.port(str(number)) for number in range(20)]
        yield [port for port in candidates if is_free(port + BUS_PORT_OFFSET)]


@pytest_asyncio.fixture
async def own_redis(tmp_path: Path, ports: list[int]) -> AsyncIterator[RedisProcess]:
    """A Redis that may be killed."""
    process = RedisProcess(tmp_path / "redis", ports[0])
    try:
        await process.start()
        yield process
    finally:
        process.kill()


@pytest_asyncio.fixture
async def redis_cluster(tmp_path: Path, ports: list[int]) -> AsyncIterator[list[RedisProcess]]:
    """Three masters that share the slots."""
    nodes = [RedisProcess(tmp_path / f"node{number}", port, "--cluster-enabled", "yes") for number, port in enumerate(ports[:3])]
    try:
        await form_cluster(nodes)
        yield nodes
    finally:
        for node in nodes:
            node.kill()
