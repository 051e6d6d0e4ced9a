"""What can be done with jobs beside running one: batches, deletion, retries refused, the queue for administrators; by every way in."""

import uuid
from typing import Any

import grpc
import httpx
import pytest

from cli.stack import Stack
from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import (
    BATCH_CREATE_JOBS,
    DELETE_JOB,
    GET_JOB,
    GET_QUEUE_STATS,
    LIST_DEAD_LETTERS,
    REQUEUE_DEAD_LETTER,
    RETRY_JOB,
    Edge,
    Method,
    Transport,
    User,
    eventually,
    image,
    refused,
    submission,
)
from tests.e2e.conftest import PLENTY, NewUser, Occupied


@pytest.mark.parametrize("transport", Transport)
async def test_a_batch_is_all_or_nothing(new_user: NewUser, transport: Transport):
    user = await new_user(PLENTY)
    good = [submission(image(steps=1)) for _ in range(3)]
    bad = jobs_pb2.BatchCreateJobsRequest(requests=[*good, submission(image(steps=1, width=7))])
    refusal = await refused(user.call(BATCH_CREATE_JOBS, bad, transport))
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["requests[3].spec.image.width"])
    twice = jobs_pb2.BatchCreateJobsRequest(requests=[good[0], good[0]])
    assert (await refused(user.call(BATCH_CREATE_JOBS, twice, transport))).fields == ["requests"]
    none = await refused(user.call(BATCH_CREATE_JOBS, jobs_pb2.BatchCreateJobsRequest(), transport))
    assert none.fields == ["requests"]
    assert await user.balance() == (PLENTY, 0)
    assert await user.jobs() == []

    batch = jobs_pb2.BatchCreateJobsRequest(requests=good)
    accepted = (await user.call(BATCH_CREATE_JOBS, batch, transport)).jobs
    again = (await user.call(BATCH_CREATE_JOBS, batch, transport)).jobs
    assert [job.job_id for job in again] == [job.job_id for job in accepted]
    await user.watch_to_end(*(job.job_id for job in accepted))
    left, _ = await user.settled()
    ended = await user.jobs()
    assert {job.state for job in ended} == {jobs_pb2.STATE_COMPLETED}
    assert PLENTY - left == sum(job.cost_millicredits for job in ended) == sum(job.estimated_cost_millicredits for job in accepted)


async def test_a_batch_nobody_can_pay_leaves_nothing(new_user: NewUser):
    user = await new_user(PLENTY)
    price = (await user.submit(image(steps=1))).estimated_cost_millicredits
    poor = await new_user(2 * price)
    batch = jobs_pb2.BatchCreateJobsRequest(requests=[submission(image(steps=1)) for _ in range(3)])
    refusal = await refused(poor.call(BATCH_CREATE_JOBS, batch))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INSUFFICIENT_CREDITS")
    assert (await poor.balance(), await poor.jobs()) == ((2 * price, 0), [])


@pytest.mark.parametrize("transport", Transport)
async def test_a_deleted_job_is_gone_with_its_media(alice: User, stack: Stack, transport: Transport):
    job = await alice.finished((await alice.submit(image(steps=1))).job_id)
    async with httpx.AsyncClient() as client:
        sizes = [len((await client.get(asset.url)).content) for asset in job.assets]
        receipt = (await alice.call(DELETE_JOB, jobs_pb2.DeleteJobRequest(job_id=job.job_id), transport)).receipt
        assert (receipt.job_id, receipt.object_count, receipt.size_bytes) == (job.job_id, len(sizes), sum(sizes))
        assert (receipt.media_pending, receipt.delete_time.seconds > 0) == (False, True)
        assert {(await client.get(asset.url)).status_code for asset in job.assets} == {404}
    methods: list[Method[Any, Any]] = [GET_JOB, DELETE_JOB, RETRY_JOB]
    for method in methods:
        assert (await refused(alice.call(method, method.request(job_id=job.job_id), transport))).code is grpc.StatusCode.NOT_FOUND
    assert job.job_id not in {other.job_id for other in await alice.jobs()}
    # The ledger forgets nothing.
    assert await alice.entries(job.job_id)


