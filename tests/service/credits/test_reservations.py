"""Two-phase reservations, as jobs_service makes and settles them, alone and in races."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import store
from genmesh.credits.v1 import credits_pb2 as pb
from tests.service.credits.callers import Refusal, refusal_of, refused

if TYPE_CHECKING:
    from genmesh.credits.v1.credits_pb2_grpc import LedgerServiceAsyncStub

Fund = Callable[[uuid.UUID, int], Awaitable[None]]
BalanceOf = Callable[[uuid.UUID], Awaitable[tuple[int, int]]]
Code = grpc.StatusCode
State = pb.Reservation

OVERDUE = timedelta(microseconds=1)
"""A time to live that is over when the next statement looks: expiry is tested without waiting."""


def reserve_request(user_id: uuid.UUID, amount_millicredits: int, *, ttl_s: int = 3600, job_id: str = "") -> pb.ReserveCreditsRequest:
    request = pb.ReserveCreditsRequest(
        reservation_id=str(uuid.uuid4()), user_id=str(user_id), amount_millicredits=amount_millicredits, job_id=job_id
    )
    request.ttl.FromSeconds(ttl_s)
    return request


def capture_request(reservation_id: str, amount_millicredits: int) -> pb.CaptureReservationRequest:
    return pb.CaptureReservationRequest(reservation_id=reservation_id, amount_millicredits=amount_millicredits)


def release_request(reservation_id: str) -> pb.ReleaseReservationRequest:
    return pb.ReleaseReservationRequest(reservation_id=reservation_id)


async def hold(stub: "LedgerServiceAsyncStub", user_id: uuid.UUID, amount_millicredits: int) -> str:
    response = await stub.ReserveCredits(reserve_request(user_id, amount_millicredits))
    return response.reservation.reservation_id


async def overdue_hold(engine: AsyncEngine, user_id: uuid.UUID, amount_millicredits: int) -> str:
    reservation_id = uuid.uuid4()
    async with engine.connect() as connection:
        await store.reserve(
            connection,
            reservation_id=reservation_id,
            job_id=reservation_id,
            user_id=user_id,
            amount_millicredits=amount_millicredits,
            ttl=OVERDUE,
        )
    return str(reservation_id)


async def outcomes(*calls: Any) -> list[Any]:
    """Responses and refusals of calls made at once."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    return [refusal_of(result) if isinstance(result, grpc.aio.AioRpcError) else result for result in results]


async def test_a_hold_moves_credits_aside(ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID):
    await fund(user_id, 100)
    request = reserve_request(user_id, 70, ttl_s=600)
    reservation = (await ledger_stub.ReserveCredits(request)).reservation
    assert (reservation.reservation_id, reservation.user_id) == (request.reservation_id, str(user_id))
    assert reservation.job_id == request.reservation_id
    assert (reservation.state, reservation.amount_millicredits, reservation.captured_millicredits) == (State.STATE_HELD, 70, 0)
    assert reservation.expire_time.ToDatetime() - reservation.create_time.ToDatetime() == timedelta(seconds=600)
    assert await balance_of(user_id) == (30, 70)
    shown = await ledger_stub.GetReservation(pb.GetReservationRequest(reservation_id=request.reservation_id))
    assert shown.reservation == reservation


@pytest.mark.parametrize("granted", [0, 69])
async def test_too_few_credits_hold_nothing(
    ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID, granted: int
):
    if granted:
        await fund(user_id, granted)
    request = reserve_request(user_id, 70)
    refusal = await refused(ledger_stub.ReserveCredits(request))
    assert refusal == Refusal(
        Code.FAILED_PRECONDITION,
        "INSUFFICIENT_CREDITS",
        {"required_millicredits": "70", "available_millicredits": str(granted)},
        (),
    )
    assert await balance_of(user_id) == (granted, 0)
    # The refusal is not kept: with the credits there, the same request holds them.
    await fund(user_id, 70)
    assert (await ledger_stub.ReserveCredits(request)).reservation.state == State.STATE_HELD


async def test_all_credits_can_be_held(ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID):
    await fund(user_id, 70)
    await hold(ledger_stub, user_id, 70)
    assert await balance_of(user_id) == (0, 70)


async def test_the_same_hold_again_is_the_same_hold(
    ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID
):
    await fund(user_id, 100)
    request = reserve_request(user_id, 70)
    first = await ledger_stub.ReserveCredits(request)
    assert await ledger_stub.ReserveCredits(request) == first
    assert await balance_of(user_id) == (30, 70)


