"""The ledger through the edge, by every transport: balances that are pushed, credits that expire or are taken back, ceilings, audits."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf import timestamp_pb2

from genmesh.credits.v1 import credits_pb2, payments_pb2
from genmesh.identity.v1 import identity_pb2
from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import (
    AUDIT_LEDGER,
    CLAWBACK_CREDITS,
    CREATE_JOB,
    CREATE_TOP_UP,
    DEADLINE_S,
    GET_ACCOUNT,
    GET_BALANCE,
    GET_ME,
    GRANT_CREDITS,
    LIST_CEILINGS,
    LIST_ENTRIES,
    LIST_PRICES,
    LIST_TOP_UPS,
    SET_KEY_CEILING,
    SET_USER_CEILING,
    UPDATE_USER,
    WATCH_BALANCE,
    Method,
    Transport,
    User,
    image,
    refused,
    submission,
)
from tests.e2e.conftest import NewUser

SMALL = image(width=64, height=64, steps=4)
PRICE = 200
"""Of SMALL, in millicredits."""


def clawback(user: User, millicredits: int) -> credits_pb2.ClawbackCreditsRequest:
    return credits_pb2.ClawbackCreditsRequest(
        request_id=str(uuid.uuid4()), user_id=user.user_id, amount_millicredits=millicredits, reason="a mistake"
    )


def grant(user: User, millicredits: int, expire_time: datetime | None = None) -> credits_pb2.GrantCreditsRequest:
    expiry = timestamp_pb2.Timestamp()
    if expire_time is not None:
        expiry.FromDatetime(expire_time)
    return credits_pb2.GrantCreditsRequest(
        request_id=str(uuid.uuid4()),
        user_id=user.user_id,
        amount_millicredits=millicredits,
        reason="because",
        expire_time=expiry if expire_time else None,
    )


def by_grpc(user: User) -> AsyncGenerator[credits_pb2.WatchBalanceResponse]:
    return user.stream(WATCH_BALANCE, credits_pb2.WatchBalanceRequest())


def by_sse(user: User) -> AsyncGenerator[credits_pb2.WatchBalanceResponse]:
    return user.stream_sse(WATCH_BALANCE, credits_pb2.WatchBalanceRequest())


@pytest.mark.parametrize("watch", [by_grpc, by_sse])
async def test_a_balance_is_pushed_as_a_job_runs(
    new_user: NewUser, admin: User, watch: Callable[[User], AsyncGenerator[credits_pb2.WatchBalanceResponse]]
) -> None:
    user = await new_user(1_000)
    seen: list[tuple[int, int]] = []
    versions: list[int] = []

    async def until(available: int, reserved: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            async for message in messages:
                seen.append((message.available_millicredits, message.reserved_millicredits))
                versions.append(message.version)
                if seen[-1] == (available, reserved):
                    return
        raise AssertionError(f"the watch ended after {seen}")

    async with aclosing(watch(user)) as messages:
        await until(1_000, 0)
        await user.submit(SMALL)
        await until(1_000 - PRICE, 0)
        await admin.call(GRANT_CREDITS, grant(user, 50))
        await until(1_050 - PRICE, 0)
    assert set(seen) <= {(1_000, 0), (1_000 - PRICE, PRICE), (1_000 - PRICE, 0), (1_050 - PRICE, 0)}
    assert versions == sorted(versions)


@pytest.mark.parametrize("transport", Transport)
async def test_promotional_credits_are_spent_first(new_user: NewUser, admin: User, transport: Transport) -> None:
    user = await new_user(1_000)
    expire_time = datetime.now(UTC).replace(microsecond=0) + timedelta(days=3)
    await admin.call(GRANT_CREDITS, grant(user, 150, expire_time), transport)
    balance = await user.call(GET_BALANCE, credits_pb2.GetBalanceRequest(), transport)
    assert (balance.available_millicredits, balance.promotional_millicredits) == (1_150, 150)
    assert balance.next_expire_time.ToDatetime(UTC) == expire_time
    await user.finished((await user.submit(SMALL, transport)).job_id)
    balance = await user.call(GET_BALANCE, credits_pb2.GetBalanceRequest(), transport)
    assert (balance.available_millicredits, balance.promotional_millicredits) == (1_150 - PRICE, 0)
    assert not balance.HasField("next_expire_time")
    account = await admin.call(GET_ACCOUNT, credits_pb2.GetAccountRequest(user_id=user.user_id), transport)
    assert (account.available_millicredits, list(account.promotions)) == (1_150 - PRICE, [])


@pytest.mark.parametrize("transport", Transport)
async def test_credits_are_taken_back(new_user: NewUser, admin: User, transport: Transport) -> None:
    user = await new_user(1_000)
    request = clawback(user, 300)
    for _ in range(2):
        assert (await admin.call(CLAWBACK_CREDITS, request, transport)).available_millicredits == 700
    refusal = await refused(admin.call(CLAWBACK_CREDITS, clawback(user, 701), transport))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "INSUFFICIENT_CREDITS")
    listed = await user.call(
        LIST_ENTRIES, credits_pb2.ListEntriesRequest(kinds=[credits_pb2.Entry.KIND_CLAWBACK, credits_pb2.Entry.KIND_LAPSE]), transport
    )
    assert [(entry.amount_millicredits, entry.reason) for entry in listed.entries] == [(-300, "a mistake")]


@pytest.mark.parametrize("transport", Transport)
async def test_a_ceiling_stops_a_job_before_anything_is_held(new_user: NewUser, admin: User, transport: Transport) -> None:
    user = await new_user(10_000)
    ceiling = credits_pb2.SetUserCeilingRequest(user_id=user.user_id, daily_millicredits=PRICE + PRICE // 2, monthly_millicredits=100_000)
    await admin.call(SET_USER_CEILING, ceiling, transport)
    await user.finished((await user.submit(SMALL, transport)).job_id)
    request = submission(SMALL)
    refusal = await refused(user.call(CREATE_JOB, request, transport))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CEILING_REACHED")
    assert refusal.metadata == {
        "period": "day",
        "ceiling_millicredits": str(PRICE + PRICE // 2),
        "spent_millicredits": str(PRICE),
        "required_millicredits": str(PRICE),
    }
    assert refusal.http_status == (429 if transport is Transport.JSON else None)
    assert await user.balance() == (10_000 - PRICE, 0)
    assert len(await user.jobs()) == 1

    ceiling.daily_millicredits = 2 * PRICE
    await admin.call(SET_USER_CEILING, ceiling, transport)
    assert (await user.call(CREATE_JOB, request, transport)).job.state == jobs_pb2.STATE_PENDING  # the very same request
    own = (await user.call(LIST_CEILINGS, credits_pb2.ListCeilingsRequest(), transport)).ceilings
    assert [(one.api_key_id, one.daily_millicredits, one.spent_today_millicredits) for one in own] == [("", 2 * PRICE, 2 * PRICE)]


async def test_owners_bound_their_keys(alice: User, bob: User) -> None:
    key_id = str(uuid.uuid4())
    request = credits_pb2.SetKeyCeilingRequest(api_key_id=key_id, monthly_millicredits=5)
    assert (await alice.call(SET_KEY_CEILING, request, Transport.JSON)).ceiling.monthly_millicredits == 5
    assert [one.api_key_id for one in (await alice.call(LIST_CEILINGS, credits_pb2.ListCeilingsRequest())).ceilings] == [key_id]
    assert (await bob.call(LIST_CEILINGS, credits_pb2.ListCeilingsRequest())).ceilings == []
    await alice.call(SET_KEY_CEILING, credits_pb2.SetKeyCeilingRequest(api_key_id=key_id, lift=True))
    assert (await alice.call(LIST_CEILINGS, credits_pb2.ListCeilingsRequest())).ceilings == []


@pytest.mark.parametrize("transport", Transport)
async def test_an_administrator_changes_a_plan(new_user: NewUser, admin: User, transport: Transport) -> None:
    user = await new_user(0)
    change = identity_pb2.UpdateUserRequest(user_id=user.user_id, plan=identity_pb2.PLAN_PRO)
    assert (await admin.call(UPDATE_USER, change, transport)).user.plan == identity_pb2.PLAN_PRO
    assert (await user.call(GET_ME, identity_pb2.GetMeRequest(), transport)).user.plan == identity_pb2.PLAN_PRO
    refusal = await refused(user.call(UPDATE_USER, change, transport))
    assert refusal.code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("transport", Transport)
async def test_prices_are_public_and_nothing_is_sold_without_a_provider(alice: User, transport: Transport) -> None:
    prices = await alice.edge.call(LIST_PRICES, payments_pb2.ListPricesRequest(), "", transport)
    monthly = {price.plan: (price.monthly_price_minor, price.currency) for price in prices.plans}
    assert monthly == {identity_pb2.PLAN_FREE: (0, "USD"), identity_pb2.PLAN_PRO: (4999, "USD")}
    assert all(price.monthly_grant_millicredits > 0 for price in prices.plans)
    assert prices.packages
    assert not prices.can_buy
    request = payments_pb2.CreateTopUpRequest(request_id=str(uuid.uuid4()), package_id=prices.packages[0].package_id)
    refusal = await refused(alice.call(CREATE_TOP_UP, request, transport))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNIMPLEMENTED, "NOT_OFFERED")
    assert (await alice.call(LIST_TOP_UPS, payments_pb2.ListTopUpsRequest(), transport)).top_ups == []


async def test_the_audit_of_a_busy_ledger_finds_nothing(alice: User, admin: User) -> None:
    jobs = [await alice.submit(SMALL) for _ in range(3)]
    for stream in (admin.stream, admin.stream_sse):
        *found, last = [message async for message in stream(AUDIT_LEDGER, credits_pb2.AuditLedgerRequest())]
        assert [message for message in found if message.HasField("discrepancy")] == []
        assert last.summary.discrepancy_count == 0
        assert last.summary.reservation_count >= len(jobs)
        assert sum(int(total.amount_millicredits) for total in last.summary.totals) == 0


@pytest.mark.parametrize("transport", Transport)
@pytest.mark.parametrize(
    ("method", "request_type"),
    [
        (CLAWBACK_CREDITS, credits_pb2.ClawbackCreditsRequest),
        (GET_ACCOUNT, credits_pb2.GetAccountRequest),
        (SET_USER_CEILING, credits_pb2.SetUserCeilingRequest),
    ],
)
async def test_users_are_no_administrators(
    alice: User, bob: User, transport: Transport, method: "Method[Any, Any]", request_type: Any
) -> None:
    message: Any = request_type(user_id=bob.user_id)
    if method is CLAWBACK_CREDITS:
        message = clawback(bob, 1)
    elif method is SET_USER_CEILING:
        message.lift = True
    refusal = await refused(alice.call(method, message, transport))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
