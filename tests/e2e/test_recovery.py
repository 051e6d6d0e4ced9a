"""Two processes killed in the middle of a job: the job is done all the same, paid once, and its watcher misses nothing.

More of this kind is the business of the fault tests.
"""

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from itertools import pairwise

import grpc

from cli.stack import Health
from genmesh.credits.v1 import credits_pb2
from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import DEADLINE_S, POLL_S, Edge, Refusal, User, Watched, ended, image

BROKEN = {(grpc.StatusCode.UNAVAILABLE, ""), (grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"), (grpc.StatusCode.INTERNAL, "")}
"""How a client hears of a service that is away: a new stream finds nobody; one that was running is reset, which gRPC calls INTERNAL."""
SLOW = image(width=128, height=128, steps=40)


def kill(edge: Edge, name: str) -> int:
    """SIGKILL a process; how often it had been restarted before."""
    process = edge.stack.process(name)
    assert process.pid is not None
    restarts = process.restarts
    os.kill(process.pid, signal.SIGKILL)
    return restarts


async def is_back(edge: Edge, name: str, restarts: int) -> None:
    """Wait until the supervisor has it running again."""
    async with asyncio.timeout(DEADLINE_S):
        await edge.stack.until(lambda: edge.stack.process(name).restarts > restarts and edge.stack.process(name).health is Health.HEALTHY)


def check_numbers(events: list[jobs_pb2.JobEvent]) -> None:
    assert all(after.sequence == before.sequence + 1 for before, after in pairwise(events)), [event.sequence for event in events]
    assert [ended(event) for event in events] == [False] * (len(events) - 1) + [True]


async def check_paid_once(user: User, job: jobs_pb2.Job, before: int) -> None:
    assert job.state == jobs_pb2.STATE_COMPLETED, job.error
    assert job.cost_millicredits == job.estimated_cost_millicredits
    assert await user.balance() == (before - job.cost_millicredits, 0)
    kinds = [(entry.kind, entry.account) for entry in await user.entries(job.job_id)]
    assert kinds == [
        (credits_pb2.Entry.KIND_RESERVE, credits_pb2.Entry.ACCOUNT_AVAILABLE),
        (credits_pb2.Entry.KIND_RESERVE, credits_pb2.Entry.ACCOUNT_RESERVED),
        (credits_pb2.Entry.KIND_CAPTURE, credits_pb2.Entry.ACCOUNT_RESERVED),
    ]


async def test_a_job_outlives_its_dispatcher(edge: Edge, alice: User) -> None:
    before, _ = await alice.balance()
    job = await alice.submit(SLOW)
    watched = Watched()
    restarts: int | None = None
    async for message in alice.watch(job.job_id):
        watched.messages.append(message)
        if restarts is None and watched.steps and watched.steps[-1] >= 3:
            restarts = kill(edge, "dispatch-0")
    assert restarts is not None

    check_numbers(watched.events)
    attempts = [event.attempt for event in watched.events]
    assert attempts == sorted(attempts)
    assert attempts[-1] == 2
    told = [(event.attempt, event.progress.step) for event in watched.events if event.progress.stage == jobs_pb2.STAGE_DENOISING]
    assert max(step for attempt, step in told if attempt == 1) < 40
    assert max(step for attempt, step in told if attempt == 2) == 40
    await alice.settled()
    job = await alice.job(job.job_id)
    assert (job.attempt, job.receipt.steps_done) == (2, 40)
    await check_paid_once(alice, job, before)
    await is_back(edge, "dispatch-0", restarts)


async def resumed(user: User, job_id: str, watched: Watched) -> AsyncGenerator[jobs_pb2.WatchJobsResponse]:
    """A watch as a client keeps it up: whenever it breaks, it is resumed with the newest token."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                async for message in user.watch(job_id, token=watched.token if watched.messages else ""):
                    watched.messages.append(message)
                    yield message
                return
            except Refusal as refusal:
                if (refusal.code, refusal.reason) not in BROKEN:
                    raise
                await asyncio.sleep(POLL_S)  # the service is on its way back; nothing else tells the client


async def test_a_watch_outlives_its_service(edge: Edge, alice: User) -> None:
    before, _ = await alice.balance()
    job = await alice.submit(image(width=128, height=128, steps=60))
    watched = Watched()
    restarts: int | None = None
    steps_before = 0
    async for _ in resumed(alice, job.job_id, watched):
        if restarts is None and watched.steps and watched.steps[-1] >= 3:
            steps_before = watched.steps[-1]
            restarts = kill(edge, "jobs")
    assert restarts is not None
    await is_back(edge, "jobs", restarts)

    assert len(watched.snapshots) == 1, "resumed, and not begun anew"
    check_numbers(watched.events)
    assert watched.steps == sorted(set(watched.steps))
    assert steps_before < watched.steps[-1] == 60
    assert {event.attempt for event in watched.events if event.HasField("progress")} == {1}, "the job itself did not notice"
    job = await alice.finished(job.job_id)
    await check_paid_once(alice, job, before)
