"""Rules of the ledger that need no database."""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from credit_service import ledger
from credit_service.ledger import Entry, EntryQuery, GrantAnswer, Outcome, Reservation, ReservationAnswer, State
from servicekit.errors import MeshError, Reason, ReasonValue

MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
USER = uuid.UUID(int=1)
HELD = Reservation(uuid.UUID(int=2), uuid.UUID(int=3), USER, State.HELD, 70, 0, MOMENT, MOMENT)

Code = grpc.StatusCode


def reserved(answer: ReservationAnswer) -> Reservation:
    return ledger.reserved(answer, amount_millicredits=70)


@pytest.mark.parametrize("operation", [reserved, ledger.captured, ledger.released, ledger.shown])
def test_an_accepted_operation_shows_the_reservation(operation: Callable[[ReservationAnswer], Reservation]):
    assert operation(ReservationAnswer(Outcome.OK, HELD)) is HELD


@pytest.mark.parametrize(
    ("operation", "outcome", "code", "reason"),
    [
        (reserved, Outcome.REUSED, Code.ALREADY_EXISTS, Reason.ERROR_REASON_REQUEST_ID_REUSED),
        (reserved, Outcome.AMOUNT_OUT_OF_RANGE, Code.INVALID_ARGUMENT, Reason.ERROR_REASON_AMOUNT_OUT_OF_RANGE),
        (ledger.captured, Outcome.NOT_FOUND, Code.NOT_FOUND, Reason.ERROR_REASON_NOT_FOUND),
        (ledger.captured, Outcome.REUSED, Code.ALREADY_EXISTS, Reason.ERROR_REASON_REQUEST_ID_REUSED),
        (ledger.captured, Outcome.RELEASED, Code.FAILED_PRECONDITION, Reason.ERROR_REASON_RESERVATION_RELEASED),
        (ledger.captured, Outcome.EXPIRED, Code.FAILED_PRECONDITION, Reason.ERROR_REASON_RESERVATION_EXPIRED),
        (ledger.captured, Outcome.AMOUNT_OUT_OF_RANGE, Code.INVALID_ARGUMENT, Reason.ERROR_REASON_AMOUNT_OUT_OF_RANGE),
        (ledger.released, Outcome.NOT_FOUND, Code.NOT_FOUND, Reason.ERROR_REASON_NOT_FOUND),
        (ledger.released, Outcome.CAPTURED, Code.FAILED_PRECONDITION, Reason.ERROR_REASON_RESERVATION_CAPTURED),
        (ledger.released, Outcome.EXPIRED, Code.FAILED_PRECONDITION, Reason.ERROR_REASON_RESERVATION_EXPIRED),
        (ledger.shown, Outcome.NOT_FOUND, Code.NOT_FOUND, Reason.ERROR_REASON_NOT_FOUND),
    ],
)
def test_each_refusal_has_its_own_error(
    operation: Callable[[ReservationAnswer], Reservation], outcome: Outcome, code: grpc.StatusCode, reason: ReasonValue
):
    with pytest.raises(MeshError) as raised:
        operation(ReservationAnswer(outcome, HELD))
    assert (raised.value.code, raised.value.reason) == (code, reason)


def test_too_few_credits_say_what_is_needed_and_what_is_there():
    with pytest.raises(MeshError) as raised:
        ledger.reserved(ReservationAnswer(Outcome.INSUFFICIENT, None, 69), amount_millicredits=70)
    assert (raised.value.code, raised.value.reason) == (Code.FAILED_PRECONDITION, Reason.ERROR_REASON_INSUFFICIENT_CREDITS)
    assert raised.value.metadata == {"required_millicredits": "70", "available_millicredits": "69"}


def test_an_amount_out_of_range_names_the_field_and_the_range():
    with pytest.raises(MeshError) as raised:
        ledger.captured(ReservationAnswer(Outcome.AMOUNT_OUT_OF_RANGE, HELD))
    assert raised.value.violations == (("amount_millicredits", "must be 1 to 70, which is what the reservation holds"),)


@pytest.mark.parametrize(
    ("outcome", "code", "reason"),
    [
        (Outcome.REUSED, Code.ALREADY_EXISTS, Reason.ERROR_REASON_REQUEST_ID_REUSED),
        (Outcome.AMOUNT_OUT_OF_RANGE, Code.INVALID_ARGUMENT, Reason.ERROR_REASON_AMOUNT_OUT_OF_RANGE),
    ],
)
def test_refused_grants(outcome: Outcome, code: grpc.StatusCode, reason: ReasonValue):
    with pytest.raises(MeshError) as raised:
        ledger.granted(GrantAnswer(outcome, None))
    assert (raised.value.code, raised.value.reason) == (code, reason)


def test_an_answer_that_an_operation_cannot_have_is_a_fault_of_ours():
    with pytest.raises(AssertionError):
        ledger.granted(GrantAnswer(Outcome.EXPIRED, None))
    with pytest.raises(AssertionError):
        ledger.released(ReservationAnswer(Outcome.OK, None))


def test_a_token_that_names_no_user_is_refused():
    with pytest.raises(MeshError) as raised:
        ledger.user_id_of("root")
    assert (raised.value.code, raised.value.reason) == (Code.UNAUTHENTICATED, Reason.ERROR_REASON_TOKEN_INVALID)


def entry(entry_id: int) -> Entry:
    return Entry(entry_id, entry_id, ledger.Kind.GRANT, ledger.Account.AVAILABLE, 1, 1, None, "why", MOMENT)


def test_the_last_page_has_no_token_and_every_other_has_one_that_goes_on_after_it():
    query = EntryQuery(USER)
    assert ledger.page(query, [entry(3), entry(2)], 2) == ([entry(3), entry(2)], "")
    entries, token = ledger.page(query, [entry(3), entry(2), entry(1)], 2)
    assert entries == [entry(3), entry(2)]
    assert query.position(token) == 2


@given(st.uuids(), st.none() | st.uuids(), st.integers(1, 2**63 - 1))
def test_tokens_come_back_as_they_went(user_id: uuid.UUID, job_id: uuid.UUID | None, entry_id: int):
    query = EntryQuery(user_id, job_id)
    assert query.position(query.token(entry_id)) == entry_id


@pytest.mark.parametrize("other", [EntryQuery(uuid.UUID(int=9)), EntryQuery(USER, uuid.UUID(int=9))])
def test_a_token_of_another_query_is_no_token(other: EntryQuery):
    with pytest.raises(MeshError):
        EntryQuery(USER).position(other.token(7))


def test_a_token_has_one_spelling():
    query = EntryQuery(USER)
    token = query.token(7)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    same_bytes = token[:-1] + alphabet[alphabet.index(token[-1]) ^ 1]
    for spelling in (same_bytes, token + "==", token + "\n", token[:-1], token + "A"):
        with pytest.raises(MeshError):
            query.position(spelling)
