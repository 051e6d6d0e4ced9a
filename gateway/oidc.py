"""ID tokens of other identity providers (OpenID Connect): discovery, cached keys, verification, the exchange of authorization codes.

What a proven identity may do here is the business of `accounts`.
"""

import asyncio
import hmac
import ipaddress
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

import grpc
import httpx
import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from gateway import outside
from gateway.identity import ExternalIdentity, canonical_email
from servicekit.errors import MeshError, Reason, invalid, unauthenticated, unavailable

ALGORITHM = "RS256"
"""What Google and Firebase sign with. Anything else a token asks for is refused before a key is looked up (RFC 8725, 3.1)."""
KEY_BITS_MIN = 2048
KEYS_MAX = 64
DOCUMENT_MAX_BYTES = 256 * 1024
FETCH_TIMEOUT_S = 3.0
KEYS_MAX_AGE_S = 3600.0
KEYS_STALE_MAX_S = 6 * 3600.0
"""How old keys may be while the issuer is away: that long a key that it has taken back is still believed."""
STALE_RETRY_S = 30.0
UNKNOWN_KEY_RETRY_S = 5.0
"""Key ids are the sender's to choose: made-up ones must not make us a flood at the issuer."""
CLOCK_SKEW_S = 10.0
SUBJECT_MAX = 255
EMAIL_MAX = 254
KEY_ID_MAX = 256
EMAIL = re.compile(r"[!-?A-~]+@[!-?A-~]+")
"""Printable ASCII, as in RegisterUser."""
LOOPBACK_REDIRECT = re.compile(r"(?P<host>http://(?:127\.0\.0\.1|\[::1\])):[0-9]{1,5}(?P<path>/[^?#]*)?")
DNS_NAME = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
"""With a dot, and a last label that no resolver takes for a part of an IPv4 address."""
ERROR_CODE = re.compile(r"[a-z_]{1,64}")
SCOPE = "openid email profile"

_log = structlog.get_logger(__name__)


def check_outside_url(url: str) -> str:
    """The address as it is. Raises ValueError unless it is https, or http on loopback, without user, query or fragment."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment or not parts.hostname:
        raise ValueError("expected an address without user, query or fragment")
    if not (_is_loopback(parts) or _ip_address(parts.hostname) or DNS_NAME.fullmatch(parts.hostname)):
        raise ValueError("expected a DNS name with a dot, or an IP address in its usual form")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(parts)):
        raise ValueError("expected https://… (http only on loopback)")
    return url


def _is_loopback(parts: SplitResult) -> bool:
    host = parts.hostname or ""
    address = _ip_address(host)
    return host == "localhost" if address is None else address.is_loopback


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address, if the host is one in its canonical form: `127.1` and `0x7f000001` are for resolvers, who know what they mean."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return address if str(address) == host and getattr(address, "scope_id", None) is None else None


def _check_endpoint(url: Any, issuer: str) -> str:
    """An address out of an issuer's document. Only an issuer on loopback may lead us into networks that are not public."""
    if not isinstance(url, str):
        raise ValueError("expected an address")
    parts = urlsplit(url)
    if not _is_loopback(urlsplit(issuer)):
        if parts.scheme != "https":
            raise ValueError("expected https://…")
        host = parts.hostname or ""
        address = _ip_address(host)
        if not (address.is_global if address is not None else DNS_NAME.fullmatch(host) and not host.endswith(".localhost")):
            raise ValueError("expected a public address")
    return check_outside_url(url)


def _refused(why: str) -> MeshError:
    _log.info("id_token.refused", why=why)
    return unauthenticated(Reason.ERROR_REASON_ID_TOKEN_INVALID, f"the proof of identity does not verify: {why}")


class ProviderError(Exception):
    """The issuer is away or says what it should not."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """What is needed of an issuer's discovery document."""

    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str


