"""Stripe as a payment provider: Checkout sessions, and webhooks signed with the endpoint's secret."""

import asyncio
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit
from uuid import UUID

import stripe
import structlog
from pydantic import BaseModel, ValidationError

from credit_service.payments import Checkout, EventKind, PaymentEvent, TopUp, out_of_reach, signature_invalid
from servicekit.errors import invalid

SIGNATURE_KEY = "stripe-signature"
SIGNATURE_TOLERANCE_S = 300
"""How old a signature may be: a notice that somebody recorded cannot be sent later."""
TOP_UP_KEY = "genmesh_top_up_id"
"""In the metadata of sessions and payments: what has it is ours, whatever else is sold with the same Stripe account."""
EVENT_BYTES_MAX = 512 * 1024
"""Many times what Stripe sends: anybody may call, and a signature costs as much time as its body is long."""
CHECKOUTS_MAX = 8
"""Checkouts opened at once by one process; each takes a thread."""
CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 5.0
NETWORK_RETRIES = 2
CHECKOUT_TIMEOUT_S = 20.0
"""All tries and the pauses between them; below the edge's time-out."""

TRANSIENT_STATUSES = frozenset({409, 429})
SERVER_ERRORS_FROM = 500

_log = structlog.get_logger(__name__)

# The library would keep an id of this machine in the home directory and tell Stripe about it and its platform.
stripe.enable_telemetry = False


# The fields that are read of what Stripe sends.
class _Data(BaseModel):
    object: dict[str, Any]


class _Event(BaseModel):
    object: Literal["event"]
    id: str
    type: str
    created: datetime
    data: _Data


class _Labelled(BaseModel):
    metadata: dict[str, str] | None = None


class _Session(BaseModel):
    amount_total: int
    currency: str
    payment_status: Literal["paid", "unpaid", "no_payment_required"]


class _Charge(BaseModel):
    amount: int
    amount_refunded: int
    currency: str


