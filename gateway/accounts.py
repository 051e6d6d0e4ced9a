"""What people do with accounts: register, sign in, refresh, sign out, look, list. Each is one or two short transactions.

The rules are in `identity`, the SQL in `store`; no connection is held while a password is hashed.
"""

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import grpc
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine
from uuid_utils.compat import uuid7

from gateway import identity, store
from gateway.identity import Account, RefreshDecision
from gateway.passwords import Passwords
from gateway.tokens import SigningKeys
from servicekit import paging
from servicekit.database import transaction
from servicekit.errors import MeshError, Reason, not_found, unauthenticated
from servicekit.identity import ROLE_ADMIN

PAGES_OF = b"users"
"""What page tokens of the list of accounts belong to."""
PAGES_OF_MEMBERS = b"members"
"""The same of the list of members."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TokenPolicy:
    """Who issues access tokens for whom, and how long tokens and sessions live."""

    issuer: str
    audience: str
    access_token_ttl: timedelta
    refresh_token_ttl: timedelta
    session_ttl: timedelta


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a client gets for a session."""

    account: Account
    access_token: str
    expire_time: datetime
    refresh_token: str


@dataclass(frozen=True, slots=True)
class Page:
    """Some accounts, in the order of their list; `next_page_token` is empty on the last page."""

    accounts: list[Account]
    next_page_token: str


