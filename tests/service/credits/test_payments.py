"""Buying credits: checkouts at a stand-in for Stripe's end, notices signed by Stripe's scheme, in every order, twice and at once."""

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from structlog.testing import capture_logs

from credit_service import app, store
from credit_service.ledger import Balance, Outcome
from credit_service.payments import (
    OPEN_TOP_UPS_MAX,
    UNOPENED_LIFE,
    Checkout,
    EventAnswer,
    EventOutcome,
    PaymentProvider,
    State,
    TopUp,
)
from credit_service.payments_servicer import PaymentsServicer
from credit_service.prices import load_prices
from credit_service.settings import CreditSettings
from credit_service.stripe_payments import CHECKOUTS_MAX, EVENT_BYTES_MAX, StripePayments
from genmesh.credits.v1 import payments_pb2 as pb
from genmesh.credits.v1 import payments_pb2_grpc as pb_grpc
from servicekit import database
from servicekit.client import mesh_channel
from servicekit.errors import MeshError
from servicekit.identity import TokenVerifier
from servicekit.server import MeshServer
from tests.service.credits.callers import Refusal, Signer, refused
from tests.service.credits.stripe_stand_in import DROP, HANG, SECRET_KEY, WEBHOOK_SECRET, Notice, StandIn, notice, sign, stand_in

if TYPE_CHECKING:
    from genmesh.credits.v1.payments_pb2_grpc import PaymentsServiceAsyncStub

PRICES = load_prices(None)
PACKAGE = PRICES.packages["credits-500"]
AMOUNT = PACKAGE.amount_millicredits
PRICE = PACKAGE.price_minor
PARTIAL = PRICE // 3
RETURN_URL = "https://console.example.org/credits?tab=buy"
DEADLINE_S = 30
Code = grpc.StatusCode


def share(refunded_minor: int) -> int:
    """The credits that go with money given back."""
    return AMOUNT * refunded_minor // PRICE


def stripe_at(stripe: StandIn, **changes: Any) -> StripePayments:
    """The adapter, with the stand-in as Stripe's end."""
    return StripePayments(secret_key=SECRET_KEY, webhook_secret=WEBHOOK_SECRET, return_url=RETURN_URL, api_url=stripe.url, **changes)


@dataclass
class Shop:
    """The service behind mTLS, and who calls it: users, and the provider through the edge."""

    engine: AsyncEngine
    signer: Signer
    stripe: StandIn
    provider: PaymentProvider
    stub: "PaymentsServiceAsyncStub"
    closed_stub: "PaymentsServiceAsyncStub"
    """Where no provider is set up."""
    changed: list[uuid.UUID] = field(default_factory=list[uuid.UUID])

    def create(
        self, user_id: uuid.UUID, request_id: str = "", package_id: str = PACKAGE.package_id
    ) -> "grpc.aio.UnaryUnaryCall[pb.CreateTopUpRequest, pb.CreateTopUpResponse]":
        request = pb.CreateTopUpRequest(request_id=request_id or str(uuid.uuid4()), package_id=package_id)
        return self.stub.CreateTopUp(request, metadata=self.signer.metadata(user_id))

    async def buy(self, user_id: uuid.UUID) -> pb.TopUp:
        """A purchase with an open checkout."""
        return (await self.create(user_id)).top_up

    async def show(self, user_id: uuid.UUID, top_up: pb.TopUp) -> pb.TopUp:
        request = pb.GetTopUpRequest(top_up_id=top_up.top_up_id)
        return (await self.stub.GetTopUp(request, metadata=self.signer.metadata(user_id))).top_up

    def notify(self, told: Notice) -> "grpc.aio.UnaryUnaryCall[pb.ReceivePaymentEventRequest, pb.ReceivePaymentEventResponse]":
        return self.stub.ReceivePaymentEvent(told.request(), metadata=(("stripe-signature", sign(told.body)),))

    async def tell(self, *told: Notice) -> list[str]:
        """Send notices one after the other; what came of each, as recorded."""
        for one in told:
            await self.notify(one)
        return [await self.outcome(one) for one in told]

    async def outcome(self, told: Notice) -> str:
        query = sa.text("SELECT outcome FROM credits.payment_events WHERE provider = 'stripe' AND provider_event_id = :id")
        async with self.engine.connect() as connection:
            return (await connection.execute(query, {"id": told.event["id"]})).scalar_one_or_none() or "not recorded"

    async def balance(self, user_id: uuid.UUID) -> Balance:
        async with self.engine.connect() as connection:
            return await store.balance(connection, user_id=user_id)

    async def available(self, user_id: uuid.UUID) -> int:
        return (await self.balance(user_id)).available_millicredits

    async def uncollected(self, top_up: pb.TopUp) -> int:
        query = sa.text("SELECT uncollected_millicredits FROM credits.top_ups WHERE top_up_id = :id")
        async with self.engine.connect() as connection:
            return (await connection.execute(query, {"id": uuid.UUID(top_up.top_up_id)})).scalar_one()

    async def ledger(self, top_up: pb.TopUp) -> list[tuple[str, int]]:
        """What the ledger moved for a purchase, oldest first."""
        query = sa.text(
            "SELECT v.kind, sum(e.amount_millicredits)::bigint FROM credits.events v JOIN credits.entries e USING (event_id)"
            " WHERE v.top_up_id = :id AND e.account = 'available' GROUP BY v.event_id ORDER BY v.event_id"
        )
        async with self.engine.connect() as connection:
            return [tuple(row) for row in await connection.execute(query, {"id": uuid.UUID(top_up.top_up_id)})]

    async def hold(self, user_id: uuid.UUID, amount_millicredits: int) -> uuid.UUID:
        reservation_id = uuid.uuid4()
        async with self.engine.connect() as connection:
            answer = await store.reserve(
                connection,
                reservation_id=reservation_id,
                job_id=reservation_id,
                user_id=user_id,
                amount_millicredits=amount_millicredits,
                ttl=timedelta(hours=1),
            )
        assert answer.outcome is Outcome.OK
        return reservation_id

    async def spend(self, user_id: uuid.UUID, amount_millicredits: int) -> None:
        reservation_id = await self.hold(user_id, amount_millicredits)
        async with self.engine.connect() as connection:
            await store.capture(connection, reservation_id=reservation_id, amount_millicredits=amount_millicredits)


