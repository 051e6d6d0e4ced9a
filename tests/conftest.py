"""Real parts for every level of tests: PostgreSQL, Redis, S3, certificates, and the whole stack behind Envoy.

Each starts when a test first asks for it and ends with the session, also when tests fail.
"""

import asyncio
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import pytest_asyncio

from cli.stack import Stack, StackSettings, parts
from cli.stack.certificates import ensure_certificates
from cli.stack.ports import PortBlock, hold_block
from cli.stack.postgres import Postgres
from cli.stack.supervisor import Supervisor

LEASE_SECONDS = 2
"""Short, so that tests of lost workers are quick; long enough for a busy machine."""
MANY = 100_000
CHECKPOINT_INTERVAL_S = 0.5
"""Short, so that a watcher hears at once that there is nothing to hear."""


class PostgresServer:
    """A running PostgreSQL whose data is thrown away."""

    def __init__(self, server: Postgres) -> None:
        self._server = server

    def create_database(self) -> str:
        """SQLAlchemy URL (asyncpg) of a fresh, empty database, with a fresh role that owns it."""
        name = f"test_{secrets.token_hex(6)}"
        password = secrets.token_urlsafe(16)

        async def create() -> None:
            async with self._server.connection() as connection:
                await connection.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{password}'")
                await connection.execute(f"CREATE DATABASE {name} OWNER {name} STRATEGY file_copy")

        # Called from tests with a running loop and from tests without one: the statements run in a loop of their own.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, create()).result()
        return self._server.sqlalchemy_url(name, name, password)


@pytest.fixture(scope="session")
def data_dir() -> Iterator[Path]:
    """Where data of PostgreSQL may lie. Not below pytest's own directory: under root, PostgreSQL runs as another user, whom
    every start of a pytest, also of another one on the machine, locks out of there."""
    with tempfile.TemporaryDirectory(prefix="genmesh-test-") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def parts_dir(data_dir: Path) -> Path:
    """Where the data of the parts lies."""
    directory = data_dir / "parts"
    directory.mkdir()
    return directory


@pytest.fixture(scope="session")
def port_block(parts_dir: Path) -> Iterator[PortBlock]:
    """Ports that are ours for the session."""
    with hold_block(None, parts_dir) as block:
        yield block


@pytest_asyncio.fixture(scope="session")
async def part_supervisor(parts_dir: Path) -> AsyncIterator[Supervisor]:
    """Keeps the parts running, and ends them."""
    logs_dir = parts_dir / "logs"
    logs_dir.mkdir()
    supervisor = Supervisor(logs_dir)
    yield supervisor
    await supervisor.stop()


@pytest_asyncio.fixture(scope="session")
async def postgres(part_supervisor: Supervisor, parts_dir: Path, port_block: PortBlock) -> PostgresServer:
    """PostgreSQL; `create_database()` gives a fresh database."""
    directory = parts_dir / "postgres"
    directory.mkdir(mode=0o700)
    server = Postgres(directory, port_block.port("postgres"), secrets.token_urlsafe(16), durable=False)
    await part_supervisor.start([server.spec()])
    return PostgresServer(server)


@pytest_asyncio.fixture(scope="session")
async def redis_url(part_supervisor: Supervisor, parts_dir: Path, port_block: PortBlock) -> str:
    """URL of a Redis of the session. Tests share it: each takes a random prefix."""
    directory = parts_dir / "redis"
    directory.mkdir(mode=0o700)
    port, password = port_block.port("redis"), secrets.token_urlsafe(16)
    await part_supervisor.start([parts.redis_spec(directory, port, password, durable=False)])
    return parts.redis_url(port, password)


@pytest_asyncio.fixture(scope="session")
async def s3(part_supervisor: Supervisor, parts_dir: Path, port_block: PortBlock) -> dict[str, str]:
    """GENMESH_S3_… variables of a store of the session, whose bucket exists."""
    directory = parts_dir / "objects"
    directory.mkdir(mode=0o700)
    port, key_id, key = port_block.port("s3"), secrets.token_hex(10), secrets.token_hex(20)
    await part_supervisor.start([parts.s3_spec(directory, port, key_id, key)])
    return parts.s3_environment(port, key_id, key)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificates directory with every member of the mesh."""
    directory = tmp_path_factory.mktemp("certificates")
    ensure_certificates(directory, tmp_path_factory.mktemp("authority"))
    return directory


@pytest_asyncio.fixture(scope="session")
async def stack(data_dir: Path) -> AsyncIterator[Stack]:
    """The whole embedded stack through Envoy, on ports that are free."""
    settings = StackSettings(state_dir=data_dir / "stack", edge_port=0, edge_tls_port=0)
    environment = {
        "GENMESH_LEASE_SECONDS": str(LEASE_SECONDS),
        "GENMESH_CHECKPOINT_INTERVAL_S": str(CHECKPOINT_INTERVAL_S),
        # All users of all tests come from one address.
        "GENMESH_REGISTRATIONS_MAX": str(MANY),
        "GENMESH_SIGN_IN_CLIENT_FAILURES_MAX": str(MANY),
        "GENMESH_SIGN_INS_MAX": str(MANY),
        "GENMESH_PASSWORD_HASH_CLIENT_MAX": "64",
    }
    async with Stack(settings, environment=environment).running() as running:
        yield running
