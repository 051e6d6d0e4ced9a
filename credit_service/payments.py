"""Buying credits: what a purchase is, what a payment provider can tell about it, and what the ledger answers. No I/O.

Providers are adapters of `PaymentProvider` (`stripe_payments`). What a notice moves is decided in PostgreSQL (`migrations/`), under the
lock on the user's account: notices come twice and in any order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol
from uuid import UUID

import grpc

from credit_service.ledger import Outcome
from credit_service.prices import CreditPackage, PriceTable
from servicekit import paging
from servicekit.errors import MeshError, Reason, invalid, not_found, unauthenticated, unavailable

RETRY_AFTER_S = 2.0
UNOPENED_LIFE = timedelta(days=1)
"""How long a purchase waits for its checkout to be opened by a repeat; as long as a checkout is open."""
OPEN_TOP_UPS_MAX = 10
"""Purchases of one user whose checkout is open."""


class State(StrEnum):
    """Where a purchase stands; it only ever moves down this list."""

    PENDING = "pending"
    FAILED = "failed"
    EXPIRED = "expired"
    PAID = "paid"
    REFUNDED = "refunded"


class EventKind(StrEnum):
    """What a provider tells; IGNORED is everything that changes no purchase."""

    PAID = "paid"
    FAILED = "failed"
    EXPIRED = "expired"
    REFUNDED = "refunded"
    IGNORED = "ignored"


class EventOutcome(StrEnum):
    """What came of a notice."""

    CREDITED = "credited"
    TAKEN_BACK = "taken_back"
    NOTED = "noted"
    """It changed the purchase, and no balance."""
    STALE = "stale"
    """More than it says was known before."""
    IGNORED = "ignored"
    UNKNOWN_TOP_UP = "unknown_top_up"
    """It names a purchase that this deployment never began."""
    MISMATCH = "mismatch"
    """Its amount or currency is not that of the purchase: people have to look at it."""


@dataclass(frozen=True, slots=True)
class TopUp:
    """A purchase of credits. `checkout_url` and `expire_time` are None until the provider has opened the checkout."""

    top_up_id: UUID
    user_id: UUID
    state: State
    package_id: str
    amount_millicredits: int
    price_minor: int
    currency: str
    checkout_url: str | None
    expire_time: datetime | None
    create_time: datetime
    pay_time: datetime | None
    refunded_millicredits: int
    uncollected_millicredits: int

    @property
    def needs_checkout(self) -> bool:
        """Whether it was begun, but no checkout opened: new, or whoever began it died there."""
        return self.state is State.PENDING and self.checkout_url is None

    def state_at(self, moment: datetime) -> State:
        """The state to show: a purchase whose checkout never opened has nobody who would say that it is over."""
        if self.needs_checkout and moment > self.create_time + UNOPENED_LIFE:
            return State.EXPIRED
        return self.state


@dataclass(frozen=True, slots=True)
class Checkout:
    """A checkout that a provider opened: its own id for it, where to pay, until when."""

    reference: str
    url: str
    expire_time: datetime


@dataclass(frozen=True, slots=True)
class PaymentEvent:
    """A notice of a provider, its signature verified.

    `amount_minor` is the money of the whole payment, `refunded_minor` what of it has been given back so far, over all refunds.
    """

    provider: str
    event_id: str
    event_type: str
    kind: EventKind
    event_time: datetime
    top_up_id: UUID | None = None
    amount_minor: int | None = None
    refunded_minor: int | None = None
    currency: str | None = None


@dataclass(frozen=True, slots=True)
class EventAnswer:
    """What the ledger says to a notice; `user_id` is None where it is about nobody's purchase here."""

    outcome: EventOutcome
    replayed: bool
    user_id: UUID | None


class PaymentProvider(Protocol):
    """Where people pay."""

    @property
    def name(self) -> str:
        """What the ledger calls it."""
        ...

    async def create_checkout(self, top_up: TopUp) -> Checkout:
        """Open the checkout of a purchase; for the same purchase again, the same one. Raises UNAVAILABLE."""
        ...

    def parse_event(self, body: bytes, metadata: Mapping[str, str]) -> PaymentEvent:
        """Verify and read a notice. Raises UNAUTHENTICATED (SIGNATURE_INVALID), INVALID_ARGUMENT."""
        ...


def package_of(prices: PriceTable, package_id: str) -> CreditPackage:
    """The package of this name. Raises INVALID_ARGUMENT."""
    package = prices.packages.get(package_id)
    if package is None:
        raise invalid("package_id", "there is no such package: see ListPrices")
    return package


def begun(outcome: Outcome, top_up: TopUp | None) -> TopUp:
    """The purchase that a request began, now or before.

    Raises ALREADY_EXISTS (REQUEST_ID_REUSED), RESOURCE_EXHAUSTED (LIMIT_REACHED).
    """
    if outcome is Outcome.TOO_MANY:
        raise MeshError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            Reason.ERROR_REASON_LIMIT_REACHED,
            f"{OPEN_TOP_UPS_MAX} purchases are open: pay one of them, or wait until they expire",
        )
    if top_up is None:
        raise MeshError(
            grpc.StatusCode.ALREADY_EXISTS, Reason.ERROR_REASON_REQUEST_ID_REUSED, "request_id was used before for another purchase"
        )
    return top_up


def shown(top_up: TopUp | None) -> TopUp:
    """The purchase. Raises NOT_FOUND."""
    if top_up is None:
        raise not_found("top-up")
    return top_up


def not_offered() -> MeshError:
    """UNIMPLEMENTED: nothing is sold here."""
    return MeshError(grpc.StatusCode.UNIMPLEMENTED, Reason.ERROR_REASON_NOT_OFFERED, "no payment provider is set up here")


def out_of_reach() -> MeshError:
    """UNAVAILABLE: the provider does not answer, or not now."""
    return unavailable("the payment provider is out of reach right now", RETRY_AFTER_S)


def signature_invalid(description: str) -> MeshError:
    """UNAUTHENTICATED: this notice is nobody's word."""
    return unauthenticated(Reason.ERROR_REASON_SIGNATURE_INVALID, description)


@dataclass(frozen=True, slots=True)
class TopUpQuery:
    """Whose purchases are listed; a page token is good for one user only."""

    user_id: UUID

    def position(self, token: str) -> UUID | None:
        """The purchase that a page follows; None for the first page. Raises INVALID_ARGUMENT."""
        position = paging.decode_token(token, self.user_id.bytes, length=paging.ID_BYTES)
        return None if position is None else UUID(bytes=position)

    def page(self, found: Sequence[TopUp], limit: int) -> tuple[Sequence[TopUp], str]:
        """A page and the token of the next, from up to `limit + 1` purchases: the one too many says that there is a next."""
        if len(found) <= limit:
            return found, ""
        return found[:limit], paging.encode_token(found[limit - 1].top_up_id.bytes, self.user_id.bytes)