@pytest_asyncio.fixture(scope="module")
async def shop(credit_settings: CreditSettings, engine: AsyncEngine, signer: Signer) -> AsyncIterator[Shop]:
    changed: list[uuid.UUID] = []
    async with AsyncExitStack() as stack:
        stripe = stack.enter_context(stand_in())
        provider = stack.enter_context(stripe_at(stripe))

        async def serve(offered: PaymentProvider | None) -> "PaymentsServiceAsyncStub":
            verifier = TokenVerifier(signer, issuer=credit_settings.token_issuer, audience=credit_settings.token_audience)
            server = MeshServer(credit_settings, service=app.SERVICE, verifier=verifier, checks={}, translate=database.translate)
            pb_grpc.add_PaymentsServiceServicer_to_server(PaymentsServicer(engine, PRICES, offered, changed.append), server.grpc)
            await stack.enter_async_context(server.running("genmesh.credits.v1.PaymentsService"))
            address = f"127.0.0.1:{server.port}"
            channel = mesh_channel(credit_settings, address, caller="envoy", service=app.SERVICE)
            return pb_grpc.PaymentsServiceStub(await stack.enter_async_context(channel))  # pyright: ignore[reportReturnType]

        yield Shop(engine, signer, stripe, provider, await serve(provider), await serve(None), changed)


# --- checkouts ---------------------------------------------------------------------------------------------------------------


async def test_the_price_table_is_open_to_everybody(shop: Shop):
    response = await shop.stub.ListPrices(pb.ListPricesRequest())
    assert [package.package_id for package in response.packages] == list(PRICES.packages)
    first = response.packages[0]
    assert (first.amount_millicredits, first.price_minor, first.currency) == (AMOUNT, PRICE, PRICES.currency)
    pro = PRICES.plans["PLAN_PRO"]
    assert (pro.monthly_price_minor, pro.monthly_grant_millicredits) in [
        (plan.monthly_price_minor, plan.monthly_grant_millicredits) for plan in response.plans
    ]
    assert response.can_buy


async def test_a_purchase_opens_a_checkout_and_gives_credits_only_when_it_is_paid(shop: Shop, user_id: uuid.UUID):
    top_up = await shop.buy(user_id)
    assert (top_up.state, top_up.package_id) == (pb.TopUp.STATE_PENDING, PACKAGE.package_id)
    assert (top_up.amount_millicredits, top_up.price_minor, top_up.currency) == (AMOUNT, PRICE, PRICES.currency)
    assert top_up.checkout_url.startswith("https://checkout.stripe.com/c/pay/cs_test_")
    assert top_up.expire_time.ToSeconds() > top_up.create_time.ToSeconds()
    assert not top_up.HasField("pay_time")
    assert await shop.available(user_id) == 0

    shop.changed.clear()
    assert await shop.tell(notice("checkout.session.completed", top_up)) == ["credited"]
    assert shop.changed == [user_id]
    paid = await shop.show(user_id, top_up)
    assert (paid.state, paid.checkout_url, paid.refunded_millicredits) == (pb.TopUp.STATE_PAID, "", 0)
    assert paid.HasField("pay_time")
    assert await shop.balance(user_id) == Balance(
        available_millicredits=AMOUNT, reserved_millicredits=0, promotional_millicredits=0, next_expire_time=None, version=1
    )
    assert await shop.ledger(top_up) == [("top_up", AMOUNT)]


async def test_what_stripe_is_sent(shop: Shop, user_id: uuid.UUID):
    top_up = await shop.buy(user_id)
    [sent] = shop.stripe.sessions(top_up.top_up_id)
    assert sent.headers["Authorization"] == f"Bearer {SECRET_KEY}"
    assert sent.headers["Idempotency-Key"] == top_up.top_up_id
    assert sent.headers["Stripe-Version"] == "2026-10-28.endive"
    assert "telemetry_id" not in sent.headers["X-Stripe-Client-User-Agent"]
    back = f"{RETURN_URL}&top_up_id={top_up.top_up_id}"
    assert sent.form == {
        "mode": "payment",
        "client_reference_id": top_up.top_up_id,
        "metadata[genmesh_top_up_id]": top_up.top_up_id,
        "payment_intent_data[metadata][genmesh_top_up_id]": top_up.top_up_id,
        "line_items[0][quantity]": "1",
        "line_items[0][price_data][currency]": "usd",
        "line_items[0][price_data][unit_amount]": str(PRICE),
        "line_items[0][price_data][product_data][name]": "500 credits",
        "adaptive_pricing[enabled]": "false",
        "success_url": back,
        "cancel_url": f"{back}&cancelled=true",
    }


