"""The rules of the ledger that need no database: what an outcome means to a caller, pages, page tokens.

Moving credits is done by the stored functions in PostgreSQL (`migrations/`), reached through `store`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

import grpc

from servicekit import paging
from servicekit.errors import MeshError, Reason, invalid, not_found, precondition, unauthenticated

_ENTRY_ID_BYTES = 8


class Outcome(StrEnum):
    """What a stored function says about a request; everything but OK is a refusal."""

    OK = "ok"
    NOT_FOUND = "not_found"
    REUSED = "reused"
    INSUFFICIENT = "insufficient"
    AMOUNT_OUT_OF_RANGE = "amount_out_of_range"
    CAPTURED = "captured"
    RELEASED = "released"
    EXPIRED = "expired"


class Kind(StrEnum):
    """What moved the credits."""

    GRANT = "grant"
    RESERVE = "reserve"
    CAPTURE = "capture"
    RELEASE = "release"
    EXPIRE = "expire"


class Account(StrEnum):
    """A user's side of the ledger."""

    AVAILABLE = "available"
    RESERVED = "reserved"


class State(StrEnum):
    """Where a reservation stands; all but HELD are final."""

    HELD = "held"
    CAPTURED = "captured"
    RELEASED = "released"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Balance:
    """What a user has."""

    available_millicredits: int
    reserved_millicredits: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """A hold on a user's credits, for a job; a job that is retried has several, one after the other."""

    reservation_id: UUID
    job_id: UUID
    user_id: UUID
    state: State
    amount_millicredits: int
    captured_millicredits: int
    expire_time: datetime
    create_time: datetime


@dataclass(frozen=True, slots=True)
class Entry:
    """What one event changed on one side of a user's balance."""

    entry_id: int
    kind: Kind
    account: Account
    amount_millicredits: int
    balance_after_millicredits: int
    job_id: UUID | None
    reason: str | None
    create_time: datetime


@dataclass(frozen=True, slots=True)
class GrantAnswer:
    """What the ledger says to a grant: an outcome and, where it is OK, the balance after it."""

    outcome: Outcome
    balance: Balance | None


@dataclass(frozen=True, slots=True)
class ReservationAnswer:
    """What the ledger says to an operation on a reservation; `available_millicredits` only where they did not suffice."""

    outcome: Outcome
    reservation: Reservation | None
    available_millicredits: int | None = None


def granted(answer: GrantAnswer) -> Balance:
    """The balance after a grant. Raises ALREADY_EXISTS (REQUEST_ID_REUSED), INVALID_ARGUMENT (AMOUNT_OUT_OF_RANGE)."""
    if answer.outcome is Outcome.OK and answer.balance is not None:
        return answer.balance
    if answer.outcome is Outcome.REUSED:
        raise _reused("request_id was used before for another grant")
    if answer.outcome is Outcome.AMOUNT_OUT_OF_RANGE:
        raise _out_of_range("must be at least 1 and leave the balance below 2^63")
    raise AssertionError(f"a grant cannot be answered by {answer}")


def reserved(answer: ReservationAnswer, *, amount_millicredits: int) -> Reservation:
    """The reservation as it stands: held, or how it was settled where the same request comes again after that.

    Raises FAILED_PRECONDITION (INSUFFICIENT_CREDITS), ALREADY_EXISTS (REQUEST_ID_REUSED).
    """
    if answer.outcome is Outcome.INSUFFICIENT:
        available = answer.available_millicredits or 0
        raise precondition(
            Reason.ERROR_REASON_INSUFFICIENT_CREDITS,
            f"{amount_millicredits} millicredits are needed, {available} are available",
            {"required_millicredits": str(amount_millicredits), "available_millicredits": str(available)},
        )
    if answer.outcome is Outcome.REUSED:
        raise _reused("reservation_id was used before for another reservation")
    if answer.outcome is Outcome.AMOUNT_OUT_OF_RANGE:
        raise _out_of_range("must be at least 1")
    return _held_or_settled(answer)


