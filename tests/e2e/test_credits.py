"""No credits, no job; every millicredit of a job is found in the ledger; only administrators give credits."""

import asyncio
import uuid

import grpc
import pytest
from google.protobuf import json_format
from google.rpc import error_details_pb2, status_pb2

from genmesh.credits.v1 import credits_pb2
from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import (
    BATCH_CREATE_JOBS,
    CREATE_JOB,
    GRANT_CREDITS,
    Method,
    Transport,
    User,
    bearer,
    image,
    refused,
    rest_form,
    submission,
)
from tests.e2e.conftest import NewUser

SET_USER_CEILING = Method(
    "/genmesh.credits.v1.LedgerAdminService/SetUserCeiling",
    credits_pb2.SetUserCeilingRequest,
    credits_pb2.SetUserCeilingResponse,
    "POST",
    "/v1/admin/ceilings",
)
AVAILABLE, RESERVED = credits_pb2.Entry.ACCOUNT_AVAILABLE, credits_pb2.Entry.ACCOUNT_RESERVED


def grant(user: User, millicredits: int, request_id: str = "") -> credits_pb2.GrantCreditsRequest:
    return credits_pb2.GrantCreditsRequest(
        request_id=request_id or str(uuid.uuid4()), user_id=user.user_id, amount_millicredits=millicredits, reason="because"
    )


@pytest.mark.parametrize("transport", Transport)
async def test_too_few_credits(new_user: NewUser, admin: User, transport: Transport) -> None:
    user = await new_user(150)
    request = submission(image(width=64, height=64, steps=4))  # 200 millicredits
    refusal = await refused(user.call(CREATE_JOB, request, transport))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INSUFFICIENT_CREDITS")
    assert refusal.metadata == {"required_millicredits": "200", "available_millicredits": "150"}
    assert [info.domain for info in refusal.infos] == ["genmesh"]
    assert refusal.http_status == (400 if transport is Transport.JSON else None)
    assert await user.balance() == (150, 0)
    assert await user.jobs() == []
    assert [entry.kind for entry in await user.entries()] == [credits_pb2.Entry.KIND_GRANT]

    await admin.call(GRANT_CREDITS, grant(user, 60), transport)
    job = (await user.call(CREATE_JOB, request, transport)).job  # the very same request, repeated
    assert (await user.finished(job.job_id)).state == jobs_pb2.STATE_COMPLETED
    assert await user.balance() == (10, 0)
    assert [one.job_id for one in await user.jobs()] == [job.job_id]


async def test_the_ledger_tells_the_story_of_a_job(new_user: NewUser) -> None:
    user = await new_user(1_000)
    job = await user.finished((await user.submit(image(width=64, height=64, steps=4))).job_id)
    cost = job.cost_millicredits
    entries = await user.entries(job.job_id)
    assert [(entry.kind, entry.account, entry.amount_millicredits, entry.balance_after_millicredits) for entry in entries] == [
        (credits_pb2.Entry.KIND_RESERVE, AVAILABLE, -cost, 1_000 - cost),
        (credits_pb2.Entry.KIND_RESERVE, RESERVED, cost, cost),
        (credits_pb2.Entry.KIND_CAPTURE, RESERVED, -cost, 0),
    ]
    assert {(entry.job_id, entry.model) for entry in entries} == {(job.job_id, job.spec.image.model)}
    description = f"{job.spec.image.model}, 64×64, 1 picture"  # noqa: RUF001
    paid = credits_pb2.ReceiptLine(description=description, quantity=4, unit="step", amount_millicredits=cost)
    assert [list(entry.lines) for entry in entries] == [[], [], [paid]]
    grants = [entry for entry in await user.entries() if entry not in entries]
    assert [(entry.kind, entry.account, entry.amount_millicredits, entry.job_id) for entry in grants] == [
        (credits_pb2.Entry.KIND_GRANT, AVAILABLE, 1_000, "")
    ]


async def test_a_hold_is_seen_while_the_job_runs(new_user: NewUser) -> None:
    user = await new_user(1_000_000)
    job = await user.submit(image(width=128, height=128, steps=50))
    held = job.estimated_cost_millicredits
    assert await user.balance() == (1_000_000 - held, held)
    await user.cancel(job.job_id)
    ending = await user.finished(job.job_id)
    entries = await user.entries(job.job_id)
    assert sum(entry.amount_millicredits for entry in entries if entry.account == AVAILABLE) == -ending.cost_millicredits
    assert sum(entry.amount_millicredits for entry in entries if entry.account == RESERVED) == 0
    settled = {entry.kind for entry in entries} - {credits_pb2.Entry.KIND_RESERVE}
    assert settled == {credits_pb2.Entry.KIND_CAPTURE if ending.cost_millicredits else credits_pb2.Entry.KIND_RELEASE}
    [end] = [entry for entry in entries if entry.kind in settled and entry.account == RESERVED]
    bill = [(line.quantity, line.unit, line.amount_millicredits) for line in end.lines]
    assert bill == ([(ending.receipt.steps_done, "step", ending.cost_millicredits)] if ending.cost_millicredits else [])