async def test_the_same_request_again_and_at_once_is_one_purchase_with_one_checkout(shop: Shop, user_id: uuid.UUID):
    request_id = str(uuid.uuid4())
    responses = await asyncio.gather(*(shop.create(user_id, request_id) for _ in range(5)))
    assert len({(response.top_up.top_up_id, response.top_up.checkout_url) for response in responses}) == 1
    top_up = responses[0].top_up
    opened = len(shop.stripe.sessions(top_up.top_up_id))
    assert (await shop.create(user_id, request_id)).top_up == top_up
    assert len(shop.stripe.sessions(top_up.top_up_id)) == opened
    await shop.tell(notice("checkout.session.completed", top_up))
    assert (await shop.create(user_id, request_id)).top_up.state == pb.TopUp.STATE_PAID


async def test_a_request_id_used_for_another_package_is_refused(shop: Shop, user_id: uuid.UUID):
    request_id = str(uuid.uuid4())
    await shop.create(user_id, request_id)
    refusal = await refused(shop.create(user_id, request_id, "credits-2000"))
    assert (refusal.code, refusal.reason) == (Code.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    other = (await shop.create(uuid.uuid4(), request_id, "credits-2000")).top_up
    assert other.package_id == "credits-2000"


async def test_a_package_that_there_is_not_is_refused(shop: Shop, user_id: uuid.UUID):
    refusal = await refused(shop.create(user_id, package_id="credits-0"))
    assert (refusal.code, refusal.fields) == (Code.INVALID_ARGUMENT, ("package_id",))


@pytest.mark.parametrize("script", [[429], [500, 500, 500], [DROP, DROP, DROP]], ids=["429", "500", "no answer"])
async def test_a_provider_that_fails_is_unavailable_and_the_same_request_goes_on_later(
    shop: Shop, user_id: uuid.UUID, script: list[int | str]
):
    request_id = str(uuid.uuid4())
    shop.stripe.script.extend(script)
    refusal = await refused(shop.create(user_id, request_id))
    assert (refusal.code, refusal.reason) == (Code.UNAVAILABLE, "UNAVAILABLE")
    assert not shop.stripe.script
    [begun] = await list_all(shop, user_id)
    assert (begun.state, begun.checkout_url) == (pb.TopUp.STATE_PENDING, "")
    top_up = (await shop.create(user_id, request_id)).top_up
    assert top_up.top_up_id == begun.top_up_id
    assert top_up.checkout_url


async def test_a_try_that_fails_is_made_again_within_the_request(shop: Shop, user_id: uuid.UUID):
    shop.stripe.script.extend([500, DROP])
    top_up = await shop.buy(user_id)
    assert len({sent.headers["Idempotency-Key"] for sent in shop.stripe.sessions(top_up.top_up_id)}) == 1
    assert len(shop.stripe.sessions(top_up.top_up_id)) == 3


@pytest.mark.parametrize("status", [400, 401, 402])
async def test_what_the_provider_refuses_for_good_is_a_fault_of_ours(
    shop: Shop, user_id: uuid.UUID, status: int, capsys: pytest.CaptureFixture[str]
):
    shop.stripe.script.append(status)
    refusal = await refused(shop.create(user_id))
    assert (refusal.code, refusal.reason) == (Code.INTERNAL, "INTERNAL")
    log = capsys.readouterr().out
    assert "Stripe refuses to open a checkout" in log
    assert SECRET_KEY not in log


async def test_a_provider_that_hangs_holds_nobody_else_up(shop: Shop, user_id: uuid.UUID):
    shop.stripe.script.append(HANG)
    buying = asyncio.create_task(shop.buy(user_id))
    assert await asyncio.to_thread(shop.stripe.hung.acquire, timeout=DEADLINE_S)
    assert (await shop.stub.ListPrices(pb.ListPricesRequest())).can_buy
    assert not buying.done()
    shop.stripe.released.set()
    assert (await buying).checkout_url
    shop.stripe.released.clear()


async def test_a_provider_that_does_not_answer_in_time_is_unavailable(shop: Shop, user_id: uuid.UUID):
    top_up = await begin(shop, user_id)
    with stand_in() as stripe, stripe_at(stripe, read_timeout_s=0.1) as provider:
        stripe.script.extend([HANG] * 3)
        with pytest.raises(MeshError) as raised:
            await provider.create_checkout(top_up)
        assert raised.value.code is Code.UNAVAILABLE
        assert len(stripe.requests) == 3


async def test_no_more_checkouts_are_opened_at_once_than_there_are_threads(shop: Shop, user_id: uuid.UUID):
    top_up = await begin(shop, user_id)
    with stand_in() as stripe, stripe_at(stripe) as provider:
        stripe.script.extend([HANG] * CHECKOUTS_MAX)
        opening = [asyncio.create_task(provider.create_checkout(top_up)) for _ in range(CHECKOUTS_MAX)]
        for _ in opening:
            assert await asyncio.to_thread(stripe.hung.acquire, timeout=DEADLINE_S)
        with pytest.raises(MeshError) as raised:
            await provider.create_checkout(top_up)
        assert raised.value.code is Code.UNAVAILABLE
        # A caller that goes away does not free the thread that works for it.
        opening.pop().cancel()
        await asyncio.sleep(0)
        with pytest.raises(MeshError):
            await provider.create_checkout(top_up)
        stripe.released.set()
        assert len({checkout.url for checkout in await asyncio.gather(*opening)}) == 1
        assert (await provider.create_checkout(top_up)).url


async def begin(shop: Shop, user_id: uuid.UUID, request_id: str = "") -> Any:
    """A purchase whose beginner died before it called the provider."""
    async with shop.engine.connect() as connection:
        outcome, top_up = await store.begin_top_up(
            connection,
            user_id=user_id,
            request_id=uuid.UUID(request_id) if request_id else uuid.uuid4(),
            provider="stripe",
            package=PACKAGE,
            currency=PRICES.currency,
        )
    assert outcome is Outcome.OK
    return top_up


async def test_a_purchase_whose_beginner_died_before_the_checkout_goes_on(shop: Shop, user_id: uuid.UUID):
    request_id = str(uuid.uuid4())
    begun = await begin(shop, user_id, request_id)
    top_up = (await shop.create(user_id, request_id)).top_up
    assert top_up.top_up_id == str(begun.top_up_id)
    assert top_up.checkout_url


async def test_a_purchase_whose_beginner_died_after_the_checkout_was_opened_gets_the_same_one(shop: Shop, user_id: uuid.UUID):
    request_id = str(uuid.uuid4())
    opened = await shop.provider.create_checkout(await begin(shop, user_id, request_id))
    assert (await shop.create(user_id, request_id)).top_up.checkout_url == opened.url


async def test_a_payment_counts_even_if_the_checkout_was_never_noted(shop: Shop, user_id: uuid.UUID):
    request_id = str(uuid.uuid4())
    begun = await begin(shop, user_id, request_id)
    [top_up] = await list_all(shop, user_id)
    assert await shop.tell(notice("checkout.session.completed", top_up)) == ["credited"]
    assert await shop.available(user_id) == AMOUNT
    # Nothing is left to open.
    assert (await shop.create(user_id, request_id)).top_up.state == pb.TopUp.STATE_PAID
    assert shop.stripe.sessions(str(begun.top_up_id)) == []


async def test_the_first_checkout_that_is_noted_stays(shop: Shop, user_id: uuid.UUID):
    top_up = await shop.buy(user_id)
    async with shop.engine.connect() as connection:
        late = Checkout("cs_test_other", "https://checkout.stripe.com/c/pay/other", top_up.expire_time.ToDatetime(UTC))
        noted = await store.opened_top_up(connection, top_up_id=uuid.UUID(top_up.top_up_id), checkout=late)
    assert noted.checkout_url == top_up.checkout_url


# --- who sees what -----------------------------------------------------------------------------------------------------------


async def list_all(shop: Shop, user_id: uuid.UUID) -> list[pb.TopUp]:
    response = await shop.stub.ListTopUps(pb.ListTopUpsRequest(), metadata=shop.signer.metadata(user_id))
    return list(response.top_ups)


async def test_the_purchase_of_somebody_else_is_not_found(shop: Shop, user_id: uuid.UUID):
    top_up = await shop.buy(user_id)
    call = shop.stub.GetTopUp(pb.GetTopUpRequest(top_up_id=top_up.top_up_id), metadata=shop.signer.metadata(uuid.uuid4()))
    assert (await refused(call)).code is Code.NOT_FOUND


async def test_purchases_are_listed_newest_first_page_by_page(shop: Shop, user_id: uuid.UUID):
    bought = [(await shop.buy(user_id)).top_up_id for _ in range(5)]
    await shop.buy(uuid.uuid4())
    metadata = shop.signer.metadata(user_id)
    token, sizes, listed = "", list[int](), list[str]()
    while True:
        response = await shop.stub.ListTopUps(pb.ListTopUpsRequest(page_size=2, page_token=token), metadata=metadata)
        sizes.append(len(response.top_ups))
        listed += [top_up.top_up_id for top_up in response.top_ups]
        if not (token := response.next_page_token):
            break
    assert (sizes, listed) == ([2, 2, 1], bought[::-1])


async def test_a_page_token_of_somebody_else_is_refused(shop: Shop, user_id: uuid.UUID):
    await shop.buy(user_id)
    await shop.buy(user_id)
    page = await shop.stub.ListTopUps(pb.ListTopUpsRequest(page_size=1), metadata=shop.signer.metadata(user_id))
    request = pb.ListTopUpsRequest(page_token=page.next_page_token)
    refusal = await refused(shop.stub.ListTopUps(request, metadata=shop.signer.metadata(uuid.uuid4())))
    assert (refusal.code, refusal.fields) == (Code.INVALID_ARGUMENT, ("page_token",))


@pytest.mark.parametrize("name", ["CreateTopUp", "GetTopUp", "ListTopUps"])
async def test_purchases_are_made_and_seen_by_those_who_are_signed_in(shop: Shop, name: str):
    request = {
        "CreateTopUp": pb.CreateTopUpRequest(request_id=str(uuid.uuid4()), package_id=PACKAGE.package_id),
        "GetTopUp": pb.GetTopUpRequest(top_up_id=str(uuid.uuid4())),
        "ListTopUps": pb.ListTopUpsRequest(),
    }[name]
    assert (await refused(getattr(shop.stub, name)(request))).code is Code.UNAUTHENTICATED


async def test_without_a_provider_nothing_is_sold(shop: Shop, user_id: uuid.UUID):
    assert not (await shop.closed_stub.ListPrices(pb.ListPricesRequest())).can_buy
    top_up = await shop.buy(user_id)
    metadata = shop.signer.metadata(user_id)
    create = pb.CreateTopUpRequest(request_id=str(uuid.uuid4()), package_id=PACKAGE.package_id)
    told = notice("checkout.session.completed", top_up)
    refusals = [
        await refused(shop.closed_stub.CreateTopUp(create, metadata=metadata)),
        await refused(shop.closed_stub.ReceivePaymentEvent(told.request(), metadata=(("stripe-signature", sign(told.body)),))),
    ]
    assert [(refusal.code, refusal.reason) for refusal in refusals] == [(Code.UNIMPLEMENTED, "NOT_OFFERED")] * 2
    # What was bought before is still there to see.
    shown = await shop.closed_stub.GetTopUp(pb.GetTopUpRequest(top_up_id=top_up.top_up_id), metadata=metadata)
    assert shown.top_up == top_up


# --- signatures --------------------------------------------------------------------------------------------------------------


async def refusal_of_notice(shop: Shop, body: bytes, signature: str | None) -> Refusal:
    request = pb.ReceivePaymentEventRequest()
    request.body.data = body
    metadata = () if signature is None else (("stripe-signature", signature),)
    return await refused(shop.stub.ReceivePaymentEvent(request, metadata=metadata))


async def test_a_notice_without_a_good_signature_moves_nothing(shop: Shop, user_id: uuid.UUID):
    told = notice("checkout.session.completed", await shop.buy(user_id))
    body = told.body
    good = sign(body)
    timestamp = good.partition(",")[0]
    signatures = {
        "missing": None,
        "empty": "",
        "of another secret": sign(body, secret="whsec_other"),
        "too old": sign(body, age_s=301),
        "of an older scheme": good.replace("v1=", "v2="),
        "without a time": good.partition(",")[2],
        "of another time": good.replace(timestamp, "t=1"),
        "no time": good.replace(timestamp, "t=now"),
        "cut off": good.split(",v0")[0][:-1],
        "nothing of it": "x",
        "many": ",".join(["v1=0"] * 100),
        "of nothing": sign(b""),
    }
    for why, signature in signatures.items():
        refusal = await refusal_of_notice(shop, body, signature)
        assert (refusal.code, refusal.reason) == (Code.UNAUTHENTICATED, "SIGNATURE_INVALID"), why
    assert await shop.outcome(told) == "not recorded"
    assert await shop.available(user_id) == 0
    # The same notice with its signature is good: only that was wrong.
    assert await shop.tell(told) == ["credited"]


async def test_a_notice_of_which_one_byte_is_another_moves_nothing(shop: Shop, user_id: uuid.UUID):
    told = notice("checkout.session.completed", await shop.buy(user_id))
    body = told.body
    signature = sign(body)
    changed = [body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :] for at in range(0, len(body), 97)]
    for other in (*changed, body + b"\n", body[:-1], body.replace(b"  ", b" "), b"", b"\xff" + body):
        refusal = await refusal_of_notice(shop, other, signature)
        assert (refusal.code, refusal.reason) == (Code.UNAUTHENTICATED, "SIGNATURE_INVALID")
    assert await shop.available(user_id) == 0