class Accounts:
    """Accounts and sessions over one database."""

    def __init__(self, engine: AsyncEngine, passwords: Passwords, keys: SigningKeys, policy: TokenPolicy) -> None:
        self._engine = engine
        self._passwords = passwords
        self._keys = keys
        self._policy = policy

    async def register(self, *, email: str, password: str, display_name: str) -> Account:
        """Make an account on the free plan. Raises ALREADY_EXISTS (EMAIL_TAKEN)."""
        account = await self._insert(identity.canonical_email(email), password, display_name, roles=())
        if account is None:
            raise MeshError(
                grpc.StatusCode.ALREADY_EXISTS, Reason.ERROR_REASON_EMAIL_TAKEN, "an account with this e-mail address exists; sign in"
            )
        _log.info("account.registered", user_id=str(account.user_id))
        return account

    async def ensure_admin(self, *, email: str, password: str) -> None:
        """Make the first administrator unless an account has the address. Replicas may do this at the same time.

        An account that is there keeps its password and roles: somebody else may have registered it.
        """
        email = identity.canonical_email(email)
        async with transaction(self._engine) as connection:
            existing = await store.get_user_by_email(connection, email)
        if existing is None:
            made = await self._insert(email, password, "", roles=(ROLE_ADMIN,))
            if made is not None:
                _log.info("admin.made", user_id=str(made.user_id))
        elif ROLE_ADMIN not in existing.roles:
            _log.warning("admin.address_taken", user_id=str(existing.user_id))

    async def _insert(self, email: str, password: str, display_name: str, *, roles: tuple[str, ...]) -> Account | None:
        password_hash = await self._passwords.hash(password)
        async with transaction(self._engine) as connection:
            return await store.insert_user(
                connection,
                user_id=uuid7(),
                email=email,
                display_name=identity.display_name_or_default(display_name, email),
                roles=roles,
                plan=identity.PLAN_FREE,
                password_hash=password_hash,
            )

    async def sign_in(self, *, email: str, password: str) -> Tokens:
        """Start a session. Raises UNAUTHENTICATED (BAD_CREDENTIALS), PERMISSION_DENIED (ACCOUNT_DISABLED)."""
        email = identity.canonical_email(email, "password.email")
        async with transaction(self._engine) as connection:
            found = await store.get_password(connection, email)
        account, stored = found or (None, None)
        verdict = await self._passwords.verify(stored, password)
        if account is None or stored is None or not verdict.correct:
            raise unauthenticated(Reason.ERROR_REASON_BAD_CREDENTIALS, "e-mail address or password is wrong")
        # Only now: whether an account is disabled is its owner's to know.
        identity.require_enabled(account)
        renewed = await self._passwords.hash(password) if verdict.outdated else None
        session_id = uuid7()
        refresh_token = identity.new_refresh_token()
        async with transaction(self._engine) as connection:
            if renewed is not None:
                await store.replace_password_hash(connection, account.user_id, old=stored, new=renewed)
            await store.insert_session(connection, session_id=session_id, user_id=account.user_id, ttl=self._policy.session_ttl)
            await store.insert_refresh_token(
                connection,
                token_hash=identity.refresh_token_hash(refresh_token),
                session_id=session_id,
                ttl=self._policy.refresh_token_ttl,
            )
        return self._tokens(account, refresh_token)

    async def refresh(self, refresh_token: str) -> Tokens:
        """Change a refresh token for new tokens. Raises UNAUTHENTICATED (REFRESH_TOKEN_INVALID).

        The refusal is raised after the commit: that the session ended has to stay.
        """
        token_hash = identity.refresh_token_hash(refresh_token)
        next_token = identity.new_refresh_token()
        async with transaction(self._engine) as connection:
            locked = await store.lock_refresh_token(connection, token_hash)
            decision = identity.decide_refresh(locked.state if locked else None)
            if locked is not None and decision is RefreshDecision.ROTATE:
                await store.mark_refresh_token_used(connection, token_hash)
                await store.insert_refresh_token(
                    connection,
                    token_hash=identity.refresh_token_hash(next_token),
                    session_id=locked.state.session_id,
                    ttl=self._policy.refresh_token_ttl,
                )
            elif locked is not None and decision is not RefreshDecision.REFUSE:
                await store.end_session(connection, locked.state.session_id, decision.value)
        if locked is None or decision is not RefreshDecision.ROTATE:
            _log.warning(
                "session.refresh_refused",
                decision=decision.value,
                session_id=str(locked.state.session_id) if locked else None,
                user_id=str(locked.account.user_id) if locked else None,
            )
            raise identity.refresh_token_invalid()
        return self._tokens(locked.account, next_token)

    async def sign_out(self, user_id: uuid.UUID, refresh_token: str) -> None:
        """End the session of a refresh token, used or not. An unknown one, or another user's, changes nothing."""
        token_hash = identity.refresh_token_hash(refresh_token)
        async with transaction(self._engine) as connection:
            session_id = await store.find_session(connection, token_hash=token_hash, user_id=user_id)
            if session_id is not None:
                await store.end_session(connection, session_id, identity.END_SIGNED_OUT)

    async def get(self, user_id: uuid.UUID) -> Account:
        """An account. Raises NOT_FOUND, PERMISSION_DENIED (ACCOUNT_DISABLED)."""
        async with transaction(self._engine) as connection:
            account = await store.get_user(connection, user_id)
        if account is None:
            raise not_found("account")
        identity.require_enabled(account)
        return account

    async def list_page(self, *, page_size: int, page_token: str, email: str) -> Page:
        """A page of all accounts, newest first; with `email`, of the one account with that address."""
        limit = paging.page_limit(page_size)
        before = paging.decode_token(page_token, PAGES_OF)
        async with transaction(self._engine) as connection:
            if email:
                account = await store.get_user_by_email(connection, identity.canonical_email(email))
                return Page([account] if account else [], "")
            accounts = await store.list_users(connection, before=uuid.UUID(bytes=before) if before else None, limit=limit + 1)
        return _page(accounts, limit, PAGES_OF)

    async def member_page(self, *, page_size: int, page_token: str) -> Page:
        """A page of the accounts that are not disabled, oldest first."""
        limit = paging.page_limit(page_size)
        after = paging.decode_token(page_token, PAGES_OF_MEMBERS)
        async with transaction(self._engine) as connection:
            accounts = await store.list_enabled_users(connection, after=uuid.UUID(bytes=after) if after else None, limit=limit + 1)
        return _page(accounts, limit, PAGES_OF_MEMBERS)

    async def update(self, user_id: uuid.UUID, *, actor_id: str, plan: str | None) -> Account:
        """Change what is not None; a plan that the account has already goes on from where it started. Raises NOT_FOUND."""
        async with transaction(self._engine) as connection:
            account = await store.lock_user(connection, user_id)
            if account is None:
                raise not_found("account")
            if plan is None or plan == account.plan:
                return account
            changed = await store.start_plan(connection, user_id, plan)
        _log.info("account.plan_changed", user_id=str(user_id), actor_id=actor_id, before=account.plan, plan=changed.plan)
        return changed

    def _tokens(self, account: Account, refresh_token: str) -> Tokens:
        now = datetime.now(UTC).replace(microsecond=0)  # a JWT counts in seconds
        policy = self._policy
        claims = identity.access_claims(account, issuer=policy.issuer, audience=policy.audience, issued_at=now, ttl=policy.access_token_ttl)
        return Tokens(account, self._keys.sign(claims), now + policy.access_token_ttl, refresh_token)


def _page(accounts: list[Account], limit: int, pages_of: bytes) -> Page:
    """The page of a list of which up to `limit` + 1 accounts were read."""
    more = len(accounts) > limit
    accounts = accounts[:limit]
    return Page(accounts, paging.encode_token(accounts[-1].user_id.bytes, pages_of) if more else "")
