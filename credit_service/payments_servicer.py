"""The RPCs of PaymentsService: message → ledger and payment provider → message. No SQL and no rules here."""

import logging
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import structlog
from prometheus_client import Counter
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import payments, store
from credit_service.ledger import user_id_of
from credit_service.payments import EventOutcome, PaymentProvider
from credit_service.prices import PriceTable
from genmesh.credits.v1 import payments_pb2 as pb
from genmesh.credits.v1 import payments_pb2_grpc as pb_grpc
from genmesh.identity.v1 import identity_pb2
from servicekit.database import transaction
from servicekit.errors import MeshError, Reason
from servicekit.identity import current_user_id
from servicekit.interceptors import Context
from servicekit.paging import page_limit

PAYMENT_EVENTS = Counter(
    "genmesh_payment_events_total", "Notices of the payment provider, by what they say and what came of it", ["kind", "outcome"]
)

_STATES = {
    payments.State.PENDING: pb.TopUp.STATE_PENDING,
    payments.State.FAILED: pb.TopUp.STATE_FAILED,
    payments.State.EXPIRED: pb.TopUp.STATE_EXPIRED,
    payments.State.PAID: pb.TopUp.STATE_PAID,
    payments.State.REFUNDED: pb.TopUp.STATE_REFUNDED,
}

_log = structlog.get_logger(__name__)
# What people have to look at.
_LEVELS = {EventOutcome.MISMATCH: logging.ERROR, EventOutcome.UNKNOWN_TOP_UP: logging.WARNING}


class PaymentsServicer(pb_grpc.PaymentsServiceServicer):
    """The price table, and purchases of credits. Without a provider there is nothing to buy, but past purchases are shown."""

    def __init__(self, engine: AsyncEngine, prices: PriceTable, provider: PaymentProvider | None, changed: Callable[[UUID], None]) -> None:
        """`changed` is told whose balance changed."""
        self._engine = engine
        self._prices = prices
        self._provider = provider
        self._changed = changed

    async def ListPrices(self, request: pb.ListPricesRequest, context: Context) -> pb.ListPricesResponse:
        """See PaymentsService."""
        currency = self._prices.currency
        return pb.ListPricesResponse(
            plans=[
                pb.PlanPrice(
                    plan=identity_pb2.Plan.Value(plan.plan),
                    monthly_price_minor=plan.monthly_price_minor,
                    currency=currency,
                    monthly_grant_millicredits=plan.monthly_grant_millicredits,
                )
                for plan in self._prices.plans.values()
            ],
            packages=[
                pb.CreditPackage(
                    package_id=package.package_id,
                    amount_millicredits=package.amount_millicredits,
                    price_minor=package.price_minor,
                    currency=currency,
                )
                for package in self._prices.packages.values()
            ],
            can_buy=self._provider is not None,
        )

    async def CreateTopUp(self, request: pb.CreateTopUpRequest, context: Context) -> pb.CreateTopUpResponse:
        """See PaymentsService. The purchase is recorded before the provider hears of it: whoever pays is known here."""
        provider = self._offered()
        package = payments.package_of(self._prices, request.package_id)
        async with transaction(self._engine) as connection:
            outcome, begun = await store.begin_top_up(
                connection,
                user_id=user_id_of(current_user_id()),
                request_id=UUID(request.request_id),
                provider=provider.name,
                package=package,
                currency=self._prices.currency,
            )
        top_up = payments.begun(outcome, begun)
        if top_up.needs_checkout:
            checkout = await provider.create_checkout(top_up)
            async with transaction(self._engine) as connection:
                top_up = await store.opened_top_up(connection, top_up_id=top_up.top_up_id, checkout=checkout)
        return pb.CreateTopUpResponse(top_up=_top_up(top_up))

    async def GetTopUp(self, request: pb.GetTopUpRequest, context: Context) -> pb.GetTopUpResponse:
        """See PaymentsService."""
        user_id = user_id_of(current_user_id())
        async with transaction(self._engine) as connection:
            found = await store.get_top_up(connection, user_id=user_id, top_up_id=UUID(request.top_up_id))
        return pb.GetTopUpResponse(top_up=_top_up(payments.shown(found)))

    async def ListTopUps(self, request: pb.ListTopUpsRequest, context: Context) -> pb.ListTopUpsResponse:
        """See PaymentsService."""
        query = payments.TopUpQuery(user_id_of(current_user_id()))
        limit = page_limit(request.page_size)
        before = query.position(request.page_token)
        async with transaction(self._engine) as connection:
            found = await store.list_top_ups(connection, query, before=before, limit=limit + 1)
        top_ups, next_page_token = query.page(found, limit)
        return pb.ListTopUpsResponse(top_ups=[_top_up(top_up) for top_up in top_ups], next_page_token=next_page_token)

    async def ReceivePaymentEvent(self, request: pb.ReceivePaymentEventRequest, context: Context) -> pb.ReceivePaymentEventResponse:
        """See PaymentsService. What is recorded is answered with success, whatever came of it: telling it again would change nothing."""
        provider = self._offered()
        try:
            event = provider.parse_event(request.body.data, _metadata(context))
        except MeshError as refusal:
            # A wrong secret looks like this, and so does a stranger: only the number tells.
            PAYMENT_EVENTS.labels("", "refused").inc()
            _log.warning("payments.event_refused", provider=provider.name, reason=Reason.Name(refusal.reason))
            raise
        async with transaction(self._engine) as connection:
            answer = await store.settle_top_up(connection, event)
        if answer.user_id is not None:
            self._changed(answer.user_id)
        if not answer.replayed:
            PAYMENT_EVENTS.labels(event.kind, answer.outcome).inc()
            _log.log(
                _LEVELS.get(answer.outcome, logging.INFO),
                "payments.event",
                provider=event.provider,
                event_id=event.event_id,
                event_type=event.event_type,
                top_up_id=str(event.top_up_id) if event.top_up_id else None,
                user_id=str(answer.user_id) if answer.user_id else None,
                outcome=str(answer.outcome),
                amount_minor=event.amount_minor,
                refunded_minor=event.refunded_minor,
                currency=event.currency,
            )
        return pb.ReceivePaymentEventResponse()

    def _offered(self) -> PaymentProvider:
        if self._provider is None:
            raise payments.not_offered()
        return self._provider


def _metadata(context: Context) -> Mapping[str, str]:
    # The stubs of grpcio say that it may be None or a class of their own; on a server it is pairs.
    metadata: Any = context.invocation_metadata()
    return {key: value for key, value in metadata if isinstance(value, str)}


def _top_up(top_up: payments.TopUp) -> pb.TopUp:
    message = pb.TopUp(
        top_up_id=str(top_up.top_up_id),
        state=_STATES[top_up.state_at(datetime.now(UTC))],
        package_id=top_up.package_id,
        amount_millicredits=top_up.amount_millicredits,
        price_minor=top_up.price_minor,
        currency=top_up.currency,
        refunded_millicredits=top_up.refunded_millicredits,
        uncollected_millicredits=top_up.uncollected_millicredits,
    )
    message.create_time.FromDatetime(top_up.create_time)
    if top_up.state is payments.State.PENDING and top_up.checkout_url:
        message.checkout_url = top_up.checkout_url
    if top_up.expire_time is not None:
        message.expire_time.FromDatetime(top_up.expire_time)
    if top_up.pay_time is not None:
        message.pay_time.FromDatetime(top_up.pay_time)
    return message
