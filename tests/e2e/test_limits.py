"""What a plan allows, exercised through the edge: refused with a reason and a time, before anything is held or made."""

import asyncio
from contextlib import aclosing
from typing import Any

import grpc
import pytest

from genmesh.jobs.v1 import jobs_pb2
from jobs_service.settings import ServeSettings
from tests.e2e.caller import BATCH_CREATE_JOBS, ESTIMATE_JOB, Refusal, Transport, image, refused, submission
from tests.e2e.conftest import PLENTY, NewUser


def default(name: str) -> Any:
    """The stack of the tests sets none of these."""
    return ServeSettings.model_fields[name].default


def check(refusal: Refusal, transport: Transport | None = None) -> None:
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
    assert refusal.http_status in (None, 429)
    assert (refusal.http_status is None) == (transport is not Transport.JSON)


@pytest.mark.parametrize("transport", Transport)
async def test_open_jobs_cost_no_more_than_the_plan_allows(new_user: NewUser, transport: Transport) -> None:
    user = await new_user(PLENTY)
    dear = image(width=128, height=128, steps=100, image_count=8)
    cost = (await user.call(ESTIMATE_JOB, jobs_pb2.EstimateJobRequest(spec=dear))).cost_millicredits
    too_many = default("queued_millicredits_free") // cost + 1
    assert too_many * cost <= PLENTY, "it is not the credits that are missing"
    batch = jobs_pb2.BatchCreateJobsRequest(requests=[submission(dear) for _ in range(too_many)])
    check(await refused(user.call(BATCH_CREATE_JOBS, batch, transport)), transport)
    assert await user.balance() == (PLENTY, 0)
    assert await user.jobs() == []
    # What fits goes through.
    job = await user.submit(image(steps=1), transport)
    assert (await user.finished(job.job_id)).state == jobs_pb2.STATE_COMPLETED


async def test_watches_are_as_many_as_the_plan_allows(new_user: NewUser) -> None:
    user, somebody_else = await new_user(0), await new_user(0)
    watches = [user.watch() for _ in range(default("watches_free"))]
    try:
        await asyncio.gather(*(anext(watch) for watch in watches))  # a checkpoint: it is open
        for one_more in (user.watch, user.watch_sse):
            async with aclosing(one_more()) as messages:
                refusal = await refused(anext(messages))
            assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
        async with aclosing(somebody_else.watch()) as messages:
            await anext(messages)
    finally:
        for watch in watches:
            await watch.aclose()
