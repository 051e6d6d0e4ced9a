"""The rules of the ledger that need no database: what an outcome means to a caller, pages, page tokens.

Moving credits is done by the stored functions in PostgreSQL (`migrations/`), reached through `store`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from uuid import UUID

import grpc

from servicekit import paging
from servicekit.errors import MeshError, Reason, invalid, not_found, precondition, unauthenticated

_ENTRY_ID_BYTES = 8
INT64_MAX = 2**63 - 1

KEY_CEILINGS_MAX = 1000
"""Ceilings of API keys that one user can have."""


class Outcome(StrEnum):
    """What a stored function says about a request; everything but OK is a refusal."""

    OK = "ok"
    NOT_FOUND = "not_found"
    REUSED = "reused"
    INSUFFICIENT = "insufficient"
    AMOUNT_OUT_OF_RANGE = "amount_out_of_range"
    EXPIRE_TIME_PASSED = "expire_time_passed"
    CEILING = "ceiling"
    TOO_MANY = "too_many"
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
    CLAWBACK = "clawback"
    LAPSE = "lapse"
    PLAN_GRANT = "plan_grant"
    TOP_UP = "top_up"
    REFUND = "refund"


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
    """What a user has. `promotional` is the part of `available` that expires, the first of it at `next_expire_time`.

    `version` grows with every event on the account.
    """

    available_millicredits: int
    reserved_millicredits: int
    promotional_millicredits: int = 0
    next_expire_time: datetime | None = None
    version: int = 0


@dataclass(frozen=True, slots=True)
class Promotion:
    """Credits that expire together."""

    available_millicredits: int
    reserved_millicredits: int
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What an account, or one of its API keys, may spend a day and a month (UTC), and has spent or held of it."""

    api_key_id: UUID | None
    daily_millicredits: int | None
    monthly_millicredits: int | None
    spent_today_millicredits: int
    spent_this_month_millicredits: int


@dataclass(frozen=True, slots=True)
class BrokenCeiling:
    """The ceiling that leaves no room for an amount, until it starts anew."""

    api_key_id: UUID | None
    period: str
    """`day` or `month`."""
    ceiling_millicredits: int
    spent_millicredits: int
    reset_time: datetime


@dataclass(frozen=True, slots=True)
class ReceiptLine:
    """One thing that was paid for."""

    description: str
    quantity: int
    unit: str
    amount_millicredits: int


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
    model: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """What one event changed on one side of a user's balance."""

    entry_id: int
    event_id: int
    kind: Kind
    account: Account
    amount_millicredits: int
    balance_after_millicredits: int
    job_id: UUID | None
    reason: str | None
    create_time: datetime
    model: str = ""
    lines: tuple[ReceiptLine, ...] = ()
    expire_time: datetime | None = None
    top_up_id: UUID | None = None
    actor_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class GrantAnswer:
    """What the ledger says to a grant or a clawback: an outcome and, where it is OK, the balance after it.

    `available_millicredits` only where they did not suffice.
    """

    outcome: Outcome
    balance: Balance | None
    available_millicredits: int | None = None


@dataclass(frozen=True, slots=True)
class ReservationAnswer:
    """What the ledger says to an operation on a reservation.

    `available_millicredits` only where they did not suffice, `broken` only where a ceiling stands against it.
    """

    outcome: Outcome
    reservation: Reservation | None
    available_millicredits: int | None = None
    broken: BrokenCeiling | None = None


@dataclass(frozen=True, slots=True)
class Swept:
    """A user whose holds or promotional credits were over; with a `problem` nothing was done, and a person has to look."""

    user_id: UUID
    problem: str | None


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """Something in the books that does not add up."""

    problem: str
    subject: str
    expected: str
    actual: str


@dataclass(frozen=True, slots=True)
class AuditSummary:
    """What an audit looked at. `totals`: what the entries of each account add up to, over all users."""

    discrepancy_count: int
    account_count: int
    event_count: int
    entry_count: int
    reservation_count: int
    totals: dict[str, int]


def granted(answer: GrantAnswer) -> Balance:
    """The balance after a grant.

    Raises ALREADY_EXISTS (REQUEST_ID_REUSED), INVALID_ARGUMENT (AMOUNT_OUT_OF_RANGE, or an expiry in the past).
    """
    if answer.outcome is Outcome.OK and answer.balance is not None:
        return answer.balance
    if answer.outcome is Outcome.REUSED:
        raise _reused("request_id was used before for another grant")
    if answer.outcome is Outcome.AMOUNT_OUT_OF_RANGE:
        raise _out_of_range("must be at least 1 and leave the balance below 2^63")
    if answer.outcome is Outcome.EXPIRE_TIME_PASSED:
        raise invalid("expire_time", "lies in the past")
    raise AssertionError(f"a grant cannot be answered by {answer}")