def captured(answer: ReservationAnswer) -> Reservation:
    """The captured reservation.

    Raises NOT_FOUND, ALREADY_EXISTS (REQUEST_ID_REUSED: captured with another amount), FAILED_PRECONDITION
    (RESERVATION_RELEASED, RESERVATION_EXPIRED), INVALID_ARGUMENT (AMOUNT_OUT_OF_RANGE).
    """
    if answer.outcome is Outcome.REUSED:
        raise _reused("the reservation was captured before with another amount")
    if answer.outcome is Outcome.AMOUNT_OUT_OF_RANGE:
        held = answer.reservation.amount_millicredits if answer.reservation else 0
        raise _out_of_range(f"must be 1 to {held}, which is what the reservation holds")
    return _held_or_settled(answer)


def released(answer: ReservationAnswer) -> Reservation:
    """The released reservation. Raises NOT_FOUND, FAILED_PRECONDITION (RESERVATION_CAPTURED, RESERVATION_EXPIRED)."""
    return _held_or_settled(answer)


def shown(answer: ReservationAnswer) -> Reservation:
    """The reservation as it stands. Raises NOT_FOUND."""
    return _held_or_settled(answer)


_SETTLED = {
    Outcome.CAPTURED: (Reason.ERROR_REASON_RESERVATION_CAPTURED, "the reservation was captured before"),
    Outcome.RELEASED: (Reason.ERROR_REASON_RESERVATION_RELEASED, "the reservation was released before"),
    Outcome.EXPIRED: (Reason.ERROR_REASON_RESERVATION_EXPIRED, "the reservation has expired; its credits went back"),
}


def _held_or_settled(answer: ReservationAnswer) -> Reservation:
    if answer.outcome is Outcome.OK and answer.reservation is not None:
        return answer.reservation
    if answer.outcome is Outcome.NOT_FOUND:
        raise not_found("reservation")
    if answer.outcome in _SETTLED:
        raise precondition(*_SETTLED[answer.outcome])
    raise AssertionError(f"an operation on a reservation cannot be answered by {answer}")


def _reused(message: str) -> MeshError:
    return MeshError(grpc.StatusCode.ALREADY_EXISTS, Reason.ERROR_REASON_REQUEST_ID_REUSED, message)


def _out_of_range(description: str) -> MeshError:
    return invalid("amount_millicredits", description, reason=Reason.ERROR_REASON_AMOUNT_OUT_OF_RANGE)


def user_id_of(subject: str) -> UUID:
    """The user of an access token. Raises UNAUTHENTICATED for a subject that is no user id, whoever signed it."""
    try:
        return UUID(subject)
    except ValueError:
        raise unauthenticated(Reason.ERROR_REASON_TOKEN_INVALID, "the access token names no user") from None


@dataclass(frozen=True, slots=True)
class EntryQuery:
    """Whose entries are listed, and of which job; a page token is good for one query only."""

    user_id: UUID
    job_id: UUID | None = None

    def token(self, entry_id: int) -> str:
        """The token of the page that follows `entry_id`."""
        return paging.encode_token(entry_id.to_bytes(_ENTRY_ID_BYTES), self._bytes())

    def position(self, token: str) -> int | None:
        """The entry that a page follows; None for the first page. Raises INVALID_ARGUMENT."""
        position = paging.decode_token(token, self._bytes())
        return None if position is None else int.from_bytes(position)

    def _bytes(self) -> bytes:
        return self.user_id.bytes + (self.job_id.bytes if self.job_id else b"")


def page(query: EntryQuery, found: Sequence[Entry], limit: int) -> tuple[Sequence[Entry], str]:
    """A page and the token of the next, from up to `limit + 1` entries: the one too many says that there is a next."""
    if len(found) <= limit:
        return found, ""
    return found[:limit], query.token(found[limit - 1].entry_id)