class StripePayments:
    """A PaymentProvider. Use as a context manager, so that its threads end with it."""

    name = "stripe"

    def __init__(
        self, *, secret_key: str, webhook_secret: str, return_url: str, api_url: str | None = None, read_timeout_s: float = READ_TIMEOUT_S
    ) -> None:
        """`return_url`: where people are sent back to after the checkout; `api_url`: another address than Stripe's."""
        self._client = stripe.StripeClient(
            secret_key,
            http_client=stripe.RequestsClient(timeout=(CONNECT_TIMEOUT_S, read_timeout_s)),
            max_network_retries=NETWORK_RETRIES,
            base_addresses={"api": api_url} if api_url else {},
        )
        self._webhook_secret = webhook_secret
        self._return_url = urlsplit(return_url)
        # The library's own asynchronous clients bring an HTTP stack of their own; a checkout is rare, a thread will do.
        self._threads = ThreadPoolExecutor(CHECKOUTS_MAX, thread_name_prefix="stripe")
        self._free = threading.BoundedSemaphore(CHECKOUTS_MAX)

    def __enter__(self) -> "StripePayments":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def create_checkout(self, top_up: TopUp) -> Checkout:
        """See PaymentProvider. What Stripe refuses for good (a wrong key, say) is a fault of ours and becomes INTERNAL."""
        if not self._free.acquire(blocking=False):
            raise out_of_reach()
        work = self._threads.submit(self._create_session, top_up)
        # Not when the caller has gone, but when the thread is free again.
        work.add_done_callback(lambda _: self._free.release())
        try:
            async with asyncio.timeout(CHECKOUT_TIMEOUT_S):
                session = await asyncio.wrap_future(work)
        except (TimeoutError, stripe.APIConnectionError) as error:
            _log.warning("payments.provider_unreachable", top_up_id=str(top_up.top_up_id), error=type(error).__name__)
            raise out_of_reach() from error
        except stripe.StripeError as error:
            status = error.http_status or 0
            if status in TRANSIENT_STATUSES or status >= SERVER_ERRORS_FROM:
                _log.warning("payments.provider_failed", top_up_id=str(top_up.top_up_id), status=status, request_id=error.request_id)
                raise out_of_reach() from error
            # Without the library's frames: they hold the secret key, and some logs show what frames hold.
            raise RuntimeError(f"Stripe refuses to open a checkout: {error!r}") from None
        if session.url is None:
            raise RuntimeError(f"Stripe opened the session {session.id} without a URL")
        return Checkout(session.id, session.url, datetime.fromtimestamp(session.expires_at, UTC))

    def _create_session(self, top_up: TopUp) -> stripe.checkout.Session:
        # Everything comes from the purchase: a repeat with the same key has to say the same. No `expires_at` for the same reason: it is
        # counted from when the session is made, and a repeat may come late. Without it, a session lives for 24 hours.
        metadata = {TOP_UP_KEY: str(top_up.top_up_id)}
        return self._client.v1.checkout.sessions.create(
            {
                "mode": "payment",
                "client_reference_id": str(top_up.top_up_id),
                "metadata": metadata,
                # Charges, and with them refunds, inherit it.
                "payment_intent_data": {"metadata": metadata},
                "line_items": [
                    {
                        "quantity": 1,
                        "price_data": {
                            "currency": top_up.currency.lower(),
                            "unit_amount": top_up.price_minor,
                            "product_data": {"name": f"{top_up.amount_millicredits / 1000:,.15g} credits"},
                        },
                    }
                ],
                # What is paid is the price in its currency, not in the buyer's.
                "adaptive_pricing": {"enabled": False},
                "success_url": self._back_to(top_up),
                "cancel_url": self._back_to(top_up, cancelled="true"),
            },
            {"idempotency_key": str(top_up.top_up_id)},
        )

    def _back_to(self, top_up: TopUp, **more: str) -> str:
        query = [*parse_qsl(self._return_url.query), ("top_up_id", str(top_up.top_up_id)), *more.items()]
        return urlunsplit(self._return_url._replace(query=urlencode(query)))

    def parse_event(self, body: bytes, metadata: Mapping[str, str]) -> PaymentEvent:
        """See PaymentProvider."""
        signature = metadata.get(SIGNATURE_KEY, "")
        if len(body) > EVENT_BYTES_MAX:
            raise invalid("body", f"is larger than {EVENT_BYTES_MAX} bytes")
        # What is not ASCII cannot be compared in constant time; what is not UTF-8 Stripe never sent.
        if not signature.isascii() or not _is_text(body):
            raise signature_invalid("the signature does not verify")
        try:
            stripe.WebhookSignature.verify_header(body, signature, self._webhook_secret, SIGNATURE_TOLERANCE_S)
        except stripe.SignatureVerificationError as error:
            raise signature_invalid("the signature does not verify, or is too old") from error
        try:
            return _read(_Event.model_validate_json(body))
        except ValueError as error:
            # Without the input, which tells who bought.
            told = error.errors(include_input=False, include_url=False) if isinstance(error, ValidationError) else str(error)
            _log.error("payments.event_unreadable", errors=told)
            raise invalid("body", "is not a Stripe event of a known form") from error


def _is_text(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def _read(event: _Event) -> PaymentEvent:
    ignored = PaymentEvent(StripePayments.name, event.id, event.type, EventKind.IGNORED, event.created)
    about = event.data.object
    metadata = _Labelled.model_validate(about).metadata or {}
    if TOP_UP_KEY not in metadata:
        return ignored
    ours = replace(ignored, top_up_id=UUID(metadata[TOP_UP_KEY]))
    match event.type:
        case "checkout.session.completed" | "checkout.session.async_payment_succeeded":
            session = _Session.model_validate(about)
            # Unpaid: a bank transfer or the like is under way, `async_payment_…` will say how it ended.
            kind = EventKind.IGNORED if session.payment_status == "unpaid" else EventKind.PAID
            return replace(ours, kind=kind, amount_minor=session.amount_total, currency=session.currency.upper())
        case "checkout.session.async_payment_failed":
            return replace(ours, kind=EventKind.FAILED)
        case "checkout.session.expired":
            return replace(ours, kind=EventKind.EXPIRED)
        case "charge.refunded":
            charge = _Charge.model_validate(about)
            return replace(
                ours,
                kind=EventKind.REFUNDED,
                amount_minor=charge.amount,
                refunded_minor=charge.amount_refunded,
                currency=charge.currency.upper(),
            )
        case _:
            return ours
