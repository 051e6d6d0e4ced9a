"""Wiring of credit_service: which parts there are and how they live together."""

import asyncio
from contextlib import AsyncExitStack

import prometheus_client
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import store
from credit_service.servicer import CreditsServicer, LedgerAdminServicer, LedgerServicer
from credit_service.settings import CreditSettings
from credit_service.tables import SCHEMA
from genmesh.credits.v1 import credits_pb2_grpc
from servicekit import database
from servicekit.identity import KeySource, RemoteKeys, TokenVerifier
from servicekit.process import until_stopped
from servicekit.server import MeshServer
from servicekit.settings import DatabaseSettings
from servicekit.telemetry import HttpServer, metrics_page
from servicekit.tls import TlsFiles

SERVICE = "credit_service"
GRPC_SERVICES = (
    "genmesh.credits.v1.CreditsService",
    "genmesh.credits.v1.LedgerAdminService",
    "genmesh.credits.v1.LedgerService",
)
EXPIRE_BATCH = 100
"""Holds expired by one statement: their accounts stay locked until it ends."""

EXPIRED = prometheus_client.Counter("genmesh_reservations_expired_total", "Holds given back because their time was over")

_log = structlog.get_logger(__name__)


def create_engine(settings: DatabaseSettings) -> AsyncEngine:
    """The engine of this service, in autocommit: every operation is one statement, so BEGIN and COMMIT would only be waited for."""
    engine = database.create_engine(settings, schema=SCHEMA, application=SERVICE)
    return engine.execution_options(isolation_level="AUTOCOMMIT")


def build_server(settings: CreditSettings, *, engine: AsyncEngine, keys: KeySource) -> MeshServer:
    """The server with all servicers registered; enter `running(*GRPC_SERVICES)`."""
    server = MeshServer(
        settings,
        service=SERVICE,
        verifier=TokenVerifier(keys, issuer=settings.token_issuer, audience=settings.token_audience),
        checks={"database": lambda: database.ping(engine)},
        translate=database.translate,
    )
    credits_pb2_grpc.add_CreditsServiceServicer_to_server(CreditsServicer(engine), server.grpc)
    credits_pb2_grpc.add_LedgerAdminServiceServicer_to_server(LedgerAdminServicer(engine), server.grpc)
    credits_pb2_grpc.add_LedgerServiceServicer_to_server(LedgerServicer(engine), server.grpc)
    return server


async def expire_holds(engine: AsyncEngine, *, interval_s: float) -> None:
    """Give overdue holds back, for ever. A database that is away is waited for; any other error ends it."""
    while True:
        expired = 0
        try:
            async with database.transaction(engine) as connection:
                expired = await store.expire_due(connection, limit=EXPIRE_BATCH)
        except Exception as error:
            if database.translate(error) is None:
                raise
            _log.warning("holds.expiry_failed", error=repr(error))
        if expired:
            EXPIRED.inc(expired)
            _log.info("holds.expired", count=expired)
        if expired < EXPIRE_BATCH:
            await asyncio.sleep(interval_s)


async def serve(settings: CreditSettings, stop: asyncio.Event) -> None:
    """Serve until `stop` is set."""
    async with AsyncExitStack() as stack:
        stack.enter_context(HttpServer(settings.metrics_address, {"/metrics": metrics_page}))
        engine = create_engine(settings)
        stack.push_async_callback(engine.dispose)
        keys = RemoteKeys(settings.jwks_url, TlsFiles.of(settings.certificates_dir, SERVICE))
        await stack.enter_async_context(build_server(settings, engine=engine, keys=keys).running(*GRPC_SERVICES))
        await until_stopped(stop, expire_holds(engine, interval_s=settings.hold_expiry_interval_s))
