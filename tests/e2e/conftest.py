"""Users of one running stack. The stack is shared by all end-to-end tests; what a test may change belongs to its own users."""

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager

import grpc
import httpx
import pytest
import pytest_asyncio

from cli.stack import Stack
from genmesh.credits.v1 import credits_pb2
from genmesh.identity.v1 import identity_pb2
from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import DEADLINE_S, GRANT_CREDITS, PASSWORD, REGISTER_USER, SIGN_IN, Edge, User, image

PLENTY = 10_000_000
"""Millicredits of users that are not about credits."""

NewUser = Callable[[int], Awaitable[User]]
Occupied = Callable[[], AbstractAsyncContextManager[jobs_pb2.Job]]


@pytest_asyncio.fixture(scope="session")
async def edge(stack: Stack) -> AsyncIterator[Edge]:
    """The public door, with one HTTP/2 connection for gRPC and HTTP/1.1 for the rest."""
    async with (
        grpc.aio.insecure_channel(stack.edge_address) as channel,
        httpx.AsyncClient(base_url=stack.edge_url, timeout=DEADLINE_S) as http,
    ):
        yield Edge(stack, channel, http)


async def sign_in(edge: Edge, email: str, password: str) -> User:
    """Sign in."""
    credential = identity_pb2.PasswordCredential(email=email, password=password)
    session = await edge.call(SIGN_IN, identity_pb2.SignInRequest(password=credential))
    return User(edge, session.user.user_id, email, session.access_token, session.refresh_token)


# Of modules, not of the session: an access token lives for 15 minutes, all tests together may take longer.
@pytest_asyncio.fixture(scope="module")
async def admin(edge: Edge) -> User:
    """The first administrator."""
    return await sign_in(edge, edge.stack.admin_email, edge.stack.admin_password)


@pytest_asyncio.fixture(scope="module")
async def new_user(edge: Edge, admin: User) -> NewUser:
    """Makes users with so many millicredits."""

    async def make(millicredits: int) -> User:
        email = f"{uuid.uuid4().hex}@example.com"
        await edge.call(REGISTER_USER, identity_pb2.RegisterUserRequest(email=email, password=PASSWORD))
        user = await sign_in(edge, email, PASSWORD)
        if millicredits:
            await admin.call(
                GRANT_CREDITS,
                credits_pb2.GrantCreditsRequest(
                    request_id=str(uuid.uuid4()), user_id=user.user_id, amount_millicredits=millicredits, reason="for a test"
                ),
            )
        return user

    return make


@pytest_asyncio.fixture(scope="module")
async def alice(new_user: NewUser) -> User:
    """A user with plenty of credits."""
    return await new_user(PLENTY)


@pytest_asyncio.fixture(scope="module")
async def bob(new_user: NewUser) -> User:
    """Somebody else."""
    return await new_user(PLENTY)


@pytest.fixture(scope="module")
def occupied(bob: User) -> Occupied:
    """Keeps the only slot of the mesh busy with a job of bob's while the block runs."""

    @asynccontextmanager
    async def occupy() -> AsyncGenerator[jobs_pb2.Job]:
        job = await bob.submit(image(width=128, height=128, steps=100, image_count=8))
        try:
            async with aclosing(bob.watch(job.job_id)) as messages:
                async for message in messages:
                    if message.event.HasField("progress"):
                        break
            yield job
        finally:
            await bob.cancel(job.job_id)
            await bob.watch_to_end(job.job_id)

    return occupy
