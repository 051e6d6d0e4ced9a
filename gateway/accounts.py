"""What people do with accounts: register, sign in, link, unlink, refresh, sign out, look, list. Each is one or two short transactions.

The rules are in `identity`, the SQL in `store`; no connection is held while a password is hashed or an identity provider asked.
"""

import uuid
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta

import grpc
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from uuid_utils.compat import uuid7

from gateway import identity, store
from gateway.breached import BreachedPasswords
from gateway.identity import Account, ExternalIdentity, LinkedIdentity, RefreshDecision
from gateway.oidc import Code, Proof, Providers
from gateway.passwords import Passwords
from gateway.revocations import revoke
from gateway.throttle import Throttle, client_network
from gateway.tokens import SigningKeys
from servicekit import audit, paging
from servicekit.database import reading, transaction
from servicekit.errors import MeshError, Reason, invalid, not_found, permission_denied, precondition, unauthenticated
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
    recent_sign_in: timedelta
    """How an account is signed in to is changed only so soon after the session that does it began."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a client gets for a session; for an API key `refresh_token` is empty."""

    account: Account
    access_token: str
    expire_time: datetime
    refresh_token: str


@dataclass(frozen=True, slots=True)
class Page:
    """Some accounts, in the order of their list; `next_page_token` is empty on the last page."""

    accounts: list[Account]
    next_page_token: str


@dataclass(frozen=True, slots=True)
class Gatekeeping:
    """What stands between a claim to be somebody and a session."""

    passwords: Passwords
    breached: BreachedPasswords
    providers: Providers
    throttle: Throttle


@dataclass(frozen=True, slots=True)
class _Session:
    """A session as a transaction left it; `issued_at` is a moment in which `account` was true."""

    session_id: uuid.UUID
    account: Account
    issued_at: datetime
    refresh_token: str