async def test_the_same_hold_many_times_at_once_is_one_hold(
    ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID
):
    await fund(user_id, 100)
    request = reserve_request(user_id, 70)
    results = await outcomes(*(ledger_stub.ReserveCredits(request) for _ in range(20)))
    assert all(result == results[0] for result in results)
    assert results[0].reservation.state == State.STATE_HELD
    assert await balance_of(user_id) == (30, 70)


async def test_a_settled_hold_asked_for_again_shows_that_it_is_settled(
    ledger_stub: "LedgerServiceAsyncStub", engine: AsyncEngine, fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID
):
    await fund(user_id, 100)
    request = reserve_request(user_id, 70)
    await ledger_stub.ReserveCredits(request)
    await ledger_stub.ReleaseReservation(release_request(request.reservation_id))
    assert (await ledger_stub.ReserveCredits(request)).reservation.state == State.STATE_RELEASED
    assert await balance_of(user_id) == (100, 0)

    reservation_id = uuid.UUID(await overdue_hold(engine, user_id, 70))
    async with engine.connect() as connection:
        again = await store.reserve(
            connection, reservation_id=reservation_id, job_id=reservation_id, user_id=user_id, amount_millicredits=70, ttl=OVERDUE
        )
    assert again.reservation is not None
    assert again.reservation.state == "expired"
    assert await balance_of(user_id) == (100, 0)


async def test_every_answer_names_the_job_of_the_hold(ledger_stub: "LedgerServiceAsyncStub", fund: Fund, user_id: uuid.UUID):
    await fund(user_id, 100)
    job_id = str(uuid.uuid4())
    first, again = (reserve_request(user_id, 30, job_id=job_id) for _ in range(2))
    answers = [
        await ledger_stub.ReserveCredits(first),
        await ledger_stub.ReserveCredits(first),
        await ledger_stub.GetReservation(pb.GetReservationRequest(reservation_id=first.reservation_id)),
        await ledger_stub.ReleaseReservation(release_request(first.reservation_id)),
        await ledger_stub.ReserveCredits(again),
        await ledger_stub.CaptureReservation(capture_request(again.reservation_id, 30)),
    ]
    assert [(answer.reservation.reservation_id, answer.reservation.job_id) for answer in answers] == [
        *[(first.reservation_id, job_id)] * 4,
        *[(again.reservation_id, job_id)] * 2,
    ]


async def test_a_job_that_is_not_named_is_the_one_with_the_id_of_the_hold(
    ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID
):
    await fund(user_id, 100)
    unnamed = reserve_request(user_id, 70)
    named = pb.ReserveCreditsRequest()
    named.CopyFrom(unnamed)
    named.job_id = unnamed.reservation_id
    assert await ledger_stub.ReserveCredits(unnamed) == await ledger_stub.ReserveCredits(named)
    assert await balance_of(user_id) == (30, 70)