@pytest.mark.parametrize("transport", Transport)
async def test_an_unfinished_job_is_neither_deleted_nor_retried(alice: User, occupied: Occupied, transport: Transport):
    async with occupied():
        job = await alice.submit(image(steps=1))
        refusals: dict[str, Method[Any, Any]] = {"JOB_NOT_TERMINAL": DELETE_JOB, "JOB_NOT_FAILED": RETRY_JOB}
        for reason, method in refusals.items():
            refusal = await refused(alice.call(method, method.request(job_id=job.job_id), transport))
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, reason)
            assert refusal.metadata == {"state": "STATE_PENDING"}
        await alice.cancel(job.job_id)
    refusal = await refused(alice.call(RETRY_JOB, jobs_pb2.RetryJobRequest(job_id=job.job_id), transport))
    assert (refusal.reason, refusal.metadata) == ("JOB_NOT_FAILED", {"state": "STATE_CANCELLED"})


async def test_a_waiting_job_says_what_it_waits_for(alice: User, occupied: Occupied):
    async with occupied():
        first, second = [await alice.submit(image(steps=1)) for _ in range(2)]
        waiting = (await alice.job(second.job_id)).waiting
        assert (waiting.reason, waiting.queue_position, waiting.model) == (jobs_pb2.Waiting.REASON_IN_QUEUE, 2, second.spec.image.model)
        assert waiting.message == "1 job is before it"
        assert (await alice.job(first.job_id)).waiting.message == "it is next"
        for job in (first, second):
            await alice.cancel(job.job_id)


@pytest.mark.parametrize("transport", Transport)
async def test_administrators_see_the_queue(alice: User, admin: User, occupied: Occupied, transport: Transport):
    async with occupied():
        job = await alice.submit(image(steps=1))

        async def pool() -> jobs_pb2.PoolStats:
            stats = await admin.call(GET_QUEUE_STATS, jobs_pb2.GetQueueStatsRequest(), transport)
            return next(pool for pool in stats.pools if pool.workers)

        found = await eventually(pool, lambda pool: pool.running_count == 1)
        assert [level.priority for level in found.levels] == [jobs_pb2.PRIORITY_PRO, jobs_pb2.PRIORITY_FREE]
        assert [level.waiting_count for level in found.levels] == [0, 1]
        assert (found.levels[1].owner_count, found.levels[1].oldest_wait_seconds > 0) == (1, True)
        assert [(worker.worker_id, worker.slot_count) for worker in found.workers] == [("dispatch-0", 1)]
        await alice.cancel(job.job_id)
    assert (await admin.call(LIST_DEAD_LETTERS, jobs_pb2.ListDeadLettersRequest(fingerprint="0" * 16), transport)).dead_letters == []
    nothing = jobs_pb2.RequeueDeadLetterRequest(fingerprint="0" * 16)
    assert (await admin.call(REQUEUE_DEAD_LETTER, nothing, transport)).job_ids == []
    unknown = jobs_pb2.RequeueDeadLetterRequest(job_id=str(uuid.uuid4()))
    assert (await refused(admin.call(REQUEUE_DEAD_LETTER, unknown, transport))).code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("transport", Transport)
async def test_others_do_not(alice: User, edge: Edge, transport: Transport):
    methods: list[Method[Any, Any]] = [GET_QUEUE_STATS, LIST_DEAD_LETTERS, REQUEUE_DEAD_LETTER]
    for method in methods:
        refusal = await refused(alice.call(method, method.request(), transport))
        assert refusal.code is grpc.StatusCode.PERMISSION_DENIED, method.path
        assert (await refused(edge.call(method, method.request(), "", transport))).code is grpc.StatusCode.UNAUTHENTICATED