async def test_a_second_secret_may_sign_too_while_secrets_are_changed(shop: Shop, user_id: uuid.UUID):
    told = notice("checkout.session.completed", await shop.buy(user_id))
    timestamp, mac, _ = sign(told.body).split(",")
    await shop.stub.ReceivePaymentEvent(told.request(), metadata=(("stripe-signature", f"{timestamp},v1={'0' * 64},{mac}"),))
    assert await shop.available(user_id) == AMOUNT


@pytest.mark.parametrize(
    "body",
    [
        b"not JSON",
        b"[]",
        b"{}",
        b'{"object": "v2.core.event"}',
        b'{"object": "event", "id": "evt_1", "type": "charge.refunded", "created": 1, "data": {"object": {"metadata":'
        b' {"genmesh_top_up_id": "x"}}}}',
        b'{"object": "event", "id": "evt_1", "type": "checkout.session.completed", "created": 1, "data": {"object": {"metadata":'
        b' {"genmesh_top_up_id": "0198c3a4-7f0e-7d0a-9d55-1e6b4c1f00aa"}}}}',
    ],
    ids=["not JSON", "no object", "empty", "thin", "no id of a purchase", "half a session"],
)
async def test_a_signed_notice_of_another_form_is_refused_by_name(shop: Shop, body: bytes):
    refusal = await refusal_of_notice(shop, body, sign(body))
    assert (refusal.code, refusal.fields) == (Code.INVALID_ARGUMENT, ("body",))