@pytest.mark.parametrize("change", ["amount", "user", "ttl", "job"])
async def test_an_id_used_for_another_hold_is_refused(
    ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID, change: str
):
    await fund(user_id, 100)
    request = reserve_request(user_id, 70)
    await ledger_stub.ReserveCredits(request)
    match change:
        case "amount":
            request.amount_millicredits = 7
        case "user":
            request.user_id = str(uuid.uuid4())
        case "job":
            request.job_id = str(uuid.uuid4())
        case _:
            request.ttl.FromSeconds(60)
    refusal = await refused(ledger_stub.ReserveCredits(request))
    assert (refusal.code, refusal.reason) == (Code.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    assert await balance_of(user_id) == (30, 70)


async def test_one_id_for_two_users_at_once_holds_for_one(ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf):
    one, other = uuid.uuid4(), uuid.uuid4()
    await fund(one, 100)
    await fund(other, 100)
    for round_ in range(1, 11):
        requests = [reserve_request(one, 1), reserve_request(other, 1)]
        requests[1].reservation_id = requests[0].reservation_id
        results = await outcomes(*(ledger_stub.ReserveCredits(request) for request in requests))
        assert sorted(result.reason for result in results if isinstance(result, Refusal)) == ["REQUEST_ID_REUSED"]
        assert (await balance_of(one))[1] + (await balance_of(other))[1] == round_


@pytest.mark.parametrize("paid", [1, 30, 70])
async def test_a_capture_takes_its_part_and_gives_the_rest_back(
    ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID, paid: int
):
    await fund(user_id, 100)
    reservation_id = await hold(ledger_stub, user_id, 70)
    first = await ledger_stub.CaptureReservation(capture_request(reservation_id, paid))
    assert (first.reservation.state, first.reservation.captured_millicredits) == (State.STATE_CAPTURED, paid)
    assert await balance_of(user_id) == (100 - paid, 0)
    assert await ledger_stub.CaptureReservation(capture_request(reservation_id, paid)) == first
    assert await balance_of(user_id) == (100 - paid, 0)


async def test_a_second_capture_with_another_amount_is_refused(
    ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID
):
    await fund(user_id, 100)
    reservation_id = await hold(ledger_stub, user_id, 70)
    await ledger_stub.CaptureReservation(capture_request(reservation_id, 30))
    refusal = await refused(ledger_stub.CaptureReservation(capture_request(reservation_id, 31)))
    assert (refusal.code, refusal.reason) == (Code.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    assert await balance_of(user_id) == (70, 0)


async def test_a_capture_of_more_than_is_held_takes_nothing(
    ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID
):
    await fund(user_id, 100)
    reservation_id = await hold(ledger_stub, user_id, 70)
    for amount in (71, 2**63 - 1):
        refusal = await refused(ledger_stub.CaptureReservation(capture_request(reservation_id, amount)))
        assert (refusal.code, refusal.reason, refusal.fields) == (
            Code.INVALID_ARGUMENT,
            "AMOUNT_OUT_OF_RANGE",
            ("amount_millicredits",),
        )
    assert await balance_of(user_id) == (30, 70)


@pytest.mark.parametrize("amount", [0, -1])
async def test_a_capture_of_nothing_is_refused(
    ledger_stub: "LedgerServiceAsyncStub",
    engine: AsyncEngine,
    fund: Fund,
    balance_of: BalanceOf,
    user_id: uuid.UUID,
    amount: int,
):
    await fund(user_id, 100)
    reservation_id = await hold(ledger_stub, user_id, 70)
    refusal = await refused(ledger_stub.CaptureReservation(capture_request(reservation_id, amount)))
    assert (refusal.code, refusal.fields) == (Code.INVALID_ARGUMENT, ("amount_millicredits",))
    async with engine.connect() as connection:
        answer = await store.capture(connection, reservation_id=uuid.UUID(reservation_id), amount_millicredits=amount)
    assert answer.outcome == "amount_out_of_range"
    assert await balance_of(user_id) == (30, 70)


async def test_a_release_gives_all_back_once(ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID):
    await fund(user_id, 100)
    reservation_id = await hold(ledger_stub, user_id, 70)
    first = await ledger_stub.ReleaseReservation(release_request(reservation_id))
    assert (first.reservation.state, first.reservation.captured_millicredits) == (State.STATE_RELEASED, 0)
    assert await ledger_stub.ReleaseReservation(release_request(reservation_id)) == first
    assert await balance_of(user_id) == (100, 0)


async def test_captured_released_and_expired_are_told_apart(
    ledger_stub: "LedgerServiceAsyncStub", engine: AsyncEngine, fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID
):
    await fund(user_id, 100)
    captured = await hold(ledger_stub, user_id, 10)
    await ledger_stub.CaptureReservation(capture_request(captured, 10))
    released = await hold(ledger_stub, user_id, 10)
    await ledger_stub.ReleaseReservation(release_request(released))
    expired = await overdue_hold(engine, user_id, 10)

    refusals = [
        await refused(ledger_stub.ReleaseReservation(release_request(captured))),
        await refused(ledger_stub.CaptureReservation(capture_request(released, 10))),
        await refused(ledger_stub.CaptureReservation(capture_request(expired, 10))),
        await refused(ledger_stub.ReleaseReservation(release_request(expired))),
    ]
    assert {refusal.code for refusal in refusals} == {Code.FAILED_PRECONDITION}
    assert [refusal.reason for refusal in refusals] == [
        "RESERVATION_CAPTURED",
        "RESERVATION_RELEASED",
        "RESERVATION_EXPIRED",
        "RESERVATION_EXPIRED",
    ]
    assert await balance_of(user_id) == (90, 0)


@pytest.mark.parametrize("settle", ["capture", "release"])
async def test_a_hold_that_ran_out_gives_its_credits_back_whoever_finds_it(
    ledger_stub: "LedgerServiceAsyncStub", engine: AsyncEngine, fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID, settle: str
):
    await fund(user_id, 100)
    reservation_id = await overdue_hold(engine, user_id, 70)
    assert await balance_of(user_id) == (30, 70)
    # It is no hold any more, also before its credits are back.
    shown = await ledger_stub.GetReservation(pb.GetReservationRequest(reservation_id=reservation_id))
    assert shown.reservation.state == State.STATE_EXPIRED
    call = (
        ledger_stub.CaptureReservation(capture_request(reservation_id, 70))
        if settle == "capture"
        else ledger_stub.ReleaseReservation(release_request(reservation_id))
    )
    assert (await refused(call)).reason == "RESERVATION_EXPIRED"
    assert await balance_of(user_id) == (100, 0)


async def test_what_was_never_reserved_is_not_found(ledger_stub: "LedgerServiceAsyncStub"):
    nobody = str(uuid.uuid4())
    for refusal in (
        await refused(ledger_stub.CaptureReservation(capture_request(nobody, 1))),
        await refused(ledger_stub.ReleaseReservation(release_request(nobody))),
        await refused(ledger_stub.GetReservation(pb.GetReservationRequest(reservation_id=nobody))),
    ):
        assert (refusal.code, refusal.reason) == (Code.NOT_FOUND, "NOT_FOUND")


@pytest.mark.parametrize(
    ("field", "ttl_s", "amount", "job_id"),
    [
        ("ttl", 0, 1, ""),
        ("ttl", 2592001, 1, ""),
        ("amount_millicredits", 60, 0, ""),
        ("amount_millicredits", 60, -5, ""),
        ("job_id", 60, 1, "mine"),
    ],
)
async def test_bad_holds_name_the_field(
    ledger_stub: "LedgerServiceAsyncStub", user_id: uuid.UUID, field: str, ttl_s: int, amount: int, job_id: str
):
    refusal = await refused(ledger_stub.ReserveCredits(reserve_request(user_id, amount, ttl_s=ttl_s, job_id=job_id)))
    assert (refusal.code, refusal.fields) == (Code.INVALID_ARGUMENT, (field,))


async def test_parallel_holds_on_a_small_balance_are_exactly_what_it_covers(
    ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID
):
    await fund(user_id, 105)
    results = await outcomes(*(ledger_stub.ReserveCredits(reserve_request(user_id, 10)) for _ in range(40)))
    refusals = [result for result in results if isinstance(result, Refusal)]
    assert len(results) - len(refusals) == 10
    assert {(refusal.reason, refusal.metadata["available_millicredits"]) for refusal in refusals} == {("INSUFFICIENT_CREDITS", "5")}
    assert await balance_of(user_id) == (5, 100)


async def test_of_a_capture_and_a_release_at_once_one_wins(
    ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID
):
    await fund(user_id, 1000)
    revenue = 0
    for _ in range(20):
        reservation_id = await hold(ledger_stub, user_id, 10)
        captured, released = await outcomes(
            ledger_stub.CaptureReservation(capture_request(reservation_id, 7)),
            ledger_stub.ReleaseReservation(release_request(reservation_id)),
        )
        if isinstance(captured, Refusal):
            assert captured.reason == "RESERVATION_RELEASED"
            assert released.reservation.state == State.STATE_RELEASED
        else:
            assert released.reason == "RESERVATION_CAPTURED"
            assert captured.reservation.state == State.STATE_CAPTURED
            revenue += 7
        assert await balance_of(user_id) == (1000 - revenue, 0)


async def test_of_two_captures_at_once_with_different_amounts_one_wins(
    ledger_stub: "LedgerServiceAsyncStub", fund: Fund, balance_of: BalanceOf, user_id: uuid.UUID
):
    await fund(user_id, 100)
    reservation_id = await hold(ledger_stub, user_id, 70)
    results = await outcomes(*(ledger_stub.CaptureReservation(capture_request(reservation_id, amount)) for amount in range(1, 11)))
    (won,) = (result.reservation for result in results if isinstance(result, pb.CaptureReservationResponse))
    assert {result.reason for result in results if isinstance(result, Refusal)} == {"REQUEST_ID_REUSED"}
    assert await balance_of(user_id) == (100 - won.captured_millicredits, 0)
