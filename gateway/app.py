"""Wiring of the gateway: what is opened, in which order, and what the server is made of."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway import store
from gateway.accounts import Accounts, TokenPolicy
from gateway.passwords import Passwords
from gateway.servicer import IdentityAdminServicer, IdentityServicer, MembershipServicer
from gateway.settings import GatewaySettings
from gateway.tokens import JWKS_PATH, SigningKeys
from genmesh.identity.v1 import identity_pb2_grpc
from servicekit import process
from servicekit.database import create_engine, ping, transaction, translate
from servicekit.identity import TokenVerifier
from servicekit.server import MeshServer
from servicekit.telemetry import HttpServer, metrics_page
from servicekit.tls import TlsFiles

SERVICE = "gateway"
SCHEMA = "gateway"
SERVICE_NAMES = (
    "genmesh.identity.v1.IdentityService",
    "genmesh.identity.v1.IdentityAdminService",
    "genmesh.identity.v1.MembershipService",
)
SWEEP_INTERVAL_S = 300.0
SWEEP_BATCH_ROWS = 1000

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What the server needs and its caller opens and closes."""

    engine: AsyncEngine
    keys: SigningKeys
    passwords: Passwords


def build_passwords(settings: GatewaySettings) -> Passwords:
    """Password hashing as the settings want it."""
    return Passwords(
        memory_kib=settings.password_hash_memory_kib,
        iterations=settings.password_hash_iterations,
        threads=settings.password_hash_threads,
        waiting_max=settings.password_hash_waiting_max,
    )


def build_accounts(settings: GatewaySettings, deps: Dependencies) -> Accounts:
    """The domain over its dependencies."""
    return Accounts(
        deps.engine,
        deps.passwords,
        deps.keys,
        TokenPolicy(
            issuer=settings.token_issuer,
            audience=settings.token_audience,
            access_token_ttl=timedelta(seconds=settings.access_token_ttl_s),
            refresh_token_ttl=timedelta(seconds=settings.refresh_token_ttl_s),
            session_ttl=timedelta(seconds=settings.session_ttl_s),
        ),
    )


def build_server(settings: GatewaySettings, deps: Dependencies) -> MeshServer:
    """The gRPC server, ready for `running(*SERVICE_NAMES)`."""
    server = MeshServer(
        settings,
        service=SERVICE,
        # Its own keys: the gateway does not call itself to verify what it signed.
        verifier=TokenVerifier(deps.keys, issuer=settings.token_issuer, audience=settings.token_audience),
        checks={"database": lambda: ping(deps.engine)},
        translate=translate,
    )
    accounts = build_accounts(settings, deps)
    identity_pb2_grpc.add_IdentityServiceServicer_to_server(IdentityServicer(accounts), server.grpc)
    identity_pb2_grpc.add_IdentityAdminServiceServicer_to_server(IdentityAdminServicer(accounts), server.grpc)
    identity_pb2_grpc.add_MembershipServiceServicer_to_server(MembershipServicer(accounts), server.grpc)
    return server


def build_jwks_server(settings: GatewaySettings, keys: SigningKeys) -> HttpServer:
    """The HTTPS server of the public keys, for Envoy and the other services."""
    return HttpServer(settings.jwks_listen_address, {JWKS_PATH: keys.jwks_page}, tls=TlsFiles.of(settings.certificates_dir, SERVICE))


async def sweep(engine: AsyncEngine) -> None:
    """Delete expired sessions and tokens, for ever."""
    while True:
        try:
            async with transaction(engine) as connection:
                deleted = await store.delete_expired(connection, limit=SWEEP_BATCH_ROWS)
        except Exception as error:
            if translate(error) is None:
                raise
            # The database is away; health says so, and what has expired can wait.
            _log.warning("sweep.failed", error=repr(error))
            deleted = 0
        if deleted < SWEEP_BATCH_ROWS:
            await asyncio.sleep(SWEEP_INTERVAL_S)


async def serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Run the gateway until `stop` is set."""
    async with AsyncExitStack() as stack:
        stack.enter_context(HttpServer(settings.metrics_address, {"/metrics": metrics_page}))
        engine = create_engine(settings, schema=SCHEMA, application=SERVICE)
        stack.push_async_callback(engine.dispose)
        passwords = build_passwords(settings)
        stack.callback(passwords.close)
        deps = Dependencies(engine, SigningKeys.open(settings.signing_keys_dir), passwords)
        _log.info("keys.opened", key_id=deps.keys.key_id)
        if settings.admin_email and settings.admin_password:
            await build_accounts(settings, deps).ensure_admin(
                email=settings.admin_email, password=settings.admin_password.get_secret_value()
            )
        stack.enter_context(build_jwks_server(settings, deps.keys))
        await stack.enter_async_context(build_server(settings, deps).running(*SERVICE_NAMES))
        await process.until_stopped(stop, sweep(engine))
