"""Stopping a job: at once while it waits and for free, within a step while it runs and for the steps done, never after its end."""

import asyncio

import grpc
import pytest

from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import GET_JOB, Transport, User, Watched, ended, image, refused
from tests.e2e.conftest import Occupied

STEPS = 60
LEEWAY_STEPS = 3
"""Steps the model may do after the cancel was answered: the one that runs, and what a busy machine adds on the way there."""


@pytest.mark.parametrize("transport", [Transport.GRPC, Transport.JSON])
async def test_cancel_while_it_runs(alice: User, transport: Transport) -> None:
    before, _ = await alice.balance()
    job = await alice.submit(image(width=128, height=128, steps=STEPS))
    watched = Watched()
    third_step, answered = asyncio.Event(), asyncio.Event()

    async def watch() -> None:
        async for message in alice.watch(job.job_id):
            watched.messages.append(message)
            if watched.steps and watched.steps[-1] >= 3:
                third_step.set()

    async def cancel() -> tuple[jobs_pb2.Job, int]:
        await third_step.wait()
        answer = await alice.cancel(job.job_id, transport)
        seen = watched.steps[-1]
        answered.set()
        return answer, seen

    _, (answer, seen) = await asyncio.gather(watch(), cancel())
    assert answer.state == jobs_pb2.STATE_CANCELLED or answer.cancel_requested
    assert [ended(event) for event in watched.events].count(True) == 1
    assert ended(watched.events[-1])
    assert watched.events[-1].state_change.state == jobs_pb2.STATE_CANCELLED

    await alice.settled()
    ending = await alice.job(job.job_id)
    receipt, held = ending.receipt, job.estimated_cost_millicredits
    assert ending.state == jobs_pb2.STATE_CANCELLED
    assert receipt.steps_done == max(watched.steps), "what was told is what is charged"
    assert seen <= receipt.steps_done <= seen + LEEWAY_STEPS < STEPS
    assert receipt.steps_agreed == STEPS
    assert ending.cost_millicredits == receipt.captured_millicredits == held * receipt.steps_done // receipt.steps_agreed
    assert receipt.captured_millicredits + receipt.released_millicredits == held
    assert await alice.balance() == (before - ending.cost_millicredits, 0)
    assert not ending.assets

    again = await alice.cancel(job.job_id, transport)
    assert again == ending
    assert await alice.balance() == (before - ending.cost_millicredits, 0)
    # The slot is free again.
    assert (await alice.finished((await alice.submit(image(steps=1))).job_id)).state == jobs_pb2.STATE_COMPLETED


@pytest.mark.parametrize("transport", Transport)
async def test_cancel_while_it_waits(alice: User, occupied: Occupied, transport: Transport) -> None:
    before, _ = await alice.balance()
    async with occupied():
        job = await alice.submit()
        assert await alice.balance() == (before - job.estimated_cost_millicredits, job.estimated_cost_millicredits)
        watching = asyncio.create_task(alice.watch_to_end(job.job_id))
        answer = await alice.cancel(job.job_id, transport)
        assert (answer.state, answer.cost_millicredits, answer.attempt) == (jobs_pb2.STATE_CANCELLED, 0, 0)
        watched = await watching
        # The watch may have begun after the end: then the snapshot tells it.
        last = watched.events[-1].state_change.job if watched.events else watched.snapshots[-1]
        assert last.state == jobs_pb2.STATE_CANCELLED
        assert await alice.settled() == (before, 0)
        again = await alice.cancel(job.job_id, transport)
        assert (again.state, again.finish_time) == (jobs_pb2.STATE_CANCELLED, answer.finish_time)
    # What is cancelled stays so when the slot is free: the job behind it runs, this one never does.
    assert (await alice.finished((await alice.submit(image(steps=1))).job_id)).state == jobs_pb2.STATE_COMPLETED
    assert (await alice.job(job.job_id)).attempt == 0


@pytest.mark.parametrize("transport", Transport)
async def test_cancel_after_the_end(alice: User, transport: Transport) -> None:
    job = await alice.finished((await alice.submit(image(steps=1))).job_id)
    balance = await alice.balance()
    refusal = await refused(alice.cancel(job.job_id, transport))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "JOB_TERMINAL")
    assert refusal.metadata == {"state": "STATE_COMPLETED"}
    assert (await alice.job(job.job_id)).state == jobs_pb2.STATE_COMPLETED
    assert await alice.balance() == balance


async def test_many_cancels_at_once_are_one(alice: User) -> None:
    before, _ = await alice.balance()
    job = await alice.submit(image(width=128, height=128, steps=STEPS))
    answers = await asyncio.gather(*(alice.cancel(job.job_id, transport) for transport in (*Transport, *Transport)))
    assert {answer.job_id for answer in answers} == {job.job_id}
    ending = await alice.finished(job.job_id)
    assert ending.state == jobs_pb2.STATE_CANCELLED
    assert await alice.balance() == (before - ending.cost_millicredits, 0)


async def test_cancel_of_nothing(alice: User) -> None:
    for transport in Transport:
        refusal = await refused(alice.cancel("0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0001", transport))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    refusal = await refused(alice.call(GET_JOB, jobs_pb2.GetJobRequest(job_id="0198c3a4-7f0e-7d0a-9d55-1e6b4c1f0001")))
    assert refusal.code is grpc.StatusCode.NOT_FOUND
