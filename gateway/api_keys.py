"""API keys: made, listed, revoked by their owners; proven by programs, who get an access token for them.

A key is `gmk_<12 characters>_<43 characters>`. The first part is public and what a key is looked up by; the second has 256 random bits.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import string
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import grpc
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine
from uuid_utils.compat import uuid7

from gateway import identity, store
from gateway.accounts import TokenPolicy, Tokens
from gateway.revocations import revoke
from gateway.store import ApiKey, PresentedApiKey
from gateway.throttle import Throttle, client_network
from gateway.tokens import SigningKeys
from genmesh.credits.v1 import credits_pb2, credits_pb2_grpc
from servicekit import audit, paging
from servicekit.client import call_metadata
from servicekit.database import reading, transaction, translate
from servicekit.errors import MeshError, Reason, from_rpc_error, not_found, unauthenticated
from servicekit.interceptors import CLIENT_ADDRESS

WORKING_KEYS_MAX = 100
"""Keys of an account that are neither revoked nor expired."""
USED_KEYS_MAX = 10_000
"""Keys whose use waits to be noted; the use of more is not noted."""
NOTE_USES_INTERVAL_S = 15.0
PAGES_OF = b"api_keys"
SCOPE_ADMIN = "admin"

_ALPHABET = string.digits + string.ascii_letters
_FORM = re.compile(r"(gmk_[0-9A-Za-z]{12})_[0-9A-Za-z]{43}")
_NO_HASH = bytes(32)

_log = structlog.get_logger(__name__)


def new_secret() -> tuple[str, str]:
    """A whole key and its public prefix."""
    prefix = "gmk_" + "".join(secrets.choice(_ALPHABET) for _ in range(12))
    return f"{prefix}_{''.join(secrets.choice(_ALPHABET) for _ in range(43))}", prefix


def secret_hash(secret: str) -> bytes:
    """What is stored of a key. It has full entropy: a fast hash is enough."""
    return hashlib.sha256(secret.encode()).digest()


def api_key_invalid() -> MeshError:
    """UNAUTHENTICATED (API_KEY_INVALID), the same whatever is wrong."""
    return unauthenticated(Reason.ERROR_REASON_API_KEY_INVALID, "the API key is not valid")


class Ceilings:
    """Bounds on what keys may spend, in credit_service's keeping."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float) -> None:
        self._stub = credits_pb2_grpc.CreditsServiceStub(channel)
        self._timeout_s = timeout_s

    async def set(self, api_key_id: uuid.UUID, *, daily: int | None, monthly: int | None, authorization: str, client_address: str) -> None:
        """Bound a key in the name of the caller, whose `authorization` and address are sent along; amounts in millicredits.

        Raises what credit_service refuses with, UNAVAILABLE.
        """
        request = credits_pb2.SetKeyCeilingRequest(api_key_id=str(api_key_id), daily_millicredits=daily, monthly_millicredits=monthly)
        metadata = [*call_metadata(), ("authorization", authorization), (CLIENT_ADDRESS, client_address)]
        try:
            await self._stub.SetKeyCeiling(request, metadata=metadata, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error


@dataclass(frozen=True, slots=True)
class NewApiKey:
    """What its owner wants of a key."""

    display_name: str
    scopes: Sequence[str]
    expire_time: datetime | None = None
    daily_ceiling_millicredits: int | None = None
    monthly_ceiling_millicredits: int | None = None


class ApiKeys:
    """API keys over one database."""

    def __init__(
        self,
        engine: AsyncEngine,
        keys: SigningKeys,
        policy: TokenPolicy,
        throttle: Throttle,
        ceilings: Ceilings,
    ) -> None:
        self._engine = engine
        self._keys = keys
        self._policy = policy
        self._throttle = throttle
        self._ceilings = ceilings
        self._used: set[uuid.UUID] = set()

    # --- for owners

    async def create(self, user_id: uuid.UUID, wanted: NewApiKey, *, authorization: str, client_address: str) -> tuple[ApiKey, str]:
        """Make a key; the key and its secret, which is nowhere else.

        Its ceilings are set first, with the caller's own `authorization`: there is no moment in which it may spend without.

        Raises RESOURCE_EXHAUSTED (LIMIT_REACHED), PERMISSION_DENIED (ACCOUNT_DISABLED), NOT_FOUND (no such account), UNAVAILABLE.
        """
        api_key_id = uuid7()
        secret, prefix = new_secret()
        audit.about(subject=str(api_key_id), prefix=prefix, scopes=",".join(wanted.scopes))
        async with reading(self._engine) as connection:
            _require_room(await store.count_working_api_keys(connection, user_id))
        if wanted.daily_ceiling_millicredits is not None or wanted.monthly_ceiling_millicredits is not None:
            await self._ceilings.set(
                api_key_id,
                daily=wanted.daily_ceiling_millicredits,
                monthly=wanted.monthly_ceiling_millicredits,
                authorization=authorization,
                client_address=client_address,
            )
        async with transaction(self._engine) as connection:
            identity.require_enabled(await store.lock_user(connection, user_id))
            # Again, under the lock: of several at once only so many find room.
            _require_room(await store.count_working_api_keys(connection, user_id))
            key = await store.insert_api_key(
                connection,
                api_key_id=api_key_id,
                user_id=user_id,
                display_name=wanted.display_name,
                prefix=prefix,
                key_hash=secret_hash(secret),
                scopes=wanted.scopes,
                expire_time=wanted.expire_time,
            )
        _log.info("api_key.made", user_id=str(user_id), api_key_id=str(api_key_id), scopes=wanted.scopes)
        return key, secret

    async def list_page(self, user_id: uuid.UUID, *, page_size: int, page_token: str) -> tuple[list[ApiKey], str]:
        """A page of a user's keys, newest first, and the token of the next page."""
        limit = paging.page_limit(page_size)
        query = PAGES_OF + user_id.bytes
        before = paging.decode_token(page_token, query, length=paging.ID_BYTES)
        async with reading(self._engine) as connection:
            keys = await store.list_api_keys(connection, user_id, before=uuid.UUID(bytes=before) if before else None, limit=limit + 1)
        more = len(keys) > limit
        keys = keys[:limit]
        return keys, paging.encode_token(keys[-1].api_key_id.bytes, query) if more else ""

    async def revoke(self, user_id: uuid.UUID, api_key_id: uuid.UUID) -> ApiKey:
        """End a key of this user for good; again changes nothing. Raises NOT_FOUND."""
        async with transaction(self._engine) as connection:
            key = await store.revoke_api_key(connection, api_key_id, user_id=user_id)
            if key is not None:
                await revoke(connection, "api_key", api_key_id)
            else:
                key = await store.get_api_key(connection, api_key_id, user_id=user_id)
        if key is None:
            raise not_found("API key")
        _log.info("api_key.revoked", user_id=str(user_id), api_key_id=str(api_key_id))
        return key

    # --- for programs

    async def sign_in(self, secret: str, *, client_address: str) -> Tokens:
        """As `check`, so many times an hour."""
        audit.about(credential="api_key")
        tokens = await self.check(secret, client_address=client_address)
        await self._throttle.success(str(tokens.account.user_id), client_network(client_address))
        return tokens

    async def check(self, secret: str, *, client_address: str) -> Tokens:
        """An access token for a key; its refresh token is empty.

        Raises UNAUTHENTICATED (API_KEY_INVALID); RESOURCE_EXHAUSTED (LIMIT_REACHED) for wrong keys of an address that sent too many.
        """
        async with self._throttle.unguessable("api_keys", client_network(client_address)):
            return await self.prove(secret)

    async def prove(self, secret: str) -> Tokens:
        """As `check`, but wrong ones are not counted."""
        form = _FORM.fullmatch(secret)
        if form is None:
            raise api_key_invalid()
        async with transaction(self._engine) as connection:
            found = await store.find_api_key(connection, form[1])
            # Compared whatever was found: how long it takes tells nothing.
            right = hmac.compare_digest(found.key_hash if found else _NO_HASH, secret_hash(secret))
            if found is not None and right:
                # Read again, and kept from changing until the token's times are known: who disables an account ends the tokens it has.
                await store.share_user(connection, found.account.user_id)
                found = await store.find_api_key(connection, form[1])
        if found is None or not right or not found.works or found.account.disabled:
            raise api_key_invalid()
        self._note_use(found)
        audit.by(str(found.account.user_id))
        audit.about(subject=str(found.key.api_key_id))
        return self._tokens(found)

    def _tokens(self, found: PresentedApiKey) -> Tokens:
        policy, key, account = self._policy, found.key, found.account
        expire_time = found.now + policy.access_token_ttl
        if key.expire_time is not None:
            expire_time = min(expire_time, key.expire_time)
        # What was read is newer than any revocation of the account that was read with it.
        issue_time = found.now
        if found.account_revoke_time is not None:
            issue_time = max(issue_time, found.account_revoke_time + store.ISSUED_AFTER)
        claims = {
            "iss": policy.issuer,
            "aud": policy.audience,
            "sub": str(account.user_id),
            "iat": int(issue_time.timestamp()),
            "exp": int(expire_time.timestamp()),
            "jti": str(uuid.uuid4()),
            "roles": list(account.roles) if SCOPE_ADMIN in key.scopes else [],
            "plan": account.plan,
            "api_key_id": str(key.api_key_id),
            "scopes": list(key.scopes),
        }
        return Tokens(account, self._keys.sign(claims), expire_time.replace(microsecond=0), refresh_token="")

    def _note_use(self, found: PresentedApiKey) -> None:
        last = found.key.last_use_time
        if len(self._used) < USED_KEYS_MAX and (last is None or last < found.now.replace(second=0, microsecond=0)):
            self._used.add(found.key.api_key_id)

    async def note_uses(self) -> None:
        """Write down which keys were used since the last time."""
        used, self._used = self._used, set()
        if used:
            async with transaction(self._engine) as connection:
                await store.mark_api_keys_used(connection, sorted(used))

    async def keep_noting_uses(self) -> None:
        """Note uses every few seconds, for ever: off the way of the calls that use keys."""
        while True:
            await asyncio.sleep(NOTE_USES_INTERVAL_S)
            try:
                await self.note_uses()
            except Exception as error:
                if translate(error) is None:
                    raise
                # The database is away; a use that is not noted is no loss.
                _log.warning("api_keys.uses_not_noted", error=repr(error))


def _require_room(working: int) -> None:
    if working >= WORKING_KEYS_MAX:
        description = f"an account has at most {WORKING_KEYS_MAX} working API keys: revoke one"
        raise MeshError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            Reason.ERROR_REASON_LIMIT_REACHED,
            description,
            metadata={"limit": "working_api_keys"},
            quota=[("working_api_keys", description)],
        )
