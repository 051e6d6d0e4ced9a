"""Watchers come and go, read nothing, lose their token, outlive every service: each still sees how its jobs end, once."""

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import psutil
import pytest

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import WATCH_JOBS, Refusal, User, bearer, eventually
from tests.faults.conftest import NewWitness, quick, slow
from tests.faults.mesh import STREAMS_A_CHANNEL, Mesh, new_channel
from tests.faults.witness import Witness

WATCHERS = int(os.environ.get("GENMESH_TEST_WATCHERS", "200"))
CONNECTS = int(os.environ.get("GENMESH_TEST_CONNECTS", "3000"))
SERVICES = ("jobs", "relay", "credits", "gateway", "dispatch-0", "dispatch-1", "envoy")
"""All but the replicas, whose models take long to load; they have tests of their own."""
AT_ONCE = 50
SUBMIT_INTERVAL_S = 0.5
SILENT_WATCHES = 20
GROWTH_BYTES = 24 * 1024 * 1024
"""What a process may gain over thousands of calls: allocators keep what they once needed, leaks would take far more."""


@asynccontextmanager
async def channels(mesh: Mesh, streams: int) -> AsyncGenerator[list[grpc.aio.Channel]]:
    """Enough connections for so many streams."""
    opened = [new_channel(mesh.stack) for _ in range(-(-streams // STREAMS_A_CHANNEL))]
    try:
        yield opened
    finally:
        for channel in opened:
            await channel.close()


async def test_every_service_is_restarted_under_watchers_and_submits(mesh: Mesh, witnesses: list[Witness]) -> None:
    users = [await mesh.new_user() for _ in range(4)]
    jobs: list[tuple[User, jobs_pb2.Job]] = []
    done = asyncio.Event()

    async def submit(user: User) -> None:
        while not done.is_set():
            jobs.append((user, await mesh.submit(user, quick())))
            await asyncio.sleep(SUBMIT_INTERVAL_S)

    async with channels(mesh, WATCHERS) as connections:
        watching = [Witness(users[index % len(users)], channel=connections[index // STREAMS_A_CHANNEL]) for index in range(WATCHERS)]
        witnesses += watching
        for witness in watching:
            witness.start()
        for witness in watching:
            await witness.until(lambda: bool(witness.messages))  # noqa: B023
        submits = [asyncio.create_task(submit(user)) for user in users]
        for name in SERVICES:
            await mesh.controls.restart(name)
        done.set()
        await asyncio.gather(*submits)
        for witness in watching:
            await witness.ended(*(job.job_id for user, job in jobs if user is witness.user))
        for witness in watching:
            await witness.stop()
    assert all(witness.reconnects for witness in watching)
    assert len(jobs) > len(SERVICES)
    for _, job in jobs:
        assert (await mesh.row(job.job_id))["state"] == jobs_pb2.STATE_COMPLETED


@pytest.mark.parametrize("name", ["jobs", "envoy", "redis"])
async def test_a_watch_is_broken_again_and_again(mesh: Mesh, alice: User, witness: NewWitness, name: str) -> None:
    job = await mesh.submit(alice, slow())
    watching = await witness(alice, job.job_id)
    for step in (5, 15):
        await watching.progressed(job.job_id, step)
        await mesh.controls.restart(name)
    await watching.ended()
    assert watching.reconnects or name == "redis"
    if name != "redis":
        sequences = [event.sequence for event in watching.events]
        assert sequences == list(range(sequences[0], sequences[0] + len(sequences))), "nothing is missing in between"


async def test_watches_that_are_dropped_all_the_time(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    job = await mesh.submit(alice, slow())
    stays, comes_and_goes = await witness(alice, job.job_id), await witness(alice, job.job_id)

    async def drop() -> None:
        while True:
            count = len(comes_and_goes.messages)
            await comes_and_goes.until(lambda: len(comes_and_goes.messages) > count)  # noqa: B023
            comes_and_goes.drop()

    dropping = asyncio.create_task(drop())
    await stays.ended()
    dropping.cancel()
    await comes_and_goes.ended()
    assert comes_and_goes.reconnects > 10
    first = comes_and_goes.events[0].sequence
    assert [event.sequence for event in comes_and_goes.events] == [event.sequence for event in stays.events if event.sequence >= first]


async def test_a_watcher_that_does_not_read(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    reads = await witness(alice)
    pid = mesh.controls.pid("jobs")
    assert pid is not None
    async with channels(mesh, SILENT_WATCHES) as connections:
        stub = connections[0].unary_stream(
            WATCH_JOBS.path,
            request_serializer=jobs_pb2.WatchJobsRequest.SerializeToString,
            response_deserializer=jobs_pb2.WatchJobsResponse.FromString,
        )
        calls = [stub(jobs_pb2.WatchJobsRequest(), metadata=tuple(bearer(alice.token).items())) for _ in range(SILENT_WATCHES)]
        for call in calls:
            await call.read()  # it has begun; from here on nobody reads
        before = psutil.Process(pid).memory_info().rss
        jobs = [await mesh.submit(alice, quick()) for _ in range(20)]
        await reads.ended(*(job.job_id for job in jobs))  # the others are not held up
        assert psutil.Process(pid).memory_info().rss - before < GROWTH_BYTES
        # Once they read again, they hear how everything ended.
        for call in calls:
            left = {job.job_id for job in jobs}
            async with asyncio.timeout(60):
                while left:
                    message: Any = await call.read()
                    state = message.event.state_change.state if message.HasField("event") else message.snapshot.state
                    if state >= jobs_pb2.STATE_COMPLETED:
                        left.discard(message.event.job_id or message.snapshot.job_id)
            call.cancel()


async def test_the_access_token_ends_during_a_watch(mesh: Mesh, alice: User, witness: NewWitness) -> None:
    whole = await witness(alice)
    job = await mesh.submit(alice, slow())
    seen: list[jobs_pb2.WatchJobsResponse] = []
    ends = 0
    while not any(message.event.state_change.state >= jobs_pb2.STATE_COMPLETED for message in seen):
        short = mesh.until(alice, 1.0)
        try:
            async for message in short.watch(job.job_id, token=seen[-1].resume_token if seen else ""):
                seen.append(message)  # noqa: PERF401  # what was seen before it broke counts
        except Refusal as refusal:
            assert refusal.code is grpc.StatusCode.UNAUTHENTICATED  # noqa: PT017
            ends += 1
    await whole.ended(job.job_id)
    assert ends >= 1
    told = [message.event.sequence for message in seen if message.HasField("event")]
    assert told == [event.sequence for event in whole.events if event.job_id == job.job_id and event.sequence >= told[0]]


async def test_silence_does_not_end_a_watch(mesh: Mesh, witness: NewWitness) -> None:
    """Checkpoints keep it open; their interval is short here, so that many of them stand for ten minutes."""
    user = await mesh.new_user(0)
    watching = await witness(user)
    await watching.until(lambda: len(watching.messages) >= 10)
    assert watching.reconnects == 0
    assert all(message.HasField("checkpoint") for message in watching.messages)


async def test_watches_leave_nothing_behind(mesh: Mesh, alice: User) -> None:
    pid = mesh.controls.pid("jobs")
    assert pid is not None
    process = psutil.Process(pid)
    job = await mesh.submit(alice, slow())
    await mesh.until_row(job.job_id, lambda row: row["state"] >= jobs_pb2.STATE_COMPLETED)
    async with channels(mesh, AT_ONCE) as connections:
        stub = connections[0].unary_stream(
            WATCH_JOBS.path,
            request_serializer=jobs_pb2.WatchJobsRequest.SerializeToString,
            response_deserializer=jobs_pb2.WatchJobsResponse.FromString,
        )

        cut = 0

        async def connect(read: bool) -> None:
            nonlocal cut
            call = stub(jobs_pb2.WatchJobsRequest(), metadata=tuple(bearer(alice.token).items()))
            try:
                if read:
                    await call.read()
            except grpc.aio.AioRpcError as error:
                # Envoy closes a connection on which most streams are reset early; the next stream opens another one.
                assert error.code() is grpc.StatusCode.UNAVAILABLE  # noqa: PT017
                cut += 1
            finally:
                call.cancel()

        async def cycles(count: int) -> None:
            for start in range(0, count, AT_ONCE):
                # Half of them go before the first message has come.
                await asyncio.gather(*(connect(index % 2 == 0) for index in range(start, start + AT_ONCE)))

        await cycles(CONNECTS // 10)
        before, descriptors = process.memory_info().rss, process.num_fds()
        await cycles(CONNECTS)
        assert cut < CONNECTS / 4
        await eventually(lambda: watchers_open(mesh), lambda count: count == 0)
        assert process.memory_info().rss - before < GROWTH_BYTES
        # The pool of Redis connections may have grown to as many as there were calls at once; a leak would be of thousands.
        assert process.num_fds() <= descriptors + AT_ONCE
        assert mesh.controls.pid("jobs") == pid


async def watchers_open(mesh: Mesh) -> int:
    """What the service itself counts."""
    async with httpx.AsyncClient() as http:
        page = (await http.get(f"http://{mesh.stack.process('jobs').metrics_address}/metrics")).text
    return next(int(float(line.split()[1])) for line in page.splitlines() if line.startswith("genmesh_watchers "))