async def test_a_notice_that_is_too_large_is_refused_unread(shop: Shop):
    body = b"x" * (EVENT_BYTES_MAX + 1)
    refusal = await refusal_of_notice(shop, body, sign(body))
    assert (refusal.code, refusal.fields) == (Code.INVALID_ARGUMENT, ("body",))


# --- what notices move -------------------------------------------------------------------------------------------------------


async def test_the_same_notice_again_moves_nothing(shop: Shop, user_id: uuid.UUID):
    top_up = await shop.buy(user_id)
    paid = notice("checkout.session.completed", top_up)
    refunded = notice("charge.refunded", top_up, refunded_minor=PARTIAL)
    assert await shop.tell(paid, paid, refunded, refunded, paid) == ["credited", "credited", "taken_back", "taken_back", "credited"]
    assert await shop.ledger(top_up) == [("top_up", AMOUNT), ("refund", -share(PARTIAL))]


async def test_the_same_notice_again_has_the_outcome_of_the_first_time(shop: Shop, user_id: uuid.UUID):
    paid = notice("checkout.session.completed", await shop.buy(user_id))
    event = shop.provider.parse_event(paid.body, {"stripe-signature": sign(paid.body)})
    async with shop.engine.connect() as connection:
        answers = [await store.settle_top_up(connection, event) for _ in range(2)]
    assert answers == [EventAnswer(EventOutcome.CREDITED, replayed, user_id) for replayed in (False, True)]


