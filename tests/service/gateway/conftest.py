"""A running gateway over real PostgreSQL, reached through mTLS."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
import pytest
import pytest_asyncio
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway import app
from gateway.accounts import Accounts
from gateway.settings import GatewaySettings
from gateway.tokens import JWKS_PATH, SigningKeys
from genmesh.identity.v1 import identity_pb2_grpc
from servicekit import process
from servicekit.client import mesh_channel
from servicekit.database import migrate
from servicekit.errors import MeshError, from_rpc_error
from servicekit.settings import DatabaseSettings


class PostgresServer(Protocol):
    """The shared fixture."""

    def create_database(self) -> str:
        """URL of a fresh empty database."""
        ...


@dataclass(frozen=True)
class Gateway:
    """A running gateway, from inside and from outside."""

    settings: GatewaySettings
    deps: app.Dependencies
    engine: AsyncEngine
    keys: SigningKeys
    accounts: Accounts
    users: "identity_pb2_grpc.IdentityServiceAsyncStub"
    admin: "identity_pb2_grpc.IdentityAdminServiceAsyncStub"
    members: "identity_pb2_grpc.MembershipServiceAsyncStub"
    """As credit_service calls it."""
    port: int
    jwks_url: str


class StartGateway(Protocol):
    """Starts a gateway that ends with the test that asked for it, or, for a fixture of more than one test, with the session."""

    async def __call__(self, **settings: Any) -> Gateway:
        """`settings` override those of the tests."""
        ...


@pytest.fixture(scope="session")
def database_url(postgres: PostgresServer) -> str:
    """A migrated database; tests share it, so each makes its own accounts."""
    url = postgres.create_database()
    migrate(DatabaseSettings.model_validate({"database_url": url}), package="gateway", schema=app.SCHEMA)
    return url


@pytest_asyncio.fixture(scope="session")
async def stacks() -> AsyncGenerator[list[AsyncExitStack]]:
    """What ends a gateway that is started now, last: that of the test, or that of the session."""
    async with AsyncExitStack() as stack:
        yield [stack]


@pytest_asyncio.fixture(autouse=True)
async def _gateways_of_a_test_end_with_it(stacks: list[AsyncExitStack]) -> AsyncGenerator[None]:  # pyright: ignore[reportUnusedFunction]
    """Each has its connections to PostgreSQL, of which there are only so many."""
    async with AsyncExitStack() as stack:
        stacks.append(stack)
        yield
        stacks.pop()


@pytest_asyncio.fixture(scope="session")
async def start_gateway(
    stacks: list[AsyncExitStack], database_url: str, redis_url: str, certificates: Path, tmp_path_factory: pytest.TempPathFactory
) -> StartGateway:
    """See StartGateway."""

    async def start(**settings: Any) -> Gateway:
        stack = stacks[-1]
        values = {
            "certificates_dir": certificates,
            "database_url": database_url,
            "database_pool_size": 10,
            "signing_keys_dir": tmp_path_factory.mktemp("keys"),
            "jwks_listen_address": "127.0.0.1:0",
            "drain_s": 0,
            # Passwords as cheap as they get: their strength is not under test here.
            "password_hash_memory_kib": 1024,
            "password_hash_iterations": 1,
            "credits_address": "127.0.0.1:1",  # nobody
            "redis_url": redis_url,
            # Each gateway counts for itself, and far more than the tests of other things fail.
            "redis_prefix": f"test-{secrets.token_hex(6)}",
            "registrations_max": 100_000,
            "sign_in_client_failures_max": 100_000,
        }
        read = GatewaySettings.model_validate(values | settings)
        deps = await stack.enter_async_context(app.open_dependencies(read))
        with suppress(Exception):  # one of the gateways has no database
            await deps.revocations.poll()
        stack.push_async_callback(process.end, [asyncio.create_task(task) for task in app.background(deps)])
        jwks = stack.enter_context(app.build_jwks_server(read, deps.keys))
        server = await stack.enter_async_context(app.build_server(read, deps).running(*app.SERVICE_NAMES))
        address = f"127.0.0.1:{server.port}"
        channel = await stack.enter_async_context(mesh_channel(read, address, caller="envoy", service="gateway"))
        credits = await stack.enter_async_context(mesh_channel(read, address, caller="credit_service", service="gateway"))
        return Gateway(
            settings=read,
            deps=deps,
            engine=deps.engine,
            keys=deps.keys,
            accounts=app.build_accounts(read, deps),
            users=identity_pb2_grpc.IdentityServiceStub(channel),
            admin=identity_pb2_grpc.IdentityAdminServiceStub(channel),
            members=identity_pb2_grpc.MembershipServiceStub(credits),
            port=server.port,
            jwks_url=f"https://127.0.0.1:{jwks.port}{JWKS_PATH}",
        )

    return start


@pytest_asyncio.fixture(scope="session")
async def gateway(start_gateway: StartGateway) -> Gateway:
    """A gateway that most tests share."""
    return await start_gateway()


Refused = Callable[[Awaitable[Any]], Awaitable[MeshError]]


@pytest.fixture(scope="session")
def refused() -> Refused:
    """Waits for a call to be refused and answers with its typed error."""

    async def wait(call: Awaitable[Any]) -> MeshError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return from_rpc_error(caught.value)

    return wait
