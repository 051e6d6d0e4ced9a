"""Who is calling: access tokens verified locally against cached keys, mesh services proven by their certificate.

Tokens are checked by Envoy at the door and again here. Making tokens is the gateway's business.
"""

import asyncio
import contextvars
import hashlib
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jwt
import structlog

from servicekit.errors import SIGN_IN_FIRST, Reason, unauthenticated, unavailable
from servicekit.revocations import TOKEN_LIFE_MAX_S, Revocations
from servicekit.tls import TlsFiles, WatchedContext, client_ssl_context

ALGORITHM = "EdDSA"
SPIFFE_PREFIX = "spiffe://genmesh/"
ROLE_ADMIN = "admin"
ROLE_OPERATOR = "operator"
EDGE = "envoy"
"""The peer that carries calls of people and programs outside; its word on where they come from is taken."""
SCOPES = frozenset({"read", "submit", "admin"})
"""What an API key can be allowed to do; names of genmesh.options.v1.Scope."""
CLOCK_SKEW_S = 5.0
VERIFIED_TOKENS_MAX = 10_000
JWKS_REFETCH_INTERVAL_S = 2.0
JWKS_MAX_AGE_S = 300.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller: a user with a token, a mesh service with a certificate, or both (a service acting for a user)."""

    user_id: str | None = None
    roles: frozenset[str] = frozenset()
    plan: str = ""
    expire_time: float | None = None
    service: str | None = None
    api_key_id: str | None = None
    """The API key that the token was made for, a UUID in its usual form; None: the user signed in."""
    session_id: str | None = None
    """The session that the token belongs to; None for API keys."""
    scopes: frozenset[str] | None = None
    """What the API key may do: `read`, `submit`, `admin`; None: all that its user may."""
    issue_time: float = 0.0
    client_address: str = ""
    """Where the call came from, as far as somebody we trust saw it."""
    request_id: str = ""
    revocations: Revocations | None = field(default=None, compare=False, repr=False)
    """Where to look whether the token still holds."""

    @property
    def is_admin(self) -> bool:
        """Whether the token has the role `admin`."""
        return ROLE_ADMIN in self.roles

    @property
    def is_operator(self) -> bool:
        """Whether the token has the role `operator`, or `admin`, who may do all that operators may."""
        return ROLE_OPERATOR in self.roles or self.is_admin

    def check_alive(self) -> None:
        """For streams, which may outlive the access token they were opened with; to be called every 15 s at least.

        Raises UNAUTHENTICATED (TOKEN_EXPIRED, TOKEN_REVOKED); UNAVAILABLE when that cannot be known.
        """
        if self.expire_time is not None and time.time() >= self.expire_time:
            raise unauthenticated(Reason.ERROR_REASON_TOKEN_EXPIRED, "the access token expired; resume the watch with a new one")
        if self.revocations is not None:
            self.revocations.check(issue_time=self.issue_time, session_id=self.session_id, api_key_id=self.api_key_id, user_id=self.user_id)


_principal: contextvars.ContextVar[Principal | None] = contextvars.ContextVar("principal", default=None)


def set_principal(principal: Principal) -> None:
    """Bind the caller of the RPC that the current task serves."""
    _principal.set(principal)


def current_principal() -> Principal:
    """The caller of the RPC that the current task serves."""
    principal = _principal.get()
    if principal is None:
        raise RuntimeError("no RPC is being served")
    return principal


def current_user_id() -> str:
    """The signed-in user of the RPC that the current task serves."""
    user_id = current_principal().user_id
    if user_id is None:
        raise unauthenticated(Reason.ERROR_REASON_TOKEN_MISSING, SIGN_IN_FIRST)
    return user_id


class KeySource(Protocol):
    """Where public keys come from."""

    async def get(self, key_id: str) -> jwt.PyJWK | None:
        """The key with this id, or None."""
        ...


class RemoteKeys:
    """The gateway's JWKS over mTLS: cached, refetched when it is old and when an unknown key id turns up."""

    def __init__(self, url: str, files: TlsFiles) -> None:
        self._context = WatchedContext(files, lambda files: client_ssl_context(files, "gateway"))
        self._client = jwt.PyJWKClient(
            url, cache_keys=False, cache_jwk_set=False, timeout=2, cooldown_duration=0, ssl_context=self._context.current()
        )
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._lock = asyncio.Lock()

    async def get(self, key_id: str) -> jwt.PyJWK | None:
        """The key with this id, or None; UNAVAILABLE when there are no keys and the gateway cannot be reached."""
        arrived = time.monotonic()
        if key_id not in self._keys or arrived - self._fetched_at > JWKS_MAX_AGE_S:
            async with self._lock:
                # A try that ended while we waited counts for us, failed or not: nobody queues up behind time-outs. With keys
                # at hand there is one try an interval, so that neither unknown ids nor an outage flood the gateway.
                pause = JWKS_REFETCH_INTERVAL_S if self._keys else 0.0
                if arrived - self._tried_at > pause:
                    await self._fetch()
            if not self._keys:
                raise unavailable("the keys that verify access tokens cannot be fetched right now")
        return self._keys.get(key_id)

    async def _fetch(self) -> None:
        try:
            self._client.ssl_context = self._context.current()  # certificates change while we run
            key_set = await asyncio.to_thread(self._client.get_jwk_set, True)
        # A connection that breaks amid the body raises what neither PyJWT nor urllib wraps.
        except (jwt.PyJWTError, OSError, ValueError) as error:
            _log.warning("jwks.fetch_failed", error=str(error))
        else:
            self._keys = {key.key_id: key for key in key_set.keys if key.key_id}
            self._fetched_at = time.monotonic()
        finally:
            self._tried_at = time.monotonic()