def taken_back(answer: GrantAnswer, *, amount_millicredits: int) -> Balance:
    """The balance after a clawback.

    Raises ALREADY_EXISTS (REQUEST_ID_REUSED), FAILED_PRECONDITION (INSUFFICIENT_CREDITS), INVALID_ARGUMENT (AMOUNT_OUT_OF_RANGE).
    """
    if answer.outcome is Outcome.OK and answer.balance is not None:
        return answer.balance
    if answer.outcome is Outcome.REUSED:
        raise _reused("request_id was used before for another clawback")
    if answer.outcome is Outcome.INSUFFICIENT:
        raise _insufficient(amount_millicredits, answer.available_millicredits)
    if answer.outcome is Outcome.AMOUNT_OUT_OF_RANGE:
        raise _out_of_range("must be at least 1")
    raise AssertionError(f"a clawback cannot be answered by {answer}")


def accepted_ceiling(outcome: Outcome, ceiling: Ceiling) -> Ceiling:
    """The ceiling as it was set. Raises RESOURCE_EXHAUSTED (LIMIT_REACHED)."""
    if outcome is Outcome.TOO_MANY:
        raise MeshError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            Reason.ERROR_REASON_LIMIT_REACHED,
            f"at most {KEY_CEILINGS_MAX} API keys of an account can have a ceiling; lift one that is not needed any more",
        )
    return ceiling


def receipt(lines: Sequence[ReceiptLine], *, amount_millicredits: int) -> tuple[ReceiptLine, ...]:
    """The lines of a capture. Raises INVALID_ARGUMENT unless there are none or they add up to the amount."""
    total = sum(line.amount_millicredits for line in lines)
    if lines and total != amount_millicredits:
        raise invalid("lines", f"add up to {total}, not to the amount of {amount_millicredits}")
    return tuple(lines)


def reserved(answer: ReservationAnswer, *, amount_millicredits: int) -> Reservation:
    """The reservation as it stands: held, or how it was settled where the same request comes again after that.

    Raises FAILED_PRECONDITION (INSUFFICIENT_CREDITS), RESOURCE_EXHAUSTED (CEILING_REACHED), ALREADY_EXISTS (REQUEST_ID_REUSED).
    """
    if answer.outcome is Outcome.INSUFFICIENT:
        raise _insufficient(amount_millicredits, answer.available_millicredits)
    if answer.outcome is Outcome.CEILING and answer.broken is not None:
        raise _ceiling_reached(answer.broken, amount_millicredits)
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


def _insufficient(required: int, available: int | None) -> MeshError:
    return precondition(
        Reason.ERROR_REASON_INSUFFICIENT_CREDITS,
        f"{required} millicredits are needed, {available or 0} are available",
        {"required_millicredits": str(required), "available_millicredits": str(available or 0)},
    )


def _ceiling_reached(broken: BrokenCeiling, required: int) -> MeshError:
    whose = f"API key {broken.api_key_id}" if broken.api_key_id else "this account"
    description = f"{whose} may spend {broken.ceiling_millicredits} millicredits a {broken.period}"
    metadata = {
        "period": broken.period,
        "ceiling_millicredits": str(broken.ceiling_millicredits),
        "spent_millicredits": str(broken.spent_millicredits),
        "required_millicredits": str(required),
    }
    if broken.api_key_id:
        metadata["api_key_id"] = str(broken.api_key_id)
    return MeshError(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        Reason.ERROR_REASON_CEILING_REACHED,
        f"{description}; {broken.spent_millicredits} are spent or held, {required} more are needed",
        metadata=metadata,
        quota=[(f"api_key:{broken.api_key_id}" if broken.api_key_id else "account", description)],
        retry_after_s=max(0.0, (broken.reset_time - datetime.now(UTC)).total_seconds()),
    )


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
    """Whose entries are listed, and which of them; a page token is good for one query only."""

    user_id: UUID
    job_id: UUID | None = None
    kinds: frozenset[Kind] = field(default_factory=frozenset[Kind])
    start_time: datetime | None = None
    end_time: datetime | None = None

    def token(self, entry_id: int) -> str:
        """The token of the page that follows `entry_id`."""
        return paging.encode_token(entry_id.to_bytes(_ENTRY_ID_BYTES), self._bytes())

    def position(self, token: str) -> int | None:
        """The entry that a page follows; None for the first page. Raises INVALID_ARGUMENT."""
        position = paging.decode_token(token, self._bytes(), length=_ENTRY_ID_BYTES)
        return None if position is None else min(int.from_bytes(position), INT64_MAX)

    def _bytes(self) -> bytes:
        parts = (self.user_id, self.job_id, sorted(self.kinds), self.start_time, self.end_time)
        return hashlib.sha256(repr([str(part) for part in parts]).encode()).digest()


def page(query: EntryQuery, found: Sequence[Entry], limit: int) -> tuple[Sequence[Entry], str]:
    """A page and the token of the next, from up to `limit + 1` entries: the one too many says that there is a next."""
    if len(found) <= limit:
        return found, ""
    return found[:limit], query.token(found[limit - 1].entry_id)
