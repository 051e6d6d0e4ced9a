"""One stack for all fault tests: two replicas, a short lease. After every test, the invariants are checked over everything in it."""

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import User, image
from tests.faults import invariants
from tests.faults.mesh import Mesh, new_channel, running
from tests.faults.witness import Witness

SLOW_STEPS = 40
"""About two seconds: long enough to be met in the middle."""

NewWitness = Callable[..., Awaitable[Witness]]


def quick() -> jobs_pb2.JobSpec:
    """A job of a quarter of a second."""
    return image(width=64, height=64, steps=3)


def slow(prompt: str = "a slow tiger") -> jobs_pb2.JobSpec:
    """A job that runs long enough for something to happen to it."""
    return image(prompt, width=64, height=64, steps=SLOW_STEPS)


def very_slow() -> jobs_pb2.JobSpec:
    """A job that outlasts a lease many times."""
    return image(width=128, height=128, steps=100, image_count=8)


@pytest_asyncio.fixture(scope="session")
async def mesh(data_dir: Path) -> AsyncIterator[Mesh]:
    """The stack of all fault tests."""
    async with running(data_dir / "faults") as started:
        yield started


# Of modules, not of the session: an access token lives for 15 minutes.
@pytest_asyncio.fixture(scope="module")
async def alice(mesh: Mesh) -> User:
    """A user with plenty of credits."""
    return await mesh.new_user()


@pytest.fixture
def witnesses() -> list[Witness]:
    """Watchers of this test; what they saw is checked after it."""
    return []


@pytest_asyncio.fixture
async def witness(mesh: Mesh, witnesses: list[Witness]) -> AsyncIterator[NewWitness]:
    """Begins to watch jobs of a user, on a connection of its own."""
    channels: list[grpc.aio.Channel] = []

    async def watch(user: User, *job_ids: str) -> Witness:
        channels.append(new_channel(mesh.stack))
        begun = Witness(user, *job_ids, channel=channels[-1])
        witnesses.append(begun)
        begun.start()
        await begun.until(lambda: bool(begun.messages))
        return begun

    yield watch
    for begun in witnesses:
        await begun.stop()
    for channel in channels:
        await channel.close()


@pytest_asyncio.fixture(autouse=True)
async def sound(mesh: Mesh, witness: NewWitness, witnesses: list[Witness]) -> AsyncIterator[None]:  # in this order: they watch on
    """Whatever a test did: afterwards all that was asked for has ended, and every invariant holds."""
    await mesh.well()
    yield
    mesh.controls.heal()
    await mesh.well()
    left = await invariants.drained(mesh)
    assert not left, left
    rows = {str(row["job_id"]): row["state"] for row in await mesh.patiently_sql("SELECT job_id, state FROM jobs.jobs")}
    for watching in witnesses:
        if watching.failure is not None:
            raise watching.failure
        # The last events may still be on their way to it; one that watched a part of the time knows what it knows.
        if watching.done:
            continue
        await watching.until(lambda: all(rows.get(job_id, state) == state for job_id, state in watching.states().items()))  # noqa: B023
    violations = await invariants.check(mesh, witnesses)
    assert not violations, "\n".join(violations)