async def test_a_payment_that_two_notices_tell_is_credited_once(shop: Shop, user_id: uuid.UUID):
    top_up = await shop.buy(user_id)
    two = (notice("checkout.session.completed", top_up), notice("checkout.session.async_payment_succeeded", top_up))
    assert await shop.tell(*two) == ["credited", "stale"]
    assert await shop.available(user_id) == AMOUNT


async def test_notices_that_come_at_once_are_taken_one_after_the_other(shop: Shop, user_id: uuid.UUID):
    top_up = await shop.buy(user_id)
    paid = notice("checkout.session.completed", top_up)
    refunded = notice("charge.refunded", top_up, refunded_minor=PARTIAL)
    others = [notice("checkout.session.async_payment_succeeded", top_up), notice("checkout.session.expired", top_up)]
    await asyncio.gather(*(shop.notify(one) for one in (paid, refunded, *others) * 5))
    shown = await shop.show(user_id, top_up)
    assert (shown.state, shown.refunded_millicredits) == (pb.TopUp.STATE_PAID, share(PARTIAL))
    assert await shop.available(user_id) == AMOUNT - share(PARTIAL)


async def test_a_bank_transfer_is_credited_when_it_arrives(shop: Shop, user_id: uuid.UUID):
    top_up = await shop.buy(user_id)
    assert await shop.tell(notice("checkout.session.completed.unpaid", top_up)) == ["ignored"]
    assert (await shop.show(user_id, top_up)).state == pb.TopUp.STATE_PENDING
    assert await shop.tell(notice("checkout.session.async_payment_failed", top_up)) == ["noted"]
    assert (await shop.show(user_id, top_up)).state == pb.TopUp.STATE_FAILED
    assert await shop.available(user_id) == 0
    assert await shop.tell(notice("checkout.session.async_payment_succeeded", top_up)) == ["credited"]
    assert (await shop.show(user_id, top_up)).state == pb.TopUp.STATE_PAID
    assert await shop.available(user_id) == AMOUNT


async def test_what_changes_no_purchase_is_recorded_as_ignored(shop: Shop, user_id: uuid.UUID):
    top_up = await shop.buy(user_id)
    others = notice("charge.refunded", top_up, refunded_minor=PRICE, metadata={})
    assert await shop.tell(notice("payment_intent.succeeded", top_up), notice("payout.paid", top_up), others) == ["ignored"] * 3
    assert await shop.show(user_id, top_up) == top_up


async def test_a_purchase_that_nobody_began_here_is_recorded_and_moves_nothing(shop: Shop):
    stranger = pb.TopUp(top_up_id=str(uuid.uuid4()), price_minor=PRICE, currency="USD")
    assert await shop.tell(notice("checkout.session.completed", stranger)) == ["unknown_top_up"]


@pytest.mark.parametrize(
    "changes",
    [{"amount_total": PRICE - 1}, {"amount_total": PRICE + 1}, {"amount_total": 0}, {"currency": "jpy"}],
    ids=["less", "more", "nothing", "currency"],
)
async def test_a_payment_of_another_amount_or_currency_is_never_credited(shop: Shop, user_id: uuid.UUID, changes: dict[str, Any]):
    top_up = await shop.buy(user_id)
    wrong = notice("checkout.session.completed", top_up, **changes)
    with capture_logs() as logs:
        assert await shop.tell(wrong) == ["mismatch"]
    assert [(log["event"], log["event_id"]) for log in logs if log["log_level"] == "error"] == [("payments.event", wrong.event["id"])]
    assert await shop.available(user_id) == 0
    assert (await shop.show(user_id, top_up)).state == pb.TopUp.STATE_PENDING
    assert await shop.tell(notice("checkout.session.completed", top_up), wrong) == ["credited", "mismatch"]
    assert await shop.available(user_id) == AMOUNT


@pytest.mark.parametrize(
    "changes",
    [{"amount": PRICE + 1}, {"currency": "eur"}, {"amount_refunded": PRICE + 1}, {"amount_refunded": 0}, {"amount_refunded": -1}],
)
async def test_a_refund_of_another_amount_or_currency_takes_nothing(shop: Shop, user_id: uuid.UUID, changes: dict[str, Any]):
    top_up = await shop.buy(user_id)
    await shop.tell(notice("checkout.session.completed", top_up))
    wrong = notice("charge.refunded", top_up, refunded_minor=PARTIAL, **changes)
    assert await shop.tell(wrong) == ["mismatch"]
    assert await shop.available(user_id) == AMOUNT


# --- order -------------------------------------------------------------------------------------------------------------------

STEPS = ("paid", "partial", "full", "expired")