@pytest.mark.parametrize("transport", Transport)
async def test_a_ceiling_refuses_before_the_hold(new_user: NewUser, admin: User, transport: Transport) -> None:
    user = await new_user(1_000)
    await admin.call(SET_USER_CEILING, credits_pb2.SetUserCeilingRequest(user_id=user.user_id, daily_millicredits=250), transport)
    job = await user.finished((await user.submit(image(width=64, height=64, steps=2))).job_id)  # 100 millicredits
    request = submission(image(width=64, height=64, steps=4))  # 200
    batch = jobs_pb2.BatchCreateJobsRequest(requests=[submission(image(width=64, height=64, steps=2)) for _ in range(2)])
    for refusal in (
        await refused(user.call(CREATE_JOB, request, transport)),
        await refused(user.call(BATCH_CREATE_JOBS, batch, transport)),
    ):
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CEILING_REACHED")
        assert (refusal.metadata["period"], refusal.metadata["ceiling_millicredits"]) == ("day", "250")
        assert "api_key_id" not in refusal.metadata
        assert refusal.http_status == (429 if transport is Transport.JSON else None)
    assert await user.settled() == (900, 0)
    assert [one.job_id for one in await user.jobs()] == [job.job_id]

    await admin.call(SET_USER_CEILING, credits_pb2.SetUserCeilingRequest(user_id=user.user_id, lift=True), transport)
    later = (await user.call(CREATE_JOB, request, transport)).job  # the very same request, repeated
    assert (await user.finished(later.job_id)).state == jobs_pb2.STATE_COMPLETED
    assert await user.balance() == (700, 0)


async def test_a_refusal_for_a_ceiling_says_which_and_when_it_starts_anew(new_user: NewUser, admin: User) -> None:
    user = await new_user(1_000)
    await admin.call(SET_USER_CEILING, credits_pb2.SetUserCeilingRequest(user_id=user.user_id, monthly_millicredits=0))
    path, _, body = rest_form(CREATE_JOB, submission(image(width=64, height=64, steps=1)))
    headers = {"content-type": "application/json", **bearer(user.token)}
    reply = await user.edge.http.post(path, content=body, headers=headers)
    status = json_format.ParseDict(reply.json(), status_pb2.Status())
    info, quota, retry = error_details_pb2.ErrorInfo(), error_details_pb2.QuotaFailure(), error_details_pb2.RetryInfo()
    for detail, message in zip(status.details, (info, quota, retry), strict=True):
        assert detail.Unpack(message)
    assert dict(info.metadata) == {
        "period": "month",
        "ceiling_millicredits": "0",
        "spent_millicredits": "0",
        "required_millicredits": "50",
    }
    [violation] = quota.violations
    assert violation.subject
    assert violation.description
    assert 0 <= retry.retry_delay.ToTimedelta().total_seconds() <= 31 * 24 * 3600


@pytest.mark.parametrize("transport", Transport)
async def test_only_administrators_grant(alice: User, transport: Transport) -> None:
    before = await alice.balance()
    refusal = await refused(alice.call(GRANT_CREDITS, grant(alice, 1_000), transport))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
    assert refusal.http_status == (403 if transport is Transport.JSON else None)
    assert await alice.balance() == before


async def test_a_grant_that_is_repeated_grants_once(new_user: NewUser, admin: User) -> None:
    user = await new_user(0)
    request = grant(user, 500)
    answers = [await admin.call(GRANT_CREDITS, request, transport) for transport in Transport]
    assert [answer.available_millicredits for answer in answers] == [500] * 3
    assert await user.balance() == (500, 0)
    refusal = await refused(admin.call(GRANT_CREDITS, grant(user, 501, request.request_id)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    [entry] = await user.entries()
    assert (entry.kind, entry.amount_millicredits, entry.reason) == (credits_pb2.Entry.KIND_GRANT, 500, "because")


@pytest.mark.parametrize("amount", [0, -1, 1_000_000_000_001])
async def test_grants_out_of_range_are_refused(new_user: NewUser, admin: User, amount: int) -> None:
    user = await new_user(0)
    for transport in Transport:
        refusal = await refused(admin.call(GRANT_CREDITS, grant(user, amount), transport))
        assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["amount_millicredits"])
    assert await user.balance() == (0, 0)


async def test_the_balance_covers_what_it_covers_and_no_more(new_user: NewUser) -> None:
    """Four jobs at once against a balance for three."""
    user = await new_user(3 * 50)
    answers = await asyncio.gather(*(user.submit(image(width=64, height=64, steps=1)) for _ in range(4)), return_exceptions=True)
    accepted = [answer for answer in answers if isinstance(answer, jobs_pb2.Job)]
    assert len(accepted) == 3
    for job in accepted:
        assert (await user.finished(job.job_id)).state == jobs_pb2.STATE_COMPLETED
    assert await user.balance() == (0, 0)
    assert len(await user.jobs()) == 3