class Accounts:
    """Accounts and sessions over one database."""

    def __init__(self, engine: AsyncEngine, gatekeeping: Gatekeeping, keys: SigningKeys, policy: TokenPolicy) -> None:
        self._engine = engine
        self._passwords = gatekeeping.passwords
        self._breached = gatekeeping.breached
        self._providers = gatekeeping.providers
        self._throttle = gatekeeping.throttle
        self._keys = keys
        self._policy = policy

    async def register(self, *, email: str, password: str, display_name: str, client_address: str) -> Account:
        """Make an account on the free plan.

        Raises ALREADY_EXISTS (EMAIL_TAKEN), INVALID_ARGUMENT (PASSWORD_BREACHED), RESOURCE_EXHAUSTED (LIMIT_REACHED).
        """
        email = identity.canonical_email(email)
        client = client_network(client_address)
        await self._throttle.registration(client)
        if await self._breached.known(password):
            raise invalid(
                "password",
                "is known from a breach of another site; choose another",
                reason=Reason.ERROR_REASON_PASSWORD_BREACHED,
            )
        account = await self._insert(email, password, display_name, roles=(), client=client)
        if account is None:
            raise _email_taken("an account with this e-mail address exists; sign in")
        _log.info("account.registered", user_id=str(account.user_id))
        return account

    async def ensure_admin(self, *, email: str, password: str) -> None:
        """Make the first administrator unless an account has the address. Replicas may do this at the same time.

        An account that is there keeps its password and roles: somebody else may have registered it.
        """
        email = identity.canonical_email(email)
        async with reading(self._engine) as connection:
            existing = await store.get_user_by_email(connection, email)
        if existing is None:
            made = await self._insert(email, password, "", roles=(ROLE_ADMIN,))
            if made is not None:
                _log.info("admin.made", user_id=str(made.user_id))
        elif ROLE_ADMIN not in existing.roles:
            _log.warning("admin.address_taken", user_id=str(existing.user_id))

    async def _insert(
        self, email: str, password: str, display_name: str, *, roles: tuple[str, ...], client: str | None = None
    ) -> Account | None:
        password_hash = await self._passwords.hash(password, client=client)
        async with transaction(self._engine) as connection:
            account = await store.insert_user(
                connection,
                user_id=uuid7(),
                email=email,
                display_name=identity.display_name_or_default(display_name, email),
                roles=roles,
                plan=identity.PLAN_FREE,
                password_hash=password_hash,
            )
            if account is not None:
                audit.about(subject=str(account.user_id))
                audit.done()
            return account

    async def sign_in(self, *, email: str, password: str, client_address: str) -> Tokens:
        """Start a session. Raises UNAUTHENTICATED (BAD_CREDENTIALS), PERMISSION_DENIED (ACCOUNT_DISABLED), RESOURCE_EXHAUSTED."""
        email = identity.canonical_email(email, "password.email")
        client = client_network(client_address)
        audit.about(credential="password")
        async with reading(self._engine) as connection:
            found = await store.get_password(connection, email, client_network=client)
        if found is not None:
            audit.about(subject=str(found.account.user_id))
        known = found is not None and found.known_client
        async with self._throttle.client("sign_in_client", client, known=known):
            async with self._throttle.password(email, client, known=known):
                verdict = await self._passwords.verify(found.hash if found else None, password, client=client)
                if found is None or not verdict.correct:
                    raise unauthenticated(Reason.ERROR_REASON_BAD_CREDENTIALS, "e-mail address or password is wrong")
            await self._throttle.success(str(found.account.user_id), client)
            renewed = await self._passwords.hash(password, client=client) if verdict.outdated else None
            async with transaction(self._engine) as connection:
                if renewed is not None:
                    await store.replace_password_hash(connection, found.account.user_id, old=found.hash, new=renewed)
                session = await self._start_session(connection, found.account.user_id, client)
        return self._tokens(session)

    async def sign_in_elsewhere(self, proof: Proof, *, client_address: str) -> Tokens:
        """Start a session for somebody whom another identity provider knows; who comes for the first time gets an account.

        Raises UNAUTHENTICATED (ID_TOKEN_INVALID), PERMISSION_DENIED (ACCOUNT_DISABLED), ALREADY_EXISTS (EMAIL_TAKEN),
        UNIMPLEMENTED (NOT_OFFERED), RESOURCE_EXHAUSTED (LIMIT_REACHED), UNAVAILABLE.
        """
        client = client_network(client_address)
        audit.about(credential=proof.name)
        async with self._guarded(proof, client):
            proven = await self._providers.prove(proof)
            await self._throttle.success(f"{proven.issuer} {proven.subject}", client)
            async with transaction(self._engine) as connection:
                account = await store.get_user_by_identity(connection, proven.issuer, proven.subject)
                if account is not None:
                    # Who unlinks has the account locked: this waits for them, and what is read then holds until the session is there.
                    await store.share_user(connection, account.user_id)
                    account = await store.get_user_by_identity(connection, proven.issuer, proven.subject)
                if account is None:
                    account = await self._adopt(connection, proven)
                session = await self._start_session(connection, account.user_id, client)
        return self._tokens(session)

    async def link(self, user_id: uuid.UUID, session_id: uuid.UUID | None, proof: Proof, *, client_address: str) -> None:
        """Let an account be signed in to through another identity provider from now on. The same link again is no error.

        Raises UNAUTHENTICATED (ID_TOKEN_INVALID), PERMISSION_DENIED, ALREADY_EXISTS (IDENTITY_TAKEN), UNIMPLEMENTED (NOT_OFFERED),
        RESOURCE_EXHAUSTED (LIMIT_REACHED), UNAVAILABLE.
        """
        audit.about(credential=proof.name)
        async with reading(self._engine) as connection:
            await self._require_recent_sign_in(connection, user_id, session_id)
        async with self._guarded(proof, client_network(client_address)):
            proven = await self._providers.prove(proof)
        audit.about(issuer=proven.issuer, external_subject=proven.subject)
        async with transaction(self._engine) as connection:
            account = identity.require_enabled(await store.share_user(connection, user_id))
            # Again: the provider may have taken its time, and the session may have been ended meanwhile.
            await self._require_recent_sign_in(connection, user_id, session_id)
            await store.lock_identity(connection, proven.issuer, proven.subject)
            owner = await store.get_user_by_identity(connection, proven.issuer, proven.subject)
            if owner is None:
                identity_id = await store.insert_identity(connection, issuer=proven.issuer, subject=proven.subject, user_id=account.user_id)
                if identity_id is None:
                    raise _identity_taken("this account has another identity there: unlink that first")
                audit.about(subject=str(identity_id))
                _log.info("identity.linked", user_id=str(user_id), issuer=proven.issuer)
            elif owner.user_id != user_id:
                raise _identity_taken("this identity belongs to another account")

    async def list_identities(self, user_id: uuid.UUID) -> list[LinkedIdentity]:
        """The identities that an account can be signed in to with, oldest first."""
        async with reading(self._engine) as connection:
            return await store.list_identities(connection, user_id)

    async def unlink(self, user_id: uuid.UUID, session_id: uuid.UUID | None, identity_id: uuid.UUID) -> None:
        """Let an account be signed in to with an identity no more. Sessions that began with it go on.

        Raises PERMISSION_DENIED, NOT_FOUND, FAILED_PRECONDITION (LAST_IDENTITY).
        """
        async with transaction(self._engine) as connection:
            # Not shared: of two that unlink at once, the second sees what the first left.
            identity.require_enabled(await store.lock_user(connection, user_id))
            await self._require_recent_sign_in(connection, user_id, session_id)
            linked = await store.list_identities(connection, user_id)
            found = next((one for one in linked if one.identity_id == identity_id), None)
            if found is None:
                raise not_found("identity")
            audit.about(issuer=found.issuer, external_subject=found.subject)
            if len(linked) == 1 and not await store.has_password(connection, user_id):
                raise precondition(
                    Reason.ERROR_REASON_LAST_IDENTITY, "there is no other way to sign in to this account: link another identity first"
                )
            await store.delete_identity(connection, identity_id)
        _log.info("identity.unlinked", user_id=str(user_id), issuer=found.issuer)

    async def _require_recent_sign_in(self, connection: AsyncConnection, user_id: uuid.UUID, session_id: uuid.UUID | None) -> None:
        """Raise PERMISSION_DENIED unless the session is a young one of the account, and goes on.

        How an account is signed in to outlives the session that changes it: a stolen access or refresh token is not enough.
        """
        age = await store.session_age(connection, session_id, user_id=user_id) if session_id is not None else None
        if age is None or age > self._policy.recent_sign_in:
            raise permission_denied("to change how this account is signed in to, sign in again and do it soon after")

    async def refresh(self, refresh_token: str, *, client_address: str) -> Tokens:
        """Change a refresh token for new tokens.

        Raises UNAUTHENTICATED (REFRESH_TOKEN_INVALID; TOKEN_MISSING without one), RESOURCE_EXHAUSTED (LIMIT_REACHED).

        There is no grace for a second use, be it two tabs at once or a reply that was lost: to answer it would be to give tokens
        to whoever copied the first. Clients keep others of their own from refreshing at the same time.
        """
        # A page that asks whether somebody is signed in is no guess: nothing is counted, and with this reason nothing is written down.
        if not refresh_token:
            raise unauthenticated(Reason.ERROR_REASON_TOKEN_MISSING, "there is no refresh token; sign in")
        client, token_hash = client_network(client_address), identity.refresh_token_hash(refresh_token)
        async with self._throttle.unguessable("refresh_client", client):
            async with reading(self._engine) as connection:
                owner_id = await store.working_token_owner(connection, token_hash)
            if owner_id is not None:
                await self._throttle.success(str(owner_id), client)
            session = await self._rotate(token_hash)
        if session is None:
            raise identity.refresh_token_invalid()
        return self._tokens(session)

    async def sign_out(self, user_id: uuid.UUID, *, refresh_token: str) -> bool:
        """End the session of a refresh token, used or not; False if it is none of this user's, then nothing is changed."""
        token_hash = identity.refresh_token_hash(refresh_token)
        async with transaction(self._engine) as connection:
            session_id = await store.find_session(connection, token_hash=token_hash, user_id=user_id)
            if session_id is not None:
                await self._end(connection, session_id, user_id, identity.END_SIGNED_OUT)
        return session_id is not None

    async def sign_out_session(self, user_id: uuid.UUID, session_id: uuid.UUID) -> None:
        """End a session, if it is this user's."""
        async with transaction(self._engine) as connection:
            if await store.session_owner(connection, session_id) == user_id:
                await self._end(connection, session_id, user_id, identity.END_SIGNED_OUT)

    async def get(self, user_id: uuid.UUID) -> Account:
        """An account. Raises NOT_FOUND, PERMISSION_DENIED (ACCOUNT_DISABLED)."""
        async with reading(self._engine) as connection:
            return identity.require_enabled(await store.get_user(connection, user_id))

    async def list_page(self, *, page_size: int, page_token: str, email: str) -> Page:
        """A page of all accounts, newest first; with `email`, of the one account with that address."""
        limit = paging.page_limit(page_size)
        before = paging.decode_token(page_token, PAGES_OF, length=paging.ID_BYTES)
        async with reading(self._engine) as connection:
            if email:
                account = await store.get_user_by_email(connection, identity.canonical_email(email))
                return Page([account] if account else [], "")
            accounts = await store.list_users(connection, before=uuid.UUID(bytes=before) if before else None, limit=limit + 1)
        return _page(accounts, limit, PAGES_OF)

    async def member_page(self, *, page_size: int, page_token: str) -> Page:
        """A page of the accounts that are not disabled, oldest first."""
        limit = paging.page_limit(page_size)
        after = paging.decode_token(page_token, PAGES_OF_MEMBERS, length=paging.ID_BYTES)
        async with reading(self._engine) as connection:
            accounts = await store.list_enabled_users(connection, after=uuid.UUID(bytes=after) if after else None, limit=limit + 1)
        return _page(accounts, limit, PAGES_OF_MEMBERS)

    def _guarded(self, proof: Proof, client: str) -> AbstractAsyncContextManager[None]:
        # Each code costs a call to the provider, right or wrong.
        if isinstance(proof, Code):
            return self._throttle.client("sign_in_client", client)
        return self._throttle.unguessable("sign_in_client", client)

    async def _adopt(self, connection: AsyncConnection, proven: ExternalIdentity) -> Account:
        """The new account of an identity. Raises ALREADY_EXISTS (EMAIL_TAKEN).

        An account that has the address is not linked: addresses of password accounts are not verified, so it may have been made
        by somebody who waits for the address's owner to come (pre-hijacking).
        """
        await store.lock_identity(connection, proven.issuer, proven.subject)
        account = await store.get_user_by_identity(connection, proven.issuer, proven.subject)
        if account is not None:
            return account
        account = await store.insert_user(
            connection,
            user_id=uuid7(),
            email=proven.email,
            display_name=identity.external_display_name(proven),
            roles=(),
            plan=identity.PLAN_FREE,
            password_hash=None,
        )
        if account is None:
            raise _email_taken("an account with this e-mail address exists; sign in to it and link this identity")
        await store.insert_identity(connection, issuer=proven.issuer, subject=proven.subject, user_id=account.user_id)
        _log.info("account.registered", user_id=str(account.user_id), issuer=proven.issuer)
        return account

    async def _start_session(self, connection: AsyncConnection, user_id: uuid.UUID, client: str) -> _Session:
        audit.about(subject=str(user_id))
        # Read again, and kept from changing until the session is there: who disables an account ends all the sessions it has.
        # And only now: whether an account is disabled is its owner's to know.
        account = identity.require_enabled(await store.share_user(connection, user_id))
        session_id, refresh_token = uuid7(), identity.new_refresh_token()
        await store.insert_session(connection, session_id=session_id, user_id=user_id, client_network=client, ttl=self._policy.session_ttl)
        await self._insert_refresh_token(connection, session_id, refresh_token)
        audit.by(str(user_id))
        audit.about(session_id=str(session_id))
        audit.done()
        return _Session(session_id, account, await store.account_issue_time(connection, user_id), refresh_token)

    async def _insert_refresh_token(self, connection: AsyncConnection, session_id: uuid.UUID, refresh_token: str) -> None:
        await store.insert_refresh_token(
            connection,
            token_hash=identity.refresh_token_hash(refresh_token),
            session_id=session_id,
            ttl=self._policy.refresh_token_ttl,
        )

    async def _rotate(self, token_hash: bytes) -> _Session | None:
        """The session with its next token; None if this token ended it, which the audit trail has to tell, whatever was counted.

        Raises UNAUTHENTICATED (REFRESH_TOKEN_INVALID).
        """
        async with transaction(self._engine) as connection:
            locked = await store.lock_refresh_token(connection, token_hash)
            decision = identity.decide_refresh(locked.state if locked else None)
            if locked is not None:
                session_id, account = locked.state.session_id, locked.account
                audit.about(subject=str(account.user_id), session_id=str(session_id))
                if decision is RefreshDecision.ROTATE:
                    audit.by(str(account.user_id))
                    audit.done()
                    next_token = identity.new_refresh_token()
                    await store.mark_refresh_token_used(connection, token_hash)
                    await self._insert_refresh_token(connection, session_id, next_token)
                    return _Session(session_id, account, await store.account_issue_time(connection, account.user_id), next_token)
                if decision is not RefreshDecision.REFUSE:
                    await self._end(connection, session_id, account.user_id, decision.value)
        _log.warning(
            "session.refresh_refused",
            decision=decision.value,
            session_id=str(locked.state.session_id) if locked else None,
            user_id=str(locked.account.user_id) if locked else None,
        )
        # Only now, after the commit: that the session ended has to stay.
        if decision is RefreshDecision.REFUSE:
            raise identity.refresh_token_invalid()
        return None

    async def _end(self, connection: AsyncConnection, session_id: uuid.UUID, user_id: uuid.UUID, reason: str) -> None:
        """End a session and what access tokens it has."""
        audit.about(subject=str(user_id), session_id=str(session_id), ended=reason)
        audit.done()
        if await store.end_session(connection, session_id, reason):
            await revoke(connection, "session", session_id)

    def _tokens(self, session: _Session) -> Tokens:
        policy = self._policy
        claims = identity.access_claims(
            session.account,
            session_id=session.session_id,
            issuer=policy.issuer,
            audience=policy.audience,
            issued_at=session.issued_at,
            ttl=policy.access_token_ttl,
        )
        return Tokens(session.account, self._keys.sign(claims), session.issued_at + policy.access_token_ttl, session.refresh_token)


def _email_taken(message: str) -> MeshError:
    return MeshError(grpc.StatusCode.ALREADY_EXISTS, Reason.ERROR_REASON_EMAIL_TAKEN, message)


def _identity_taken(message: str) -> MeshError:
    return MeshError(grpc.StatusCode.ALREADY_EXISTS, Reason.ERROR_REASON_IDENTITY_TAKEN, message)


def _page(accounts: list[Account], limit: int, pages_of: bytes) -> Page:
    """The page of a list of which up to `limit` + 1 accounts were read."""
    more = len(accounts) > limit
    accounts = accounts[:limit]
    return Page(accounts, paging.encode_token(accounts[-1].user_id.bytes, pages_of) if more else "")