def step(name: str, top_up: pb.TopUp) -> Notice:
    match name:
        case "paid":
            return notice("checkout.session.completed", top_up)
        case "partial":
            return notice("charge.refunded", top_up, refunded_minor=PARTIAL)
        case "full":
            return notice("charge.refunded", top_up, refunded_minor=PRICE)
        case "expired":
            return notice("checkout.session.expired", top_up)
        case "failed":
            return notice("checkout.session.async_payment_failed", top_up)
        case _:
            raise AssertionError(name)


def expected(told: set[str]) -> tuple[int, int, int]:
    """State, credits, credits taken back, by what was told and not by its order."""
    refunded = share(PRICE if "full" in told else PARTIAL if "partial" in told else 0)
    if "paid" in told:
        return (pb.TopUp.STATE_REFUNDED if "full" in told else pb.TopUp.STATE_PAID, AMOUNT - refunded, refunded)
    state = pb.TopUp.STATE_EXPIRED if "expired" in told else pb.TopUp.STATE_FAILED if "failed" in told else pb.TopUp.STATE_PENDING
    return (state, 0, 0)


@pytest.mark.parametrize("order", list(itertools.permutations(STEPS)), ids="-".join)
async def test_the_order_of_notices_does_not_matter(shop: Shop, user_id: uuid.UUID, order: tuple[str, ...]):
    top_up = await shop.buy(user_id)
    told: set[str] = set()
    for name in order:
        await shop.tell(step(name, top_up))
        told.add(name)
        shown = await shop.show(user_id, top_up)
        assert (shown.state, await shop.available(user_id), shown.refunded_millicredits) == expected(told)
    assert await shop.uncollected(top_up) == 0