class TokenVerifier:
    """Verifies access tokens: signature, algorithm, issuer, audience, expiry.

    A token once verified is remembered as long as it and its key live, so that a busy client costs one signature check, not thousands.
    """

    def __init__(self, keys: KeySource, *, issuer: str, audience: str, revocations: Revocations | None = None) -> None:
        self._keys = keys
        self._revocations = revocations
        self._issuer = issuer
        self._audience = audience
        self._verified: OrderedDict[bytes, tuple[Principal, jwt.PyJWK]] = OrderedDict()

    async def verify(self, token: str) -> Principal:
        """The user of a token. Raises UNAUTHENTICATED (TOKEN_INVALID, TOKEN_EXPIRED, TOKEN_REVOKED); UNAVAILABLE."""
        principal = await self._known_or_verified(token)
        if self._revocations is not None:
            self._revocations.check(
                issue_time=principal.issue_time,
                session_id=principal.session_id,
                api_key_id=principal.api_key_id,
                user_id=principal.user_id,
            )
        return principal

    async def _known_or_verified(self, token: str) -> Principal:
        digest = hashlib.sha256(token.encode()).digest()
        known = self._verified.get(digest)
        if known is not None:
            principal, key = known
            lives = principal.expire_time is not None and principal.expire_time + CLOCK_SKEW_S > time.time()
            # A key that was taken out of the set takes its tokens along.
            if lives and await self._keys.get(key.key_id or "") is key:
                self._verified.move_to_end(digest)
                return principal
            self._verified.pop(digest, None)
        principal, key = await self._verify(token)
        self._verified[digest] = principal, key
        if len(self._verified) > VERIFIED_TOKENS_MAX:
            self._verified.popitem(last=False)
        return principal

    async def _verify(self, token: str) -> tuple[Principal, jwt.PyJWK]:
        try:
            header = jwt.get_unverified_header(token)
            key = await self._keys.get(str(header.get("kid", "")))
            if key is None:
                raise unauthenticated(Reason.ERROR_REASON_TOKEN_INVALID, "the access token is signed by an unknown key")
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=[ALGORITHM],
                audience=self._audience,
                issuer=self._issuer,
                leeway=CLOCK_SKEW_S,
                options={"require": ["exp", "iat", "sub", "iss", "aud"]},
            )
        except jwt.ExpiredSignatureError as error:
            raise unauthenticated(Reason.ERROR_REASON_TOKEN_EXPIRED, "the access token has expired; refresh the session") from error
        except jwt.PyJWTError as error:
            raise unauthenticated(Reason.ERROR_REASON_TOKEN_INVALID, "the access token does not verify") from error
        if claims["exp"] - claims["iat"] > TOKEN_LIFE_MAX_S:
            raise unauthenticated(Reason.ERROR_REASON_TOKEN_INVALID, "the access token lives too long")
        principal = Principal(
            user_id=str(claims["sub"]),
            roles=frozenset(str(role) for role in claims.get("roles", ())),
            plan=str(claims.get("plan", "")),
            expire_time=float(claims["exp"]),
            issue_time=float(claims["iat"]),
            session_id=_id(claims, "sid"),
            api_key_id=(api_key_id := _id(claims, "api_key_id")),
            # A token of a key that does not say what it may do may do nothing.
            scopes=None if api_key_id is None else SCOPES.intersection(map(str, claims.get("scopes", ()))),
            revocations=self._revocations,
        )
        return principal, key


def _id(claims: Mapping[str, Any], name: str) -> str | None:
    claim = claims.get(name)
    if claim is None:
        return None
    try:
        return str(uuid.UUID(claim if isinstance(claim, str) else ""))
    except ValueError:
        raise unauthenticated(Reason.ERROR_REASON_TOKEN_INVALID, f"the claim {name} of the access token is no id") from None


def peer_service(auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
    """The mesh service named by the peer's certificate (URI SAN `spiffe://genmesh/<service>`), or None.

    gRPC has checked that the mesh CA signed the certificate; which service it names is for us to read.
    """
    ids = list(auth_context.get("peer_spiffe_id", ()))
    # One certificate, one identity (SPIFFE X.509-SVID, section 2).
    uri = ids[0].decode() if len(ids) == 1 else ""
    return uri.removeprefix(SPIFFE_PREFIX) if uri.startswith(SPIFFE_PREFIX) else None
