"""Wiring of the gateway: what is opened, in which order, and what the server is made of."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from ext_authz import external_auth_pb2_grpc
from gateway import oidc, outside, revocations, store
from gateway.accounts import Accounts, Gatekeeping, TokenPolicy
from gateway.admin import Administration
from gateway.admin_servicer import IdentityAdminServicer
from gateway.api_keys import ApiKeys, Ceilings
from gateway.audit import AuditLog
from gateway.authorization import KeyTokens
from gateway.authorization_servicer import AuthorizationServicer
from gateway.breached import BreachedPasswords
from gateway.internal_servicer import AuditServicer, RevocationServicer
from gateway.oidc import Client, CodeFlow, Providers
from gateway.passwords import Passwords
from gateway.servicer import IdentityServicer, MembershipServicer
from gateway.settings import GatewaySettings
from gateway.throttle import Throttle, ThrottleLimits
from gateway.tokens import JWKS_PATH, SigningKeys
from genmesh.identity.v1 import identity_pb2_grpc
from servicekit import process
from servicekit.client import mesh_channel
from servicekit.database import create_engine, ping, transaction, translate
from servicekit.identity import TokenVerifier
from servicekit.limits import RateLimiter
from servicekit.revocations import Revocations
from servicekit.server import MeshServer
from servicekit.telemetry import HttpServer, metrics_page
from servicekit.tls import TlsFiles

SERVICE = "gateway"
SCHEMA = "gateway"
SERVICE_NAMES = (
    "genmesh.identity.v1.IdentityService",
    "genmesh.identity.v1.IdentityAdminService",
    "genmesh.identity.v1.MembershipService",
    "genmesh.identity.v1.RevocationService",
    "genmesh.identity.v1.AuditService",
    "envoy.service.auth.v3.Authorization",
)
FIREBASE_ISSUERS = "https://securetoken.google.com"
DAY_S = 24 * 3600
SWEEP_INTERVAL_S = 300.0
SWEEP_BATCH_ROWS = 1000

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What the server needs and its caller opens and closes."""

    engine: AsyncEngine
    keys: SigningKeys
    passwords: Passwords
    http: httpx.AsyncClient
    providers: Providers
    throttle: Throttle
    api_keys: ApiKeys
    revocations: Revocations


@asynccontextmanager
async def open_dependencies(settings: GatewaySettings) -> AsyncGenerator[Dependencies]:
    """What the settings name, open while the block runs."""
    async with AsyncExitStack() as stack:
        engine = create_engine(settings, schema=SCHEMA, application=SERVICE)
        stack.push_async_callback(engine.dispose)
        passwords = build_passwords(settings)
        stack.callback(passwords.close)
        http = await stack.enter_async_context(outside.open_client())
        limiter = RateLimiter(settings)
        stack.push_async_callback(limiter.aclose)
        throttle = build_throttle(settings, limiter)
        keys = SigningKeys.open(settings.signing_keys_dir, rotation_s=settings.signing_key_rotation_days * DAY_S)
        credits = await stack.enter_async_context(
            mesh_channel(settings, settings.credits_address, caller=SERVICE, service="credit_service")
        )
        ceilings = Ceilings(credits, timeout_s=settings.rpc_timeout_s)
        yield Dependencies(
            engine=engine,
            keys=keys,
            passwords=passwords,
            http=http,
            providers=build_providers(settings, http),
            throttle=throttle,
            api_keys=ApiKeys(engine, keys, build_policy(settings), throttle, ceilings),
            revocations=Revocations(revocations.fetch_from(engine)),
        )


def build_passwords(settings: GatewaySettings) -> Passwords:
    """Password hashing as the settings want it."""
    return Passwords(
        memory_kib=settings.password_hash_memory_kib,
        iterations=settings.password_hash_iterations,
        threads=settings.password_hash_threads,
        waiting_max=settings.password_hash_waiting_max,
        client_max=settings.password_hash_client_max,
    )


def build_providers(settings: GatewaySettings, http: httpx.AsyncClient) -> Providers:
    """The identity providers that the settings offer."""
    google = google_code = firebase = None
    client_ids, project_id = settings.google_client_ids, settings.firebase_project_id
    if client_ids:
        google = oidc.google(http, issuer=settings.google_issuer, client_ids=client_ids)
    if google is not None and settings.google_client_secret is not None:
        client = Client(client_ids[0], settings.google_client_secret.get_secret_value(), settings.google_redirect_uris)
        google_code = CodeFlow(http, google, client)
    if project_id:
        issuer = settings.firebase_issuer or f"{FIREBASE_ISSUERS}/{project_id}"
        firebase = oidc.firebase(http, issuer=issuer, project_id=project_id)
    return Providers(google, client_ids[0] if client_ids else "", google_code, firebase, project_id or "")