@given(
    steps=st.lists(
        st.sampled_from((*STEPS, "failed")) | st.integers(1, AMOUNT).map(lambda spent: f"spend {spent}"), min_size=1, max_size=12
    )
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_notices_and_spending_in_any_order_give_what_a_model_says(shop: Shop, steps: list[str]):
    user_id = uuid.uuid4()
    top_up = await shop.buy(user_id)
    told: set[str] = set()
    refunded, available, taken = 0, 0, 0
    sent: dict[str, Notice] = {}
    for name in steps:
        if name.startswith("spend"):
            spent = min(int(name.removeprefix("spend ")), available)
            if spent:
                await shop.spend(user_id, spent)
                available -= spent
            continue
        # A step that comes again is told by the same notice, which is dead by then, or by another one: both move nothing.
        one = sent.setdefault(name, step(name, top_up)) if len(steps) % 2 else step(name, top_up)
        await shop.tell(one)
        if name == "paid" and "paid" not in told:
            available += AMOUNT
        before = refunded
        refunded = max(refunded, {"partial": PARTIAL, "full": PRICE}.get(name, 0))
        news = refunded > before or (name == "paid" and "paid" not in told)
        told.add(name)
        if "paid" in told and news:
            now = min(share(refunded) - taken, available)
            available -= now
            taken += now
        shown = await shop.show(user_id, top_up)
        assert (shown.state, shown.refunded_millicredits) == (expected(told)[0], taken)
        assert await shop.available(user_id) == available
        assert await shop.uncollected(top_up) == (share(refunded) - taken if "paid" in told else 0)


async def test_a_refund_takes_what_is_there_and_notes_the_rest(shop: Shop, user_id: uuid.UUID):
    top_up = await shop.buy(user_id)
    await shop.tell(notice("checkout.session.completed", top_up))
    await shop.spend(user_id, AMOUNT - 1000)
    held = await shop.hold(user_id, 400)
    assert await shop.tell(step("full", top_up)) == ["taken_back"]
    shown = await shop.show(user_id, top_up)
    assert (shown.state, shown.refunded_millicredits) == (pb.TopUp.STATE_REFUNDED, 600)
    assert await shop.uncollected(top_up) == AMOUNT - 600
    balance = await shop.balance(user_id)
    assert (balance.available_millicredits, balance.reserved_millicredits) == (0, 400)
    async with shop.engine.connect() as connection:
        await store.release(connection, reservation_id=held)
    # Holding credits is no way to keep them: what comes back goes the way of the rest. What was spent stays spent.
    assert await shop.available(user_id) == 0
    shown = await shop.show(user_id, top_up)
    assert (shown.refunded_millicredits, shown.uncollected_millicredits) == (1_000, AMOUNT - 1_000)


async def test_what_comes_back_pays_no_more_than_came_back(shop: Shop, user_id: uuid.UUID):
    top_up = await shop.buy(user_id)
    await shop.tell(notice("checkout.session.completed", top_up))
    await shop.spend(user_id, AMOUNT - 400)
    held = await shop.hold(user_id, 400)
    await shop.tell(step("full", top_up))
    other = await shop.buy(user_id)
    await shop.tell(notice("checkout.session.completed", other))
    async with shop.engine.connect() as connection:
        await store.capture(connection, reservation_id=held, amount_millicredits=300)
    assert await shop.available(user_id) == AMOUNT, "what was bought since is not touched"
    assert await shop.uncollected(top_up) == AMOUNT - 100


async def test_a_user_has_only_so_many_open_purchases(shop: Shop, user_id: uuid.UUID):
    opened = [await begin(shop, user_id) for _ in range(OPEN_TOP_UPS_MAX)]
    refusal = await refused(shop.create(user_id))
    assert (refusal.code, refusal.reason) == (Code.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
    await shop.tell(notice("checkout.session.completed", await shop.show(user_id, pb.TopUp(top_up_id=str(opened[0].top_up_id)))))
    await shop.create(user_id)  # one of them is paid


def test_a_purchase_whose_checkout_never_opened_is_over_after_a_day():
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    top_up = TopUp(uuid.uuid4(), uuid.uuid4(), State.PENDING, "credits-500", 1, 1, "USD", None, None, begun, None, 0, 0)
    assert top_up.state_at(begun + UNOPENED_LIFE) is State.PENDING
    assert top_up.state_at(begun + UNOPENED_LIFE + timedelta(seconds=1)) is State.EXPIRED
    opened = replace(top_up, checkout_url="https://pay", expire_time=begun)
    assert opened.state_at(begun + 9 * UNOPENED_LIFE) is State.PENDING, "the provider says when it is over"


async def test_a_refund_takes_bought_credits_before_promotional_ones(shop: Shop, user_id: uuid.UUID):
    top_up = await shop.buy(user_id)
    await shop.tell(notice("checkout.session.completed", top_up))
    await shop.spend(user_id, AMOUNT // 2)
    async with shop.engine.connect() as connection:
        await connection.execute(
            sa.text(
                "SELECT credits.grant_plan(:user_id, 'PLAN_PRO', now(), now() + interval '1 month', now() + interval '1 month', :amount)"
            ),
            {"user_id": user_id, "amount": AMOUNT},
        )
    await shop.tell(step("partial", top_up))
    balance = await shop.balance(user_id)
    assert balance.promotional_millicredits == AMOUNT
    assert balance.available_millicredits == AMOUNT + AMOUNT // 2 - share(PARTIAL)
    await shop.tell(step("full", top_up))
    balance = await shop.balance(user_id)
    assert (balance.available_millicredits, balance.promotional_millicredits) == (AMOUNT // 2, AMOUNT // 2)
    assert await shop.uncollected(top_up) == 0


async def test_every_cent_refunded_one_by_one_takes_all_and_never_too_much(shop: Shop, user_id: uuid.UUID):
    top_up = await shop.buy(user_id)
    await shop.tell(notice("checkout.session.completed", top_up))
    for refunded_minor in (1, 2, PRICE // 7, PRICE - 1, PRICE):
        await shop.tell(notice("charge.refunded", top_up, refunded_minor=refunded_minor))
        assert await shop.available(user_id) == AMOUNT - share(refunded_minor)
    assert await shop.available(user_id) == 0


# --- the tables --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE credits.payment_events SET outcome = 'stale'",
        "DELETE FROM credits.payment_events",
        "TRUNCATE credits.payment_events",
        "DELETE FROM credits.top_ups",
        "UPDATE credits.top_ups SET amount_millicredits = 1",
        "UPDATE credits.top_ups SET price_minor = 1",
        "UPDATE credits.top_ups SET user_id = gen_random_uuid()",
    ],
)
async def test_what_was_bought_and_told_cannot_be_changed_by_the_service(shop: Shop, user_id: uuid.UUID, change: str):
    await shop.tell(notice("checkout.session.completed", await shop.buy(user_id)))
    async with shop.engine.connect() as connection:
        with pytest.raises(DBAPIError) as raised:
            await connection.execute(sa.text(change))
    assert getattr(raised.value.orig, "sqlstate", None) in ("42501", "23001")


async def test_what_was_told_cannot_be_changed_by_a_role_that_took_its_rights_back(shop: Shop, user_id: uuid.UUID):
    await shop.tell(notice("checkout.session.completed", await shop.buy(user_id)))
    async with shop.engine.connect() as connection:
        await connection.execute(sa.text("BEGIN"))
        try:
            await connection.execute(sa.text("GRANT ALL ON credits.payment_events TO CURRENT_USER"))
            with pytest.raises(DBAPIError, match="append-only"):
                await connection.execute(sa.text("DELETE FROM credits.payment_events"))
        finally:
            await connection.execute(sa.text("ROLLBACK"))


async def test_a_purchase_that_the_ledger_does_not_prove_is_a_discrepancy(shop: Shop, user_id: uuid.UUID):
    pending = await shop.buy(user_id)
    refunded = await shop.buy(user_id)
    await shop.tell(notice("checkout.session.completed", refunded))
    tampers = {
        pending.top_up_id: "state = 'paid', pay_time = now()",
        refunded.top_up_id: f"refunded_minor = {PARTIAL}, refunded_millicredits = {share(PARTIAL)}",
    }
    problems: dict[str, list[str]] = {}
    for top_up_id, tamper in tampers.items():
        async with shop.engine.connect() as connection:
            await connection.execute(sa.text("BEGIN"))
            try:
                parameters = {"id": uuid.UUID(top_up_id)}
                await connection.execute(sa.text(f"UPDATE credits.top_ups SET {tamper} WHERE top_up_id = :id"), parameters)
                found = sa.text("SELECT problem FROM credits.discrepancies WHERE subject = :id ORDER BY problem")
                problems[top_up_id] = list((await connection.execute(found, {"id": top_up_id})).scalars())
            finally:
                await connection.execute(sa.text("ROLLBACK"))
    assert problems == {
        pending.top_up_id: ["credits given differ from what was paid for", "paid other than by one notice"],
        refunded.top_up_id: ["credits taken back differ from what was recorded", "refunded money differs from notices"],
    }
