"""Wiring of credit_service: which parts there are and how they live together."""

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass, field

import prometheus_client
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import store
from credit_service.balances import BalanceFeed
from credit_service.ledger import Swept
from credit_service.payments import PaymentProvider
from credit_service.payments_servicer import PaymentsServicer
from credit_service.plans import PlanGrants
from credit_service.prices import PriceTable, load_prices
from credit_service.servicer import CreditsServicer, LedgerAdminServicer, LedgerServicer
from credit_service.settings import CreditSettings
from credit_service.tables import SCHEMA
from genmesh.credits.v1 import credits_pb2_grpc, payments_pb2_grpc
from servicekit import database
from servicekit.client import mesh_channel
from servicekit.doorkeeper import Doorkeeper, remote_doorkeeper
from servicekit.process import until_stopped
from servicekit.server import MeshServer
from servicekit.settings import DatabaseSettings
from servicekit.telemetry import HttpServer, metrics_page

SERVICE = "credit_service"
GRPC_SERVICES = (
    "genmesh.credits.v1.CreditsService",
    "genmesh.credits.v1.LedgerAdminService",
    "genmesh.credits.v1.LedgerService",
    "genmesh.credits.v1.PaymentsService",
)
EXPIRE_BATCH = 100
"""Holds expired, or accounts with lapses, by one statement: accounts stay locked until it ends."""

LAPSED = prometheus_client.Counter("genmesh_lapses_total", "Accounts that lost promotional credits because their time was over")
SWEEP_PROBLEMS = prometheus_client.Counter("genmesh_sweep_problems_total", "Holds and promotional credits that could not be ended")
EXPIRED = prometheus_client.Counter("genmesh_reservations_expired_total", "Holds given back because their time was over")

_log = structlog.get_logger(__name__)


def create_engine(settings: DatabaseSettings) -> AsyncEngine:
    """The engine of this service, in autocommit: every operation is one statement, so BEGIN and COMMIT would only be waited for."""
    return database.create_engine(settings, schema=SCHEMA, application=SERVICE, autocommit=True)


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What the server needs and its caller opens, runs and closes."""

    engine: AsyncEngine
    door: Doorkeeper
    feed: BalanceFeed
    prices: PriceTable = field(default_factory=lambda: load_prices(None))
    payments: PaymentProvider | None = None


def build_payments(settings: CreditSettings) -> AbstractContextManager[PaymentProvider | None]:
    """The payment provider of the settings, None where there is none."""
    secret_key, webhook_secret, return_url = settings.stripe_secret_key, settings.stripe_webhook_secret, settings.payment_return_url
    # Settings with some of them and not the others are refused.
    if settings.payment_provider == "none" or secret_key is None or webhook_secret is None or return_url is None:
        return nullcontext()
    # Only those who use it wait for the library to load.
    from credit_service.stripe_payments import StripePayments

    return StripePayments(
        secret_key=secret_key.get_secret_value(),
        webhook_secret=webhook_secret.get_secret_value(),
        return_url=return_url,
        api_url=settings.stripe_api_url,
    )


def build_server(settings: CreditSettings, deps: Dependencies) -> MeshServer:
    """The server with all servicers registered; enter `running(*GRPC_SERVICES)`."""
    engine, feed = deps.engine, deps.feed
    server = MeshServer(
        settings,
        service=SERVICE,
        verifier=deps.door.verifier(settings),
        checks={"database": lambda: database.ping(engine), "revocations": deps.door.revocations.ready},
        translate=database.translate,
        audit=deps.door.audit,
    )
    credits_pb2_grpc.add_CreditsServiceServicer_to_server(CreditsServicer(engine, feed), server.grpc)
    credits_pb2_grpc.add_LedgerAdminServiceServicer_to_server(LedgerAdminServicer(engine, feed), server.grpc)
    credits_pb2_grpc.add_LedgerServiceServicer_to_server(LedgerServicer(engine, feed), server.grpc)
    payments = PaymentsServicer(engine, deps.prices, deps.payments, feed.changed)
    payments_pb2_grpc.add_PaymentsServiceServicer_to_server(payments, server.grpc)
    return server


async def sweep(engine: AsyncEngine, feed: BalanceFeed, *, interval_s: float) -> None:
    """Give overdue holds back and let promotional credits lapse, for ever.

    A database that is away is waited for; any other error ends it.
    """
    while True:
        expired: Sequence[Swept] = ()
        lapsed: Sequence[Swept] = ()
        try:
            async with database.reading(engine) as connection:  # each of the two is a transaction of its own
                expired = await store.expire_holds(connection, limit=EXPIRE_BATCH)
                lapsed = await store.lapse_due(connection, limit=EXPIRE_BATCH)
        except Exception as error:
            if database.translate(error) is None:
                raise
            _log.warning("sweep.failed", error=repr(error))
        _report("holds.expired", EXPIRED, expired, feed)
        _report("credits.lapsed", LAPSED, lapsed, feed)
        if max(len(expired), len(lapsed)) < EXPIRE_BATCH:
            await asyncio.sleep(interval_s)


def _report(event: str, counter: prometheus_client.Counter, swept: Sequence[Swept], feed: BalanceFeed) -> None:
    done = [one.user_id for one in swept if one.problem is None]
    for user_id in done:
        feed.changed(user_id)
    if done:
        counter.inc(len(done))
        _log.info(event, count=len(done))
    for one in swept:
        if one.problem is not None:
            SWEEP_PROBLEMS.inc()
            _log.error("sweep.refused", user_id=str(one.user_id), problem=one.problem)


async def serve(settings: CreditSettings, stop: asyncio.Event) -> None:
    """Serve until `stop` is set."""
    async with AsyncExitStack() as stack:
        stack.enter_context(HttpServer(settings.metrics_address, {"/metrics": metrics_page}))
        engine = create_engine(settings)
        stack.push_async_callback(engine.dispose)
        # Watches are RPCs in flight: they leave room for those that move credits.
        feed = BalanceFeed(engine, watches_max=settings.max_concurrent_rpcs // 2, checkpoint_interval_s=settings.checkpoint_interval_s)
        prices = load_prices(settings.prices_file)
        payments = stack.enter_context(build_payments(settings))
        door = await stack.enter_async_context(remote_doorkeeper(settings, service=SERVICE))
        server = build_server(settings, Dependencies(engine, door, feed, prices, payments))

        async def drain() -> None:
            await server.draining.wait()
            feed.drain()

        stack.callback(asyncio.create_task(drain(), name="drain").cancel)
        for_ever = [door.revocations.run(), feed.run(), sweep(engine, feed, interval_s=settings.hold_expiry_interval_s)]
        if settings.plan_grant_interval_s > 0:
            gateway = await stack.enter_async_context(mesh_channel(settings, settings.gateway_address, caller=SERVICE, service="gateway"))
            plans = PlanGrants(
                engine,
                gateway,
                prices,
                interval_s=settings.plan_grant_interval_s,
                timeout_s=settings.rpc_timeout_s,
                changed=feed.changed,
            )
            for_ever.append(plans.run())
        async with server.running(*GRPC_SERVICES):
            await until_stopped(stop, *for_ever)