class Provider:
    """An identity provider: its documents, cached, and the ID tokens that it signs."""

    def __init__(
        self,
        http: httpx.AsyncClient,
        *,
        issuer: str,
        audiences: frozenset[str],
        spellings: frozenset[str] = frozenset(),
        check: Callable[[Mapping[str, Any]], str | None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`spellings` are other forms of `iss` that mean the same issuer; `check` says what else is wrong with claims."""
        self._http = http
        self._issuer = check_outside_url(issuer)
        self._audiences = audiences
        self._spellings = [issuer, *spellings]
        self._check = check
        self._clock = clock
        self._metadata: Metadata | None = None
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched_at = float("-inf")
        self._tried_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None

    async def verify(self, token: str, *, audience: str | None = None, nonce: str | None = None) -> ExternalIdentity:
        """The identity that an ID token proves; with `audience`, made for that client only; with `nonce`, for that sign-in only.

        Raises UNAUTHENTICATED (ID_TOKEN_INVALID), UNAVAILABLE (the issuer's keys cannot be had).
        """
        claims = await self._verified_claims(token)
        self._check_audience(claims, self._audiences if audience is None else frozenset((audience,)))
        if nonce is not None and not hmac.compare_digest(nonce.encode(), str(claims.get("nonce", "")).encode(errors="replace")):
            raise _refused("the nonce is another")
        if (wrong := self._check(claims)) is not None:
            raise _refused(wrong)
        subject, email, name = claims["sub"], claims.get("email"), claims.get("name")
        # OpenID Connect Core 2: at most 255 ASCII characters.
        if not 0 < len(subject) <= SUBJECT_MAX or not (subject.isascii() and subject.isprintable()):
            raise _refused("the subject is not one")
        if not isinstance(email, str) or len(email) > EMAIL_MAX or not EMAIL.fullmatch(email):
            raise _refused("it has no e-mail address")
        # Only the provider's word makes an address somebody's; the string "true" is not its word.
        if claims.get("email_verified") is not True:
            raise _refused("the e-mail address is not verified")
        return ExternalIdentity(self._issuer, subject, canonical_email(email), name if isinstance(name, str) else "")

    def _check_audience(self, claims: Mapping[str, Any], trusted: frozenset[str]) -> None:
        """OpenID Connect Core 3.1.3.7: nobody among the audiences, nor the party it was issued to, whom we do not trust."""
        audiences = frozenset(claims["aud"] if isinstance(claims["aud"], list) else [claims["aud"]])
        issued_to = claims.get("azp")
        known = issued_to in trusted if isinstance(issued_to, str) else issued_to is None and len(audiences) == 1
        if not known or not audiences <= trusted:
            raise _refused("it is made for somebody else")

    async def metadata(self) -> Metadata:
        """Where the issuer's endpoints are. Raises UNAVAILABLE."""
        if self._metadata is None or self._clock() - self._fetched_at > KEYS_MAX_AGE_S:
            await self._refresh(UNKNOWN_KEY_RETRY_S if self._metadata is None else STALE_RETRY_S)
        if self._metadata is None:
            raise unavailable("the identity provider is out of reach", UNKNOWN_KEY_RETRY_S)
        return self._metadata

    async def _verified_claims(self, token: str) -> dict[str, Any]:
        try:
            header = jwt.get_unverified_header(token)
            if header.get("alg") != ALGORITHM:
                raise _refused("it is signed with another algorithm")
            key_id = header.get("kid")
            key = await self._key(key_id) if key_id is None or (isinstance(key_id, str) and len(key_id) <= KEY_ID_MAX) else None
            if key is None:
                raise _refused("it is signed with an unknown key")
            return jwt.decode(
                token,
                key,
                algorithms=[ALGORITHM],
                audience=sorted(self._audiences),
                issuer=self._spellings,
                leeway=CLOCK_SKEW_S,
                options={"require": ["iss", "aud", "exp", "iat", "sub"]},
            )
        except jwt.ExpiredSignatureError as error:
            raise _refused("it has expired") from error
        except (jwt.InvalidIssuerError, jwt.InvalidAudienceError) as error:
            raise _refused("it is made by or for somebody else") from error
        except jwt.ImmatureSignatureError as error:
            raise _refused("it is not valid yet") from error
        # The last three: a deeply nested header or payload, times that are none.
        except (jwt.PyJWTError, RecursionError, ValueError, OverflowError) as error:
            raise _refused("form, signature or claims are wrong") from error

    def _known(self, key_id: str | None) -> jwt.PyJWK | None:
        # OpenID Connect Core 10.1: an issuer with one key need not name it.
        if key_id is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(key_id)

    async def _key(self, key_id: str | None) -> jwt.PyJWK | None:
        age_s = self._clock() - self._fetched_at
        known = self._known(key_id)
        if known is not None and age_s <= KEYS_MAX_AGE_S:
            return known
        if known is not None and age_s <= KEYS_STALE_MAX_S:
            # Who comes while somebody tries for fresh ones need not wait to see whether the issuer answers.
            if self._fetching is None:
                await self._refresh(STALE_RETRY_S)
            return self._known(key_id)
        reached = await self._refresh(UNKNOWN_KEY_RETRY_S)
        known = self._known(key_id)
        if self._clock() - self._fetched_at > KEYS_STALE_MAX_S or (not reached and known is None):
            raise unavailable("the identity provider is out of reach", UNKNOWN_KEY_RETRY_S)
        return known

    async def _refresh(self, pause_s: float) -> bool:
        """Fetch anew, unless the last try is not `pause_s` old; whether the last try succeeded.

        All who come meanwhile wait for the same fetch, which goes on without any of them: nobody can end it for the others by
        hanging up.
        """
        if self._fetching is None:
            if self._clock() - self._tried_at <= pause_s:
                return self._fetched_at >= self._tried_at
            self._tried_at = self._clock()
            self._fetching = asyncio.create_task(self._fetch(), name="issuer")
        await asyncio.shield(self._fetching)
        return self._fetched_at >= self._tried_at

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(FETCH_TIMEOUT_S):
                document = await self._document(f"{self._issuer.rstrip('/')}/.well-known/openid-configuration")
                if document.get("issuer") != self._issuer:
                    raise ProviderError("the document is another issuer's")
                names = ("authorization_endpoint", "token_endpoint", "jwks_uri")
                metadata = Metadata(**{name: _check_endpoint(document.get(name), self._issuer) for name in names})
                keys = _keys(await self._document(metadata.jwks_uri))
        except Exception as error:  # whatever is wrong over there: what we have is what we go on with
            _log.warning("issuer.fetch_failed", issuer=self._issuer, error=repr(error)[:200], cached_keys=len(self._keys))
        else:
            self._metadata, self._keys = metadata, keys
            self._fetched_at = self._tried_at = self._clock()
        finally:
            self._fetching = None

    async def _document(self, url: str) -> dict[str, Any]:
        return await outside.get_json(self._http, url, max_bytes=DOCUMENT_MAX_BYTES, timeout_s=FETCH_TIMEOUT_S)


def _keys(document: Mapping[str, Any]) -> dict[str, jwt.PyJWK]:
    """The keys of a JWK set (RFC 7517) that can have signed an ID token. Raises ProviderError when there is none."""
    listed = document.get("keys")
    if not isinstance(listed, list) or len(listed) > KEYS_MAX:
        raise ProviderError(f"expected a list of at most {KEYS_MAX} keys")
    keys: dict[str, jwt.PyJWK] = {}
    for one in listed:
        if not isinstance(one, dict) or one.get("kty") != "RSA" or one.get("use", "sig") != "sig" or one.get("alg", ALGORITHM) != ALGORITHM:
            continue
        try:
            key = jwt.PyJWK.from_dict(one, algorithm=ALGORITHM)
        except (jwt.PyJWTError, ValueError):
            continue
        if isinstance(key.key_id, str) and isinstance(key.key, RSAPublicKey) and key.key.key_size >= KEY_BITS_MIN:
            keys[key.key_id] = key
    if not keys:
        raise ProviderError("no key that can be used")
    return keys


@dataclass(frozen=True, slots=True)
class IdToken:
    """An ID token that an app got from a provider."""

    name: Literal["google_id_token", "firebase_id_token"]
    token: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Code:
    """What a browser was sent back with; see AuthorizationCode in the proto."""

    code: str = field(repr=False)
    code_verifier: str = field(repr=False)
    redirect_uri: str
    nonce: str
    name: Literal["google_code"] = "google_code"


Proof = IdToken | Code
"""What proves an identity elsewhere; `name` as in the proto."""


@dataclass(frozen=True, slots=True)
class Client:
    """Our registration at a provider, for browsers."""

    client_id: str
    client_secret: str = field(repr=False)
    redirect_uris: tuple[str, ...]


def _without_loopback_port(redirect_uri: str) -> str | None:
    """The URI without its port where it leads to a program on the browser's own machine, which takes any free port (RFC 8252, 7.3)."""
    match = LOOPBACK_REDIRECT.fullmatch(redirect_uri)
    return f"{match['host']}{match['path'] or ''}" if match else None


class CodeFlow:
    """Authorization codes (RFC 6749) with PKCE (RFC 7636): changed for ID tokens at the provider's token endpoint."""

    def __init__(self, http: httpx.AsyncClient, provider: Provider, client: Client) -> None:
        self._http = http
        self._provider = provider
        self.client = client

    async def authorization_endpoint(self) -> str:
        """Where browsers begin. Raises UNAVAILABLE."""
        return (await self._provider.metadata()).authorization_endpoint

    async def prove(self, proof: Code) -> ExternalIdentity:
        """The identity that a code stands for. Raises UNAUTHENTICATED (ID_TOKEN_INVALID), INVALID_ARGUMENT, UNAVAILABLE."""
        if (
            proof.redirect_uri not in self.client.redirect_uris
            and _without_loopback_port(proof.redirect_uri) not in self.client.redirect_uris
        ):
            raise invalid("google_code.redirect_uri", "is not one of this gateway's")
        metadata = await self._provider.metadata()
        form = {
            "grant_type": "authorization_code",
            "code": proof.code,
            "code_verifier": proof.code_verifier,
            "redirect_uri": proof.redirect_uri,
            "client_id": self.client.client_id,
            "client_secret": self.client.client_secret,
        }
        try:
            status, answer = await outside.post_form(
                self._http, metadata.token_endpoint, form, max_bytes=DOCUMENT_MAX_BYTES, timeout_s=FETCH_TIMEOUT_S
            )
        except outside.OutsideError as error:
            _log.warning("code.exchange_failed", error=repr(error)[:200])
            raise unavailable("the identity provider is out of reach") from error
        if status == HTTPStatus.OK and isinstance(token := answer.get("id_token"), str):
            # The token comes straight from the provider, and is checked like one that does not.
            return await self._provider.verify(token, audience=self.client.client_id, nonce=proof.nonce)
        error = str(answer.get("error", ""))
        said = error if ERROR_CODE.fullmatch(error) else "other"
        if status == HTTPStatus.BAD_REQUEST and said not in ("invalid_client", "unauthorized_client"):
            _log.info("code.refused", error=said)
            raise _refused("the authorization code is not valid, was used before, or belongs to another sign-in")
        # Our own registration, or the provider, is at fault: nothing that the caller could mend.
        _log.error("code.exchange_failed", status=status, error=said)
        raise unavailable("the identity provider does not answer as it should")


def google(http: httpx.AsyncClient, *, issuer: str, client_ids: tuple[str, ...], clock: Callable[[], float] = time.monotonic) -> Provider:
    """Google: its older tokens name the issuer without a scheme."""
    spellings = frozenset((issuer.removeprefix("https://"),)) if issuer.startswith("https://") else frozenset[str]()
    return Provider(http, issuer=issuer, audiences=frozenset(client_ids), spellings=spellings, clock=clock)


def firebase(http: httpx.AsyncClient, *, issuer: str, project_id: str, clock: Callable[[], float] = time.monotonic) -> Provider:
    """Firebase Authentication (https://firebase.google.com/docs/auth/admin/verify-id-tokens)."""

    def check(claims: Mapping[str, Any]) -> str | None:
        signed_in = claims.get("auth_time")
        if not isinstance(signed_in, int | float) or isinstance(signed_in, bool) or signed_in > time.time() + CLOCK_SKEW_S:
            return "auth_time is missing or in the future"
        way = claims.get("firebase")
        if not isinstance(way, dict) or not isinstance(way.get("sign_in_provider"), str) or not way["sign_in_provider"]:
            return "it is not one of Firebase Authentication"
        return None

    return Provider(http, issuer=issuer, audiences=frozenset((project_id,)), check=check, clock=clock)


@dataclass(frozen=True, slots=True)
class Offer:
    """What people need to know to sign in; empty: not offered."""

    google_client_id: str = ""
    authorization_endpoint: str = ""
    redirect_uris: tuple[str, ...] = ()
    firebase_project_id: str = ""


@dataclass(frozen=True, slots=True)
class Providers:
    """The identity providers that are offered here; None: not offered."""

    google: Provider | None = None
    google_client_id: str = ""
    google_code: CodeFlow | None = None
    firebase: Provider | None = None
    firebase_project_id: str = ""

    async def offer(self) -> Offer:
        """What is offered right now: without the issuer's word on where to begin, browsers are not told to."""
        if self.google_code is None:
            return Offer(self.google_client_id, firebase_project_id=self.firebase_project_id)
        try:
            endpoint = await self.google_code.authorization_endpoint()
        except MeshError:
            endpoint = ""
        redirect_uris = self.google_code.client.redirect_uris if endpoint else ()
        return Offer(self.google_client_id, endpoint, redirect_uris, self.firebase_project_id)

    async def prove(self, proof: Proof) -> ExternalIdentity:
        """The identity that a proof stands for. Raises what the providers raise; UNIMPLEMENTED (NOT_OFFERED)."""
        if isinstance(proof, Code) and self.google_code is not None:
            return await self.google_code.prove(proof)
        if isinstance(proof, IdToken):
            provider = self.google if proof.name == "google_id_token" else self.firebase
            if provider is not None:
                return await provider.verify(proof.token)
        raise MeshError(grpc.StatusCode.UNIMPLEMENTED, Reason.ERROR_REASON_NOT_OFFERED, f"sign-in by {proof.name} is not offered here")