def build_throttle(settings: GatewaySettings, limiter: RateLimiter) -> Throttle:
    """How often sign-ins may fail, as the settings want it."""
    return Throttle(
        limiter,
        ThrottleLimits(
            account_client_15min=settings.sign_in_failures_max,
            account_hour=settings.sign_in_account_failures_max,
            client_hour=settings.sign_in_client_failures_max,
            registrations_client_hour=settings.registrations_max,
            successes_account_client_hour=settings.sign_ins_max,
        ),
    )


def build_policy(settings: GatewaySettings) -> TokenPolicy:
    """What tokens say and how long they live, as the settings want it."""
    return TokenPolicy(
        issuer=settings.token_issuer,
        audience=settings.token_audience,
        access_token_ttl=timedelta(seconds=settings.access_token_ttl_s),
        refresh_token_ttl=timedelta(seconds=settings.refresh_token_ttl_s),
        session_ttl=timedelta(seconds=settings.session_ttl_s),
        recent_sign_in=timedelta(seconds=settings.recent_sign_in_s),
    )


def build_accounts(settings: GatewaySettings, deps: Dependencies) -> Accounts:
    """The domain over its dependencies."""
    breached = BreachedPasswords(deps.http, settings.breached_passwords_url)
    return Accounts(
        deps.engine,
        Gatekeeping(deps.passwords, breached, deps.providers, deps.throttle),
        deps.keys,
        build_policy(settings),
    )


def build_server(settings: GatewaySettings, deps: Dependencies) -> MeshServer:
    """The gRPC server, ready for `running(*SERVICE_NAMES)`."""
    # Its own keys, list of revocations and audit trail: the gateway does not call itself for them.
    verifier = TokenVerifier(deps.keys, issuer=settings.token_issuer, audience=settings.token_audience, revocations=deps.revocations)
    audit_log = AuditLog(deps.engine)
    server = MeshServer(
        settings,
        service=SERVICE,
        verifier=verifier,
        checks={"database": lambda: ping(deps.engine), "revocations": deps.revocations.ready},
        translate=translate,
        audit=audit_log,
    )
    accounts = build_accounts(settings, deps)
    identity_pb2_grpc.add_IdentityServiceServicer_to_server(
        IdentityServicer(accounts, deps.providers, deps.api_keys, cookie_max_age_s=settings.refresh_token_ttl_s), server.grpc
    )
    administration = Administration(deps.engine)
    identity_pb2_grpc.add_IdentityAdminServiceServicer_to_server(IdentityAdminServicer(accounts, administration, audit_log), server.grpc)
    identity_pb2_grpc.add_MembershipServiceServicer_to_server(MembershipServicer(accounts), server.grpc)
    identity_pb2_grpc.add_RevocationServiceServicer_to_server(RevocationServicer(deps.engine), server.grpc)
    identity_pb2_grpc.add_AuditServiceServicer_to_server(AuditServicer(audit_log), server.grpc)
    authorization = AuthorizationServicer(KeyTokens(deps.api_keys, verifier))
    external_auth_pb2_grpc.add_AuthorizationServicer_to_server(authorization, server.grpc)
    return server


def build_jwks_server(settings: GatewaySettings, keys: SigningKeys) -> HttpServer:
    """The HTTPS server of the public keys, for Envoy and the other services."""
    return HttpServer(settings.jwks_listen_address, {JWKS_PATH: keys.jwks_page}, tls=TlsFiles.of(settings.certificates_dir, SERVICE))


async def sweep(engine: AsyncEngine) -> None:
    """Delete expired sessions and tokens and revocations that stop nothing any more, for ever."""
    while True:
        try:
            async with transaction(engine) as connection:
                deleted = await store.delete_expired(connection, limit=SWEEP_BATCH_ROWS)
                deleted += await store.delete_old_revocations(connection, age=revocations.KEEP, limit=SWEEP_BATCH_ROWS)
        except Exception as error:
            if translate(error) is None:
                raise
            # The database is away; health says so, and what has expired can wait.
            _log.warning("sweep.failed", error=repr(error))
            deleted = 0
        if deleted < SWEEP_BATCH_ROWS:
            await asyncio.sleep(SWEEP_INTERVAL_S)


def background(deps: Dependencies) -> tuple[Coroutine[Any, Any, None], ...]:
    """What runs beside the server, for ever."""
    return (sweep(deps.engine), deps.revocations.run(), deps.keys.keep_current(), deps.api_keys.keep_noting_uses())


async def serve(settings: GatewaySettings, stop: asyncio.Event) -> None:
    """Run the gateway until `stop` is set."""
    async with AsyncExitStack() as stack:
        stack.enter_context(HttpServer(settings.metrics_address, {"/metrics": metrics_page}))
        deps = await stack.enter_async_context(open_dependencies(settings))
        _log.info("keys.opened", key_id=deps.keys.key_id)
        if settings.admin_email and settings.admin_password:
            await build_accounts(settings, deps).ensure_admin(
                email=settings.admin_email, password=settings.admin_password.get_secret_value()
            )
        stack.enter_context(build_jwks_server(settings, deps.keys))
        await stack.enter_async_context(build_server(settings, deps).running(*SERVICE_NAMES))
        await process.until_stopped(stop, *background(deps))
