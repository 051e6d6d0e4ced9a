"""What administrators do beside giving: take back, look at an account, bound it; and the filters of a user's own entries."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import grpc
import pytest

from genmesh.credits.v1 import credits_pb2 as pb
from tests.service.credits.callers import Signer, refused
from tests.service.credits.test_credits_rpc import grant_request, reserve_request

if TYPE_CHECKING:
    from genmesh.credits.v1.credits_pb2_grpc import CreditsServiceAsyncStub, LedgerAdminServiceAsyncStub, LedgerServiceAsyncStub

Fund = Callable[[uuid.UUID, int], Awaitable[None]]
BalanceOf = Callable[[uuid.UUID], Awaitable[tuple[int, int]]]
Code = grpc.StatusCode
Kind = pb.Entry


def clawback_request(user_id: uuid.UUID, amount_millicredits: int, reason: str = "fraud") -> pb.ClawbackCreditsRequest:
    return pb.ClawbackCreditsRequest(
        request_id=str(uuid.uuid4()), user_id=str(user_id), amount_millicredits=amount_millicredits, reason=reason
    )


async def test_what_was_given_is_taken_back_once(
    admin_stub: "LedgerAdminServiceAsyncStub",
    credits_stub: "CreditsServiceAsyncStub",
    signer: Signer,
    fund: Fund,
    balance_of: BalanceOf,
    user_id: uuid.UUID,
):
    await fund(user_id, 500)
    admin = signer.metadata(uuid.uuid4(), "admin")
    request = clawback_request(user_id, 200)
    first, *others = await asyncio.gather(*(admin_stub.ClawbackCredits(request, metadata=admin) for _ in range(10)))
    assert (first.available_millicredits, first.reserved_millicredits) == (300, 0)
    assert set(map(str, others)) == {str(first)}
    assert await balance_of(user_id) == (300, 0)
    newest = (await credits_stub.ListEntries(pb.ListEntriesRequest(page_size=1), metadata=signer.metadata(user_id))).entries[0]
    assert (newest.kind, newest.amount_millicredits, newest.reason) == (Kind.KIND_CLAWBACK, -200, "fraud")


@pytest.mark.parametrize("change", [{"amount_millicredits": 199}, {"reason": "other"}, {"user_id": str(uuid.uuid4())}])
async def test_a_request_id_used_for_another_clawback_is_refused(
    admin_stub: "LedgerAdminServiceAsyncStub",
    signer: Signer,
    fund: Fund,
    balance_of: BalanceOf,
    user_id: uuid.UUID,
    change: dict[str, str | int],
):
    await fund(user_id, 500)
    admin = signer.metadata(uuid.uuid4(), "admin")
    request = clawback_request(user_id, 200)
    await admin_stub.ClawbackCredits(request, metadata=admin)
    request.MergeFrom(pb.ClawbackCreditsRequest(**change))  # pyright: ignore[reportArgumentType]
    refusal = await refused(admin_stub.ClawbackCredits(request, metadata=admin))
    assert (refusal.code, refusal.reason) == (Code.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    assert await balance_of(user_id) == (300, 0)


async def test_what_is_held_or_was_never_there_cannot_be_taken(
    admin_stub: "LedgerAdminServiceAsyncStub",
    ledger_stub: "LedgerServiceAsyncStub",
    signer: Signer,
    fund: Fund,
    balance_of: BalanceOf,
    user_id: uuid.UUID,
):
    await fund(user_id, 500)
    await ledger_stub.ReserveCredits(reserve_request(user_id, 400))
    refusal = await refused(admin_stub.ClawbackCredits(clawback_request(user_id, 101), metadata=signer.metadata(uuid.uuid4(), "admin")))
    assert (refusal.code, refusal.reason) == (Code.FAILED_PRECONDITION, "INSUFFICIENT_CREDITS")
    assert refusal.metadata == {"required_millicredits": "101", "available_millicredits": "100"}
    assert await balance_of(user_id) == (100, 400)


async def test_users_do_nothing_of_this(admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer, fund: Fund, user_id: uuid.UUID):
    await fund(user_id, 500)
    user = signer.metadata(user_id)
    for call in (
        admin_stub.ClawbackCredits(clawback_request(user_id, 1), metadata=user),
        admin_stub.GetAccount(pb.GetAccountRequest(user_id=str(user_id)), metadata=user),
        admin_stub.SetUserCeiling(pb.SetUserCeilingRequest(user_id=str(user_id), lift=True), metadata=user),
        admin_stub.ListAccountEntries(pb.ListAccountEntriesRequest(user_id=str(user_id)), metadata=user),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (Code.PERMISSION_DENIED, "PERMISSION_DENIED")


async def test_an_account_is_shown_whole(
    admin_stub: "LedgerAdminServiceAsyncStub",
    ledger_stub: "LedgerServiceAsyncStub",
    credits_stub: "CreditsServiceAsyncStub",
    signer: Signer,
    fund: Fund,
    user_id: uuid.UUID,
):
    admin, user = signer.metadata(uuid.uuid4(), "admin"), signer.metadata(user_id)
    await fund(user_id, 500)
    soon, later = (datetime.now(UTC).replace(microsecond=0) + timedelta(days=days) for days in (1, 2))
    for expire_time, amount in ((later, 70), (soon, 30)):
        request = grant_request(user_id, amount)
        request.expire_time.FromDatetime(expire_time)
        await admin_stub.GrantCredits(request, metadata=admin)
    key_id = str(uuid.uuid4())
    await admin_stub.SetUserCeiling(pb.SetUserCeilingRequest(user_id=str(user_id), monthly_millicredits=1000), metadata=admin)
    await credits_stub.SetKeyCeiling(pb.SetKeyCeilingRequest(api_key_id=key_id, daily_millicredits=100), metadata=user)
    hold = reserve_request(user_id, 40)
    hold.api_key_id = key_id
    await ledger_stub.ReserveCredits(hold)

    shown = await admin_stub.GetAccount(pb.GetAccountRequest(user_id=str(user_id)), metadata=admin)
    assert (shown.available_millicredits, shown.reserved_millicredits, shown.promotional_millicredits) == (560, 40, 60)
    assert [(one.available_millicredits, one.reserved_millicredits, one.expire_time.ToDatetime(UTC)) for one in shown.promotions] == [
        (0, 30, soon),
        (60, 10, later),
    ]
    assert [(one.api_key_id, one.spent_today_millicredits, one.spent_this_month_millicredits) for one in shown.ceilings] == [
        ("", 40, 40),
        (key_id, 40, 40),
    ]
    whole, of_key = shown.ceilings
    assert (whole.HasField("daily_millicredits"), whole.monthly_millicredits) == (False, 1000)
    assert (of_key.daily_millicredits, of_key.HasField("monthly_millicredits")) == (100, False)
    assert list((await credits_stub.ListCeilings(pb.ListCeilingsRequest(), metadata=user)).ceilings) == list(shown.ceilings)


async def test_nobody_has_nothing(admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer, user_id: uuid.UUID):
    request = pb.GetAccountRequest(user_id=str(user_id))
    assert await admin_stub.GetAccount(request, metadata=signer.metadata(uuid.uuid4(), "admin")) == pb.GetAccountResponse()


async def test_the_nil_key_is_no_key(credits_stub: "CreditsServiceAsyncStub", signer: Signer, user_id: uuid.UUID):
    request = pb.SetKeyCeilingRequest(api_key_id=str(uuid.UUID(int=0)), daily_millicredits=1)
    refusal = await refused(credits_stub.SetKeyCeiling(request, metadata=signer.metadata(user_id)))
    assert (refusal.code, refusal.fields) == (Code.INVALID_ARGUMENT, ("api_key_id",))


@pytest.mark.parametrize("bounds", [{}, {"lift": True, "daily_millicredits": 0}])
async def test_a_request_says_which_bound_it_sets_or_that_it_lifts_them(
    admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer, user_id: uuid.UUID, bounds: dict[str, bool | int]
):
    admin = signer.metadata(uuid.uuid4(), "admin")
    await admin_stub.SetUserCeiling(pb.SetUserCeilingRequest(user_id=str(user_id), daily_millicredits=5), metadata=admin)
    request = pb.SetUserCeilingRequest(user_id=str(user_id), **bounds)  # pyright: ignore[reportArgumentType]
    refusal = await refused(admin_stub.SetUserCeiling(request, metadata=admin))
    assert refusal.code is Code.INVALID_ARGUMENT
    shown = await admin_stub.GetAccount(pb.GetAccountRequest(user_id=str(user_id)), metadata=admin)
    assert [one.daily_millicredits for one in shown.ceilings] == [5]


async def test_administrators_see_who_gave_and_took(
    admin_stub: "LedgerAdminServiceAsyncStub", credits_stub: "CreditsServiceAsyncStub", signer: Signer, user_id: uuid.UUID
):
    giver, taker = uuid.uuid4(), uuid.uuid4()
    await admin_stub.GrantCredits(grant_request(user_id, 9), metadata=signer.metadata(giver, "admin"))
    await admin_stub.ClawbackCredits(clawback_request(user_id, 4), metadata=signer.metadata(taker, "admin"))
    request = pb.ListAccountEntriesRequest(user_id=str(user_id))
    entries = (await admin_stub.ListAccountEntries(request, metadata=signer.metadata(uuid.uuid4(), "admin"))).entries
    assert [(entry.actor_id, entry.amount_millicredits) for entry in entries] == [(str(taker), -4), (str(giver), 9)]
    assert entries[0].event_id > entries[1].event_id > 0
    own = (await credits_stub.ListEntries(pb.ListEntriesRequest(), metadata=signer.metadata(user_id))).entries
    assert [(entry.actor_id, entry.event_id) for entry in own] == [("", entry.event_id) for entry in entries]


async def test_a_key_does_not_lift_its_own_ceiling(credits_stub: "CreditsServiceAsyncStub", signer: Signer, user_id: uuid.UUID):
    key_id = str(uuid.uuid4())
    await credits_stub.SetKeyCeiling(pb.SetKeyCeilingRequest(api_key_id=key_id, daily_millicredits=1), metadata=signer.metadata(user_id))
    by_key = signer.metadata(user_id, api_key_id=key_id)
    refusal = await refused(credits_stub.SetKeyCeiling(pb.SetKeyCeilingRequest(api_key_id=key_id, lift=True), metadata=by_key))
    assert (refusal.code, refusal.reason) == (Code.PERMISSION_DENIED, "SCOPE_MISSING")
    (ceiling,) = (await credits_stub.ListCeilings(pb.ListCeilingsRequest(), metadata=by_key)).ceilings
    assert ceiling.daily_millicredits == 1


async def test_entries_are_filtered_by_kind_and_time(
    admin_stub: "LedgerAdminServiceAsyncStub",
    ledger_stub: "LedgerServiceAsyncStub",
    credits_stub: "CreditsServiceAsyncStub",
    signer: Signer,
    fund: Fund,
    user_id: uuid.UUID,
):
    user = signer.metadata(user_id)

    async def listed(**filters: object) -> list[pb.Entry]:
        request = pb.ListEntriesRequest(page_size=2, **filters)  # pyright: ignore[reportArgumentType]
        entries: list[pb.Entry] = []
        while True:
            response = await credits_stub.ListEntries(request, metadata=user)
            entries += response.entries
            if not response.next_page_token:
                return entries
            request.page_token = response.next_page_token

    await fund(user_id, 100)
    reservation_id = uuid.uuid4()
    await ledger_stub.ReserveCredits(reserve_request(user_id, 60, reservation_id))
    lines = [
        pb.ReceiptLine(description="small, 2 pictures", quantity=5, unit="step", amount_millicredits=40),
        pb.ReceiptLine(description="upscaling"),
    ]
    await ledger_stub.CaptureReservation(
        pb.CaptureReservationRequest(reservation_id=str(reservation_id), amount_millicredits=40, lines=lines)
    )
    await admin_stub.ClawbackCredits(clawback_request(user_id, 5), metadata=signer.metadata(uuid.uuid4(), "admin"))
    everything = await listed()
    kinds = [entry.kind for entry in everything]
    assert kinds == [Kind.KIND_CLAWBACK, Kind.KIND_CAPTURE, Kind.KIND_CAPTURE, Kind.KIND_RESERVE, Kind.KIND_RESERVE, Kind.KIND_GRANT]
    assert await listed(kinds=[Kind.KIND_CAPTURE, Kind.KIND_GRANT]) == [everything[1], everything[2], everything[5]]
    assert await listed(kinds=[Kind.KIND_RESERVE], job_id=str(reservation_id)) == everything[3:5]
    assert await listed(kinds=[Kind.KIND_TOP_UP]) == []
    # From the reserve on, and up to the capture: times as the entries have them.
    assert await listed(start_time=everything[3].create_time, end_time=everything[1].create_time) == everything[3:5]
    assert await listed(end_time=everything[5].create_time) == []
    assert [list(entry.lines) for entry in everything[:4]] == [[], lines, lines, []]


async def test_lines_have_to_add_up(ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID):
    await fund(user_id, 100)
    reservation_id = uuid.uuid4()
    await ledger_stub.ReserveCredits(reserve_request(user_id, 60, reservation_id))
    request = pb.CaptureReservationRequest(
        reservation_id=str(reservation_id), amount_millicredits=40, lines=[pb.ReceiptLine(description="small", amount_millicredits=41)]
    )
    refusal = await refused(ledger_stub.CaptureReservation(request))
    assert (refusal.code, refusal.fields) == (Code.INVALID_ARGUMENT, ("lines",))
    assert await balance_of(user_id) == (40, 60)
    await ledger_stub.ReleaseReservation(pb.ReleaseReservationRequest(reservation_id=str(reservation_id)))


async def test_a_page_token_is_good_for_one_query(credits_stub: "CreditsServiceAsyncStub", signer: Signer, fund: Fund, user_id: uuid.UUID):
    for _ in range(3):
        await fund(user_id, 1)
    user = signer.metadata(user_id)
    token = (await credits_stub.ListEntries(pb.ListEntriesRequest(page_size=1), metadata=user)).next_page_token
    request = pb.ListEntriesRequest(page_size=1, page_token=token, kinds=[Kind.KIND_GRANT])
    refusal = await refused(credits_stub.ListEntries(request, metadata=user))
    assert (refusal.code, refusal.fields) == (Code.INVALID_ARGUMENT, ("page_token",))


async def test_a_grant_with_a_past_expiry_is_refused(
    admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer, balance_of: BalanceOf, user_id: uuid.UUID
):
    request = grant_request(user_id, 5)
    request.expire_time.FromDatetime(datetime.now(UTC) - timedelta(seconds=1))
    refusal = await refused(admin_stub.GrantCredits(request, metadata=signer.metadata(uuid.uuid4(), "admin")))
    assert (refusal.code, refusal.fields) == (Code.INVALID_ARGUMENT, ("expire_time",))
    assert await balance_of(user_id) == (0, 0)
