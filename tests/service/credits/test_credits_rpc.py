"""What users and administrators do: balances, entries, grants, and who may call what."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import grpc
import pytest

from genmesh.credits.v1 import credits_pb2 as pb
from genmesh.credits.v1 import credits_pb2_grpc as pb_grpc
from servicekit.client import mesh_channel
from tests.service.credits.callers import Signer, refused

if TYPE_CHECKING:
    from credit_service.settings import CreditSettings
    from genmesh.credits.v1.credits_pb2_grpc import CreditsServiceAsyncStub, LedgerAdminServiceAsyncStub, LedgerServiceAsyncStub
    from servicekit.server import MeshServer

Fund = Callable[[uuid.UUID, int], Awaitable[None]]
BalanceOf = Callable[[uuid.UUID], Awaitable[tuple[int, int]]]
Code = grpc.StatusCode


def grant_request(user_id: uuid.UUID, amount_millicredits: int = 500, reason: str = "welcome") -> pb.GrantCreditsRequest:
    return pb.GrantCreditsRequest(
        request_id=str(uuid.uuid4()), user_id=str(user_id), amount_millicredits=amount_millicredits, reason=reason
    )


def reserve_request(
    user_id: uuid.UUID, amount_millicredits: int, reservation_id: uuid.UUID | None = None, *, job_id: uuid.UUID | None = None
) -> pb.ReserveCreditsRequest:
    request = pb.ReserveCreditsRequest(
        reservation_id=str(reservation_id or uuid.uuid4()),
        user_id=str(user_id),
        amount_millicredits=amount_millicredits,
        job_id=str(job_id) if job_id else "",
    )
    request.ttl.FromSeconds(3600)
    return request


async def test_a_user_without_an_account_has_nothing(balance_of: BalanceOf, user_id: uuid.UUID):
    assert await balance_of(user_id) == (0, 0)


async def test_a_grant_arrives_and_is_answered_with_the_balance(
    admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer, balance_of: BalanceOf, user_id: uuid.UUID
):
    admin = signer.metadata(uuid.uuid4(), "admin")
    await admin_stub.GrantCredits(grant_request(user_id, 500), metadata=admin)
    response = await admin_stub.GrantCredits(grant_request(user_id, 250), metadata=admin)
    assert (response.available_millicredits, response.reserved_millicredits) == (750, 0)
    assert await balance_of(user_id) == (750, 0)


async def test_the_same_grant_again_has_the_same_answer_and_grants_once(
    admin_stub: "LedgerAdminServiceAsyncStub",
    ledger_stub: "LedgerServiceAsyncStub",
    signer: Signer,
    balance_of: BalanceOf,
    user_id: uuid.UUID,
):
    admin = signer.metadata(uuid.uuid4(), "admin")
    request = grant_request(user_id, 500)
    first = await admin_stub.GrantCredits(request, metadata=admin)
    await ledger_stub.ReserveCredits(reserve_request(user_id, 100))
    assert await admin_stub.GrantCredits(request, metadata=admin) == first
    assert await balance_of(user_id) == (400, 100)


async def test_the_same_grant_many_times_at_once_grants_once(
    admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer, balance_of: BalanceOf, user_id: uuid.UUID
):
    admin = signer.metadata(uuid.uuid4(), "admin")
    request = grant_request(user_id, 500)
    responses = await asyncio.gather(*(admin_stub.GrantCredits(request, metadata=admin) for _ in range(20)))
    assert {response.available_millicredits for response in responses} == {500}
    assert await balance_of(user_id) == (500, 0)


@pytest.mark.parametrize("change", [{"amount_millicredits": 501}, {"reason": "other"}, {"user_id": str(uuid.uuid4())}])
async def test_a_request_id_used_for_another_grant_is_refused(
    admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer, balance_of: BalanceOf, user_id: uuid.UUID, change: dict[str, str | int]
):
    admin = signer.metadata(uuid.uuid4(), "admin")
    request = grant_request(user_id)
    await admin_stub.GrantCredits(request, metadata=admin)
    request.MergeFrom(pb.GrantCreditsRequest(**change))  # pyright: ignore[reportArgumentType]
    refusal = await refused(admin_stub.GrantCredits(request, metadata=admin))
    assert (refusal.code, refusal.reason) == (Code.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    assert await balance_of(user_id) == (500, 0)


async def test_one_request_id_for_two_users_at_once_grants_to_one(
    admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer, balance_of: BalanceOf
):
    admin = signer.metadata(uuid.uuid4(), "admin")
    for _ in range(10):
        one, other = grant_request(uuid.uuid4()), grant_request(uuid.uuid4())
        other.request_id = one.request_id
        results = await asyncio.gather(
            *(admin_stub.GrantCredits(request, metadata=admin) for request in (one, other)), return_exceptions=True
        )
        assert sum(isinstance(result, pb.GrantCreditsResponse) for result in results) == 1
        assert sorted([await balance_of(uuid.UUID(one.user_id)), await balance_of(uuid.UUID(other.user_id))]) == [(0, 0), (500, 0)]


async def test_request_ids_of_two_administrators_do_not_meet(
    admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer, balance_of: BalanceOf, user_id: uuid.UUID
):
    request = grant_request(user_id)
    await admin_stub.GrantCredits(request, metadata=signer.metadata(uuid.uuid4(), "admin"))
    await admin_stub.GrantCredits(request, metadata=signer.metadata(uuid.uuid4(), "admin"))
    assert await balance_of(user_id) == (1000, 0)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"amount_millicredits": -1}, "amount_millicredits"),
        ({"amount_millicredits": 10**12 + 1}, "amount_millicredits"),
        ({"user_id": "me"}, "user_id"),
        ({"request_id": "1"}, "request_id"),
        ({"reason": "a\0b"}, "reason"),
        ({"reason": "x" * 501}, "reason"),
    ],
)
async def test_bad_grants_name_the_field(
    admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer, user_id: uuid.UUID, change: dict[str, str | int], field: str
):
    request = grant_request(user_id)
    request.MergeFrom(pb.GrantCreditsRequest(**change))  # pyright: ignore[reportArgumentType]
    refusal = await refused(admin_stub.GrantCredits(request, metadata=signer.metadata(uuid.uuid4(), "admin")))
    assert (refusal.code, refusal.fields) == (Code.INVALID_ARGUMENT, (field,))


async def test_users_cannot_grant(admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer, balance_of: BalanceOf, user_id: uuid.UUID):
    refusal = await refused(admin_stub.GrantCredits(grant_request(user_id), metadata=signer.metadata(user_id)))
    assert (refusal.code, refusal.reason) == (Code.PERMISSION_DENIED, "PERMISSION_DENIED")
    assert await balance_of(user_id) == (0, 0)


async def test_without_a_token_nobody_is_known(credits_stub: "CreditsServiceAsyncStub"):
    refusal = await refused(credits_stub.GetBalance(pb.GetBalanceRequest()))
    assert (refusal.code, refusal.reason) == (Code.UNAUTHENTICATED, "TOKEN_MISSING")


async def test_a_token_whose_subject_is_no_user_is_refused(credits_stub: "CreditsServiceAsyncStub", signer: Signer):
    refusal = await refused(credits_stub.GetBalance(pb.GetBalanceRequest(), metadata=signer.metadata("root")))
    assert (refusal.code, refusal.reason) == (Code.UNAUTHENTICATED, "TOKEN_INVALID")


@pytest.mark.parametrize("caller", ["envoy", "inference_service", "gateway", "cli"])
async def test_only_jobs_service_can_hold_credits(
    credit_settings: "CreditSettings", server: "MeshServer", signer: Signer, fund: Fund, balance_of: BalanceOf, caller: str
):
    user_id = uuid.uuid4()
    await fund(user_id, 100)
    async with mesh_channel(credit_settings, f"127.0.0.1:{server.port}", caller=caller, service="credit_service") as channel:
        stub: LedgerServiceAsyncStub = pb_grpc.LedgerServiceStub(channel)
        for metadata in ((), signer.metadata(user_id, "admin")):
            refusal = await refused(stub.ReserveCredits(reserve_request(user_id, 10), metadata=metadata))
            assert (refusal.code, refusal.reason) == (Code.PERMISSION_DENIED, "PERMISSION_DENIED")
    assert await balance_of(user_id) == (100, 0)


async def test_entries_tell_the_story_newest_first(
    credits_stub: "CreditsServiceAsyncStub", ledger_stub: "LedgerServiceAsyncStub", signer: Signer, fund: Fund, user_id: uuid.UUID
):
    await fund(user_id, 100)
    job, other_job = uuid.uuid4(), uuid.uuid4()
    await ledger_stub.ReserveCredits(reserve_request(user_id, 70, job))
    await ledger_stub.CaptureReservation(pb.CaptureReservationRequest(reservation_id=str(job), amount_millicredits=30))
    await ledger_stub.ReserveCredits(reserve_request(user_id, 10, other_job))
    await ledger_stub.ReleaseReservation(pb.ReleaseReservationRequest(reservation_id=str(other_job)))

    metadata = signer.metadata(user_id)
    entries = (await credits_stub.ListEntries(pb.ListEntriesRequest(), metadata=metadata)).entries
    available, held = pb.Entry.ACCOUNT_AVAILABLE, pb.Entry.ACCOUNT_RESERVED
    assert [
        (entry.kind, entry.account, entry.amount_millicredits, entry.balance_after_millicredits, entry.job_id, entry.reason)
        for entry in reversed(entries)
    ] == [
        (pb.Entry.KIND_GRANT, available, 100, 100, "", "test"),
        (pb.Entry.KIND_RESERVE, available, -70, 30, str(job), ""),
        (pb.Entry.KIND_RESERVE, held, 70, 70, str(job), ""),
        (pb.Entry.KIND_CAPTURE, available, 40, 70, str(job), ""),
        (pb.Entry.KIND_CAPTURE, held, -70, 0, str(job), ""),
        (pb.Entry.KIND_RESERVE, available, -10, 60, str(other_job), ""),
        (pb.Entry.KIND_RESERVE, held, 10, 10, str(other_job), ""),
        (pb.Entry.KIND_RELEASE, available, 10, 70, str(other_job), ""),
        (pb.Entry.KIND_RELEASE, held, -10, 0, str(other_job), ""),
    ]
    times = [entry.create_time.ToNanoseconds() for entry in entries]
    assert times == sorted(times, reverse=True)

    of_job = await credits_stub.ListEntries(pb.ListEntriesRequest(job_id=str(job)), metadata=metadata)
    assert [entry.entry_id for entry in of_job.entries] == [entry.entry_id for entry in entries if entry.job_id == str(job)]


async def test_the_entries_of_a_job_are_those_of_all_its_rounds(
    credits_stub: "CreditsServiceAsyncStub", ledger_stub: "LedgerServiceAsyncStub", signer: Signer, fund: Fund, user_id: uuid.UUID
):
    await fund(user_id, 100)
    job, first_retry, second_retry = (uuid.uuid4() for _ in range(3))
    await ledger_stub.ReserveCredits(reserve_request(user_id, 70, job))
    await ledger_stub.ReleaseReservation(pb.ReleaseReservationRequest(reservation_id=str(job)))
    await ledger_stub.ReserveCredits(reserve_request(user_id, 70, first_retry, job_id=job))
    await ledger_stub.ReleaseReservation(pb.ReleaseReservationRequest(reservation_id=str(first_retry)))
    await ledger_stub.ReserveCredits(reserve_request(user_id, 1))
    await ledger_stub.ReserveCredits(reserve_request(user_id, 70, second_retry, job_id=job))
    await ledger_stub.CaptureReservation(pb.CaptureReservationRequest(reservation_id=str(second_retry), amount_millicredits=60))

    metadata = signer.metadata(user_id)
    kinds: list[pb.Entry.Kind.ValueType] = []
    token = ""
    while True:
        page = await credits_stub.ListEntries(pb.ListEntriesRequest(job_id=str(job), page_size=5, page_token=token), metadata=metadata)
        assert {entry.job_id for entry in page.entries} == {str(job)}
        kinds += [entry.kind for entry in page.entries if entry.account == pb.Entry.ACCOUNT_RESERVED]
        token = page.next_page_token
        if not token:
            break
    hold, release = pb.Entry.KIND_RESERVE, pb.Entry.KIND_RELEASE
    assert kinds[::-1] == [hold, release, hold, release, hold, pb.Entry.KIND_CAPTURE]
    of_retry = await credits_stub.ListEntries(pb.ListEntriesRequest(job_id=str(first_retry)), metadata=metadata)
    assert not of_retry.entries


async def test_entries_and_jobs_of_others_do_not_exist(
    credits_stub: "CreditsServiceAsyncStub", ledger_stub: "LedgerServiceAsyncStub", signer: Signer, fund: Fund, user_id: uuid.UUID
):
    await fund(user_id, 100)
    request = reserve_request(user_id, 70)
    await ledger_stub.ReserveCredits(request)
    for query in (pb.ListEntriesRequest(), pb.ListEntriesRequest(job_id=request.reservation_id)):
        assert not (await credits_stub.ListEntries(query, metadata=signer.metadata(uuid.uuid4()))).entries


async def test_pages_join_without_gap_or_overlap(credits_stub: "CreditsServiceAsyncStub", signer: Signer, fund: Fund, user_id: uuid.UUID):
    for amount in range(1, 8):
        await fund(user_id, amount)
    metadata = signer.metadata(user_id)
    amounts: list[int] = []
    sizes: list[int] = []
    token = ""
    while True:
        page = await credits_stub.ListEntries(pb.ListEntriesRequest(page_size=3, page_token=token), metadata=metadata)
        amounts += [entry.amount_millicredits for entry in page.entries]
        sizes.append(len(page.entries))
        if not sizes[1:]:
            await fund(user_id, 100)  # what arrives meanwhile belongs before the first page, not into the next one
        token = page.next_page_token
        if not token:
            break
    assert amounts == [7, 6, 5, 4, 3, 2, 1]
    assert sizes == [3, 3, 1]


async def test_the_default_page_has_fifty_entries(credits_stub: "CreditsServiceAsyncStub", signer: Signer, fund: Fund, user_id: uuid.UUID):
    await asyncio.gather(*(fund(user_id, 1) for _ in range(51)))
    page = await credits_stub.ListEntries(pb.ListEntriesRequest(), metadata=signer.metadata(user_id))
    assert len(page.entries) == 50
    assert page.next_page_token


async def test_foreign_and_garbled_page_tokens_are_refused(
    credits_stub: "CreditsServiceAsyncStub", signer: Signer, fund: Fund, user_id: uuid.UUID
):
    await fund(user_id, 1)
    await fund(user_id, 1)
    page = await credits_stub.ListEntries(pb.ListEntriesRequest(page_size=1), metadata=signer.metadata(user_id))
    attempts = [
        (signer.metadata(user_id), pb.ListEntriesRequest(page_token="x" + page.next_page_token)),
        (signer.metadata(uuid.uuid4()), pb.ListEntriesRequest(page_token=page.next_page_token)),
        (signer.metadata(user_id), pb.ListEntriesRequest(page_token=page.next_page_token, job_id=str(uuid.uuid4()))),
    ]
    for metadata, request in attempts:
        refusal = await refused(credits_stub.ListEntries(request, metadata=metadata))
        assert (refusal.code, refusal.fields) == (Code.INVALID_ARGUMENT, ("page_token",))


@pytest.mark.parametrize(
    ("request_", "field"), [(pb.ListEntriesRequest(page_size=-1), "page_size"), (pb.ListEntriesRequest(job_id="1"), "job_id")]
)
async def test_bad_list_requests_name_the_field(
    credits_stub: "CreditsServiceAsyncStub", signer: Signer, user_id: uuid.UUID, request_: pb.ListEntriesRequest, field: str
):
    refusal = await refused(credits_stub.ListEntries(request_, metadata=signer.metadata(user_id)))
    assert (refusal.code, refusal.fields) == (Code.INVALID_ARGUMENT, (field,))
