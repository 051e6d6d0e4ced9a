"""All SQL of the gateway. Functions take the caller's connection, so that they compose into transactions.

Time is the database's: replicas need not agree on a clock.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.identity import Account, LinkedIdentity, RefreshState
from gateway.tables import api_keys, audit_entries, audit_outcomes, identities, passwords, refresh_tokens, revocations, sessions, users


def _account(row: sa.Row[Any]) -> Account:
    return Account(
        user_id=row.user_id,
        email=row.email,
        display_name=row.display_name,
        roles=tuple(row.roles),
        plan=row.plan,
        plan_start_time=row.plan_start_time,
        disabled=row.disabled_time is not None,
        create_time=row.create_time,
    )


async def insert_user(
    connection: AsyncConnection,
    *,
    user_id: uuid.UUID,
    email: str,
    display_name: str,
    roles: Sequence[str],
    plan: str,
    password_hash: str | None,
) -> Account | None:
    """Make an account, with a password or without; None if the address is taken."""
    inserted = await connection.execute(
        insert(users)
        .values(user_id=user_id, email=email, display_name=display_name, roles=list(roles), plan=plan)
        .on_conflict_do_nothing(index_elements=[users.c.email])
        .returning(users)
    )
    row = inserted.one_or_none()
    if row is None:
        return None
    if password_hash is not None:
        await connection.execute(passwords.insert().values(user_id=user_id, hash=password_hash))
    return _account(row)


async def get_user(connection: AsyncConnection, user_id: uuid.UUID) -> Account | None:
    """The account with this id."""
    row = (await connection.execute(users.select().where(users.c.user_id == user_id))).one_or_none()
    return _account(row) if row else None


async def get_user_by_email(connection: AsyncConnection, email: str) -> Account | None:
    """The account with this address (canonical form)."""
    row = (await connection.execute(users.select().where(users.c.email == email))).one_or_none()
    return _account(row) if row else None


async def lock_user(connection: AsyncConnection, user_id: uuid.UUID) -> Account | None:
    """The account with this id, which nobody else changes until the transaction ends."""
    # key_share: sessions of the account, which refer to its id, can be made meanwhile.
    row = (await connection.execute(users.select().where(users.c.user_id == user_id).with_for_update(key_share=True))).one_or_none()
    return _account(row) if row else None


async def start_plan(connection: AsyncConnection, user_id: uuid.UUID, plan: str) -> Account:
    """Give an account that there is another plan, from now on."""
    changed = users.update().where(users.c.user_id == user_id).values(plan=plan, plan_start_time=sa.func.clock_timestamp()).returning(users)
    return _account((await connection.execute(changed)).one())


async def share_user(connection: AsyncConnection, user_id: uuid.UUID) -> Account | None:
    """The account with this id, which nobody changes until the transaction ends; others may share it."""
    row = (await connection.execute(users.select().where(users.c.user_id == user_id).with_for_update(read=True))).one_or_none()
    return _account(row) if row else None


@dataclass(frozen=True, slots=True)
class StoredPassword:
    """An account's password hash; `known_client`: a session of the account began at the client that asks."""

    account: Account
    hash: str
    known_client: bool


async def get_password(connection: AsyncConnection, email: str, *, client_network: str) -> StoredPassword | None:
    """The password of the account with this address (canonical form)."""
    known = sa.exists().where(
        sessions.c.user_id == users.c.user_id, sessions.c.client_network == client_network, sessions.c.client_network != ""
    )
    query = (
        sa.select(users, passwords.c.hash, known.label("known_client"))
        .join(passwords, passwords.c.user_id == users.c.user_id)
        .where(users.c.email == email)
    )
    row = (await connection.execute(query)).one_or_none()
    return StoredPassword(_account(row), row.hash, row.known_client) if row else None


async def replace_password_hash(connection: AsyncConnection, user_id: uuid.UUID, *, old: str, new: str) -> None:
    """Store the same password hashed anew, unless the password was changed meanwhile."""
    await connection.execute(passwords.update().where(passwords.c.user_id == user_id, passwords.c.hash == old).values(hash=new))


async def list_users(connection: AsyncConnection, *, before: uuid.UUID | None, limit: int) -> list[Account]:
    """Accounts from newest to oldest, those made before the account `before`."""
    query = users.select().order_by(users.c.user_id.desc()).limit(limit)
    if before is not None:
        query = query.where(users.c.user_id < before)
    return [_account(row) for row in await connection.execute(query)]


async def list_enabled_users(connection: AsyncConnection, *, after: uuid.UUID | None, limit: int) -> list[Account]:
    """Accounts that are not disabled, from oldest to newest, those made after the account `after`."""
    query = users.select().where(users.c.disabled_time.is_(None)).order_by(users.c.user_id).limit(limit)
    if after is not None:
        query = query.where(users.c.user_id > after)
    return [_account(row) for row in await connection.execute(query)]


async def lock_identity(connection: AsyncConnection, issuer: str, subject: str) -> None:
    """Keep others from giving an identity of another provider, which may not be there yet, to an account until the transaction ends."""
    key = sa.func.hashtextextended(f"{issuer} {subject}", 0)
    await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))


async def get_user_by_identity(connection: AsyncConnection, issuer: str, subject: str) -> Account | None:
    """The account that an identity of another provider belongs to."""
    query = (
        sa.select(users)
        .join(identities, identities.c.user_id == users.c.user_id)
        .where(identities.c.issuer == issuer, identities.c.subject == subject)
    )
    row = (await connection.execute(query)).one_or_none()
    return _account(row) if row else None


async def insert_identity(connection: AsyncConnection, *, issuer: str, subject: str, user_id: uuid.UUID) -> uuid.UUID | None:
    """Give an identity to an account; the id of the link, None if it is another's, or the account has one of that issuer."""
    made = insert(identities).values(issuer=issuer, subject=subject, user_id=user_id).on_conflict_do_nothing()
    return (await connection.execute(made.returning(identities.c.identity_id))).scalar_one_or_none()


async def list_identities(connection: AsyncConnection, user_id: uuid.UUID) -> list[LinkedIdentity]:
    """The identities of an account, one an issuer at most, oldest first."""
    query = identities.select().where(identities.c.user_id == user_id).order_by(identities.c.create_time, identities.c.identity_id)
    return [
        LinkedIdentity(identity_id=row.identity_id, issuer=row.issuer, subject=row.subject, create_time=row.create_time)
        for row in await connection.execute(query)
    ]


async def delete_identity(connection: AsyncConnection, identity_id: uuid.UUID) -> None:
    """Take an identity from its account."""
    await connection.execute(identities.delete().where(identities.c.identity_id == identity_id))


async def has_password(connection: AsyncConnection, user_id: uuid.UUID) -> bool:
    """Whether an account can be signed in to with a password."""
    return bool((await connection.execute(sa.select(sa.exists().where(passwords.c.user_id == user_id)))).scalar_one())


async def insert_session(
    connection: AsyncConnection, *, session_id: uuid.UUID, user_id: uuid.UUID, client_network: str, ttl: timedelta
) -> None:
    """Start a session of `ttl`."""
    await connection.execute(
        sessions.insert().values(session_id=session_id, user_id=user_id, client_network=client_network, expire_time=sa.func.now() + ttl)
    )


async def insert_refresh_token(connection: AsyncConnection, *, token_hash: bytes, session_id: uuid.UUID, ttl: timedelta) -> None:
    """Add a token to a session. It lives `ttl`, never longer than its session."""
    session_end = sa.select(sessions.c.expire_time).where(sessions.c.session_id == session_id).scalar_subquery()
    await connection.execute(
        refresh_tokens.insert().values(
            token_hash=token_hash, session_id=session_id, expire_time=sa.func.least(sa.func.now() + ttl, session_end)
        )
    )


@dataclass(frozen=True, slots=True)
class LockedToken:
    """A refresh token, locked until the transaction ends, and the account behind it."""

    state: RefreshState
    account: Account


async def lock_refresh_token(connection: AsyncConnection, token_hash: bytes) -> LockedToken | None:
    """Read a token and its session, and keep others from using either until the transaction ends; nor does the account change.

    Accounts are locked before sessions, here and where an account is changed.
    """
    owner = (
        sa.select(sessions.c.user_id)
        .join(refresh_tokens, refresh_tokens.c.session_id == sessions.c.session_id)
        .where(refresh_tokens.c.token_hash == token_hash)
        .scalar_subquery()
    )
    # A statement of its own: the next one sees what was committed while this one waited.
    await connection.execute(sa.select(users.c.user_id).where(users.c.user_id == owner).with_for_update(read=True))
    query = (
        sa.select(
            users,
            sessions.c.session_id,
            refresh_tokens.c.use_time.is_not(None).label("token_used"),
            (refresh_tokens.c.expire_time <= sa.func.now()).label("token_expired"),
            sa.or_(sessions.c.end_time.is_not(None), sessions.c.expire_time <= sa.func.now()).label("session_over"),
        )
        .join(sessions, sessions.c.session_id == refresh_tokens.c.session_id)
        .join(users, users.c.user_id == sessions.c.user_id)
        .where(refresh_tokens.c.token_hash == token_hash)
        # Both rows: after a wait PostgreSQL re-reads only what it locks, and each of two parallel calls has to see what
        # the other did to the token or to the session.
        .with_for_update(of=[refresh_tokens, sessions])
    )
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        return None
    account = _account(row)
    return LockedToken(
        RefreshState(
            session_id=row.session_id,
            token_used=row.token_used,
            token_expired=row.token_expired,
            session_over=row.session_over,
            account_disabled=account.disabled,
        ),
        account,
    )


async def mark_refresh_token_used(connection: AsyncConnection, token_hash: bytes) -> None:
    """Use up a token that `lock_refresh_token` holds."""
    await connection.execute(refresh_tokens.update().where(refresh_tokens.c.token_hash == token_hash).values(use_time=sa.func.now()))


async def end_session(connection: AsyncConnection, session_id: uuid.UUID, reason: str) -> bool:
    """End a session; one that ended before keeps its reason. Whether it was this call that ended it."""
    ended = await connection.execute(
        sessions.update()
        .where(sessions.c.session_id == session_id, sessions.c.end_time.is_(None))
        .values(end_time=sa.func.now(), end_reason=reason)
    )
    return ended.rowcount == 1


async def session_owner(connection: AsyncConnection, session_id: uuid.UUID) -> uuid.UUID | None:
    """Whose session it is."""
    return (await connection.execute(sa.select(sessions.c.user_id).where(sessions.c.session_id == session_id))).scalar_one_or_none()


async def session_age(connection: AsyncConnection, session_id: uuid.UUID, *, user_id: uuid.UUID) -> timedelta | None:
    """How long ago a session of this user began that has not been ended."""
    query = sa.select(sa.func.now() - sessions.c.create_time).where(
        sessions.c.session_id == session_id, sessions.c.user_id == user_id, sessions.c.end_time.is_(None)
    )
    return (await connection.execute(query)).scalar_one_or_none()


async def working_token_owner(connection: AsyncConnection, token_hash: bytes) -> uuid.UUID | None:
    """Whose session a refresh token can refresh right now."""
    query = (
        sa.select(sessions.c.user_id)
        .join(refresh_tokens, refresh_tokens.c.session_id == sessions.c.session_id)
        .where(
            refresh_tokens.c.token_hash == token_hash,
            refresh_tokens.c.use_time.is_(None),
            refresh_tokens.c.expire_time > sa.func.now(),
            sessions.c.end_time.is_(None),
            sessions.c.expire_time > sa.func.now(),
        )
    )
    return (await connection.execute(query)).scalar_one_or_none()


async def find_session(connection: AsyncConnection, *, token_hash: bytes, user_id: uuid.UUID) -> uuid.UUID | None:
    """The session of a refresh token, if it is this user's."""
    query = (
        sa.select(sessions.c.session_id)
        .join(refresh_tokens, refresh_tokens.c.session_id == sessions.c.session_id)
        .where(refresh_tokens.c.token_hash == token_hash, sessions.c.user_id == user_id)
    )
    return (await connection.execute(query)).scalar_one_or_none()


async def delete_expired(connection: AsyncConnection, *, limit: int) -> int:
    """Delete up to `limit` expired sessions (with their tokens) and as many expired tokens; the number of rows deleted."""
    deleted = 0
    for table, key in ((sessions, sessions.c.session_id), (refresh_tokens, refresh_tokens.c.token_hash)):
        # SKIP LOCKED: replicas sweep at the same time, and a token may just be presented.
        expired = sa.select(key).where(table.c.expire_time <= sa.func.now()).limit(limit).with_for_update(skip_locked=True)
        deleted += (await connection.execute(table.delete().where(key.in_(expired)))).rowcount
    return deleted


# --- administration of accounts


async def set_roles(connection: AsyncConnection, user_id: uuid.UUID, roles: Sequence[str]) -> Account:
    """Give an account that there is other roles."""
    changed = users.update().where(users.c.user_id == user_id).values(roles=list(roles)).returning(users)
    return _account((await connection.execute(changed)).one())


async def set_disabled(connection: AsyncConnection, user_id: uuid.UUID, disabled: bool) -> Account:
    """Disable or enable an account that there is."""
    disabled_time = sa.func.now() if disabled else None
    changed = users.update().where(users.c.user_id == user_id).values(disabled_time=disabled_time).returning(users)
    return _account((await connection.execute(changed)).one())


async def lock_admins(connection: AsyncConnection) -> None:
    """Until the transaction ends, nobody else takes the role `admin` from anybody."""
    await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext("genmesh.gateway.admins"))))


async def has_other_admin(connection: AsyncConnection, user_id: uuid.UUID, role: str) -> bool:
    """Whether an enabled account other than this one has the role."""
    other = sa.exists().where(users.c.user_id != user_id, users.c.disabled_time.is_(None), users.c.roles.contains([role]))
    return bool((await connection.execute(sa.select(other))).scalar_one())


async def end_sessions(connection: AsyncConnection, user_id: uuid.UUID, reason: str) -> None:
    """End every session of an account; those that ended before keep their reason."""
    await connection.execute(
        sessions.update()
        .where(sessions.c.user_id == user_id, sessions.c.end_time.is_(None))
        .values(end_time=sa.func.now(), end_reason=reason)
    )


# --- API keys


@dataclass(frozen=True, slots=True)
class ApiKey:
    """An API key without its secret."""

    api_key_id: uuid.UUID
    display_name: str
    prefix: str
    scopes: tuple[str, ...]
    create_time: datetime
    expire_time: datetime | None
    last_use_time: datetime | None
    revoke_time: datetime | None


@dataclass(frozen=True, slots=True)
class PresentedApiKey:
    """What is known of a key that somebody presents, at the database's now."""

    key: ApiKey
    key_hash: bytes
    account: Account
    works: bool
    """Neither revoked nor expired."""
    now: datetime
    account_revoke_time: datetime | None
    """Tokens of the account that were issued until then are revoked."""


# Not all columns: no list of keys brings hashes along.
_api_key_columns = [column for column in api_keys.c if column is not api_keys.c.key_hash]


def _api_key(row: sa.Row[Any]) -> ApiKey:
    return ApiKey(
        api_key_id=row.api_key_id,
        display_name=row.display_name,
        prefix=row.prefix,
        scopes=tuple(row.scopes),
        create_time=row.create_time,
        expire_time=row.expire_time,
        last_use_time=row.last_use_time,
        revoke_time=row.revoke_time,
    )


def _api_key_works() -> sa.ColumnElement[bool]:
    return sa.and_(api_keys.c.revoke_time.is_(None), sa.func.coalesce(api_keys.c.expire_time > sa.func.now(), sa.true()))


async def count_working_api_keys(connection: AsyncConnection, user_id: uuid.UUID) -> int:
    """How many keys of an account are neither revoked nor expired."""
    query = sa.select(sa.func.count()).select_from(api_keys).where(api_keys.c.user_id == user_id, _api_key_works())
    return (await connection.execute(query)).scalar_one()


async def insert_api_key(
    connection: AsyncConnection,
    *,
    api_key_id: uuid.UUID,
    user_id: uuid.UUID,
    display_name: str,
    prefix: str,
    key_hash: bytes,
    scopes: Sequence[str],
    expire_time: datetime | None,
) -> ApiKey:
    """Add a key to an account."""
    inserted = (
        api_keys.insert()
        .values(
            api_key_id=api_key_id,
            user_id=user_id,
            display_name=display_name,
            prefix=prefix,
            key_hash=key_hash,
            scopes=list(scopes),
            expire_time=expire_time,
        )
        .returning(*_api_key_columns)
    )
    return _api_key((await connection.execute(inserted)).one())


async def list_api_keys(connection: AsyncConnection, user_id: uuid.UUID, *, before: uuid.UUID | None, limit: int) -> list[ApiKey]:
    """Keys of an account from newest to oldest, those made before the key `before`."""
    query = sa.select(*_api_key_columns).where(api_keys.c.user_id == user_id).order_by(api_keys.c.api_key_id.desc()).limit(limit)
    if before is not None:
        query = query.where(api_keys.c.api_key_id < before)
    return [_api_key(row) for row in await connection.execute(query)]


async def revoke_api_key(connection: AsyncConnection, api_key_id: uuid.UUID, *, user_id: uuid.UUID) -> ApiKey | None:
    """Revoke a key of this user; None for one that is not there, is somebody else's, or was revoked before."""
    revoked = (
        api_keys.update()
        .where(api_keys.c.api_key_id == api_key_id, api_keys.c.user_id == user_id, api_keys.c.revoke_time.is_(None))
        .values(revoke_time=sa.func.now())
        .returning(*_api_key_columns)
    )
    row = (await connection.execute(revoked)).one_or_none()
    return _api_key(row) if row else None


async def get_api_key(connection: AsyncConnection, api_key_id: uuid.UUID, *, user_id: uuid.UUID) -> ApiKey | None:
    """A key of this user."""
    query = sa.select(*_api_key_columns).where(api_keys.c.api_key_id == api_key_id, api_keys.c.user_id == user_id)
    row = (await connection.execute(query)).one_or_none()
    return _api_key(row) if row else None


async def find_api_key(connection: AsyncConnection, prefix: str) -> PresentedApiKey | None:
    """The key with this public beginning. One statement, so that account and revocations are of one moment."""
    key = [column.label(f"key_{column.name}") for column in api_keys.c]
    query = (
        sa.select(
            users,
            *key,
            _api_key_works().label("works"),
            sa.func.now().label("now"),
            _last_revoke_time("user", api_keys.c.user_id).label("account_revoke_time"),
        )
        .join(users, users.c.user_id == api_keys.c.user_id)
        .where(api_keys.c.prefix == prefix)
    )
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        return None
    return PresentedApiKey(
        key=ApiKey(
            api_key_id=row.key_api_key_id,
            display_name=row.key_display_name,
            prefix=row.key_prefix,
            scopes=tuple(row.key_scopes),
            create_time=row.key_create_time,
            expire_time=row.key_expire_time,
            last_use_time=row.key_last_use_time,
            revoke_time=row.key_revoke_time,
        ),
        key_hash=row.key_key_hash,
        account=_account(row),
        works=row.works,
        now=row.now,
        account_revoke_time=row.account_revoke_time,
    )


async def mark_api_keys_used(connection: AsyncConnection, api_key_ids: Sequence[uuid.UUID]) -> None:
    """Note, to the minute, that keys were used now; one already noted in this minute is left alone."""
    minute = sa.func.date_trunc("minute", sa.func.now())
    await connection.execute(
        api_keys.update()
        .where(api_keys.c.api_key_id.in_(api_key_ids), sa.func.coalesce(api_keys.c.last_use_time < minute, sa.true()))
        .values(last_use_time=minute)
    )


# --- the audit trail


@dataclass(frozen=True, slots=True)
class AuditRow:
    """An entry of the audit trail; `code` and `reason` are None while its outcome is not known, `reporter` in
    entries from before it was written down."""

    audit_entry_id: uuid.UUID
    act_time: datetime
    actor_user_id: uuid.UUID | None
    actor_api_key_id: uuid.UUID | None
    actor_service: str
    method: str
    subject: str
    client_address: str
    request_id: str
    details: Mapping[str, str]
    code: int | None
    reason: str | None
    reporter: str | None


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which entries of the audit trail; None and empty do not select."""

    actor_user_id: uuid.UUID | None = None
    subject: str = ""
    method: str = ""
    start_time: datetime | None = None
    end_time: datetime | None = None


async def insert_audit_entry(
    connection: AsyncConnection,
    *,
    audit_entry_id: uuid.UUID,
    actor_user_id: uuid.UUID | None,
    actor_api_key_id: uuid.UUID | None,
    actor_service: str,
    method: str,
    subject: str,
    client_address: str,
    request_id: str,
    details: Mapping[str, str],
    reporter: str,
) -> bool:
    """Write down an act, unless an entry with this id is there; False if that one is another reporter's."""
    inserted = await connection.execute(
        insert(audit_entries)
        .values(
            audit_entry_id=audit_entry_id,
            actor_user_id=actor_user_id,
            actor_api_key_id=actor_api_key_id,
            actor_service=actor_service,
            method=method,
            subject=subject,
            client_address=client_address,
            request_id=request_id,
            details=dict(details),
            reporter=reporter,
        )
        .on_conflict_do_nothing(index_elements=[audit_entries.c.audit_entry_id])
    )
    return bool(inserted.rowcount) or await _reported(connection, audit_entry_id, reporter)


async def insert_audit_outcome(
    connection: AsyncConnection,
    *,
    audit_entry_id: uuid.UUID,
    code: int,
    reason: str,
    subject: str,
    details: Mapping[str, str],
    reporter: str,
) -> bool:
    """Write down how an act ended, unless that is known; False if this reporter wrote no such entry. The subject of an entry stays."""
    entry = sa.select(
        audit_entries.c.audit_entry_id,
        audit_entries.c.act_time,
        sa.literal(code),
        sa.literal(reason),
        sa.case((audit_entries.c.subject == "", subject), else_=""),
        sa.literal(dict(details), type_=JSONB),
    ).where(audit_entries.c.audit_entry_id == audit_entry_id, audit_entries.c.reporter == reporter)
    inserted = await connection.execute(
        insert(audit_outcomes)
        .from_select(["audit_entry_id", "act_time", "code", "reason", "subject", "details"], entry)
        .on_conflict_do_nothing(index_elements=[audit_outcomes.c.audit_entry_id])
    )
    return bool(inserted.rowcount) or await _reported(connection, audit_entry_id, reporter)


async def _reported(connection: AsyncConnection, audit_entry_id: uuid.UUID, reporter: str) -> bool:
    theirs = sa.select(sa.exists().where(audit_entries.c.audit_entry_id == audit_entry_id, audit_entries.c.reporter == reporter))
    return bool((await connection.execute(theirs)).scalar_one())


async def list_audit_entries(
    connection: AsyncConnection, selection: AuditFilter, *, before: tuple[datetime, uuid.UUID] | None, limit: int
) -> list[AuditRow]:
    """Entries with their outcomes from newest to oldest, those before the entry `before`."""
    query = _audit_query(audit_entries, selection, before=before, limit=limit)
    if selection.subject:
        # Each half along an index of its own. No entry is in both: outcomes have a subject only where entries have none.
        both = sa.union_all(
            query.where(audit_entries.c.subject == selection.subject),
            _audit_query(audit_outcomes, selection, before=before, limit=limit).where(
                audit_outcomes.c.subject == selection.subject,
                audit_outcomes.c.subject != "",  # the index is of these alone, and a plan for any value cannot tell
            ),
        ).subquery()
        query = sa.select(both).order_by(both.c.act_time.desc(), both.c.audit_entry_id.desc()).limit(limit)
    return [
        AuditRow(
            audit_entry_id=row.audit_entry_id,
            act_time=row.act_time,
            actor_user_id=row.actor_user_id,
            actor_api_key_id=row.actor_api_key_id,
            actor_service=row.actor_service,
            method=row.method,
            subject=row.subject or row.outcome_subject or "",
            client_address=row.client_address,
            request_id=row.request_id,
            details={**row.details, **(row.outcome_details or {})},
            code=row.code,
            reason=row.reason,
            reporter=row.reporter,
        )
        for row in await connection.execute(query)
    ]


def _audit_query(
    ordered: sa.Table, selection: AuditFilter, *, before: tuple[datetime, uuid.UUID] | None, limit: int
) -> sa.Select[tuple[Any, ...]]:
    """Entries with their outcomes, but for the subject as selected, in the order of `ordered`: the table of either."""
    act_time, audit_entry_id = ordered.c.act_time, ordered.c.audit_entry_id
    query: sa.Select[tuple[Any, ...]] = (
        sa.select(
            audit_entries,
            audit_outcomes.c.code,
            audit_outcomes.c.reason,
            audit_outcomes.c.subject.label("outcome_subject"),
            audit_outcomes.c.details.label("outcome_details"),
        )
        .outerjoin(audit_outcomes, audit_outcomes.c.audit_entry_id == audit_entries.c.audit_entry_id)
        .order_by(act_time.desc(), audit_entry_id.desc())
        .limit(limit)
    )
    if selection.actor_user_id is not None:
        query = query.where(audit_entries.c.actor_user_id == selection.actor_user_id)
    if selection.method:
        query = query.where(audit_entries.c.method == selection.method)
    if selection.start_time is not None:
        query = query.where(act_time >= selection.start_time)
    if selection.end_time is not None:
        query = query.where(act_time < selection.end_time)
    if before is not None:
        query = query.where(sa.tuple_(act_time, audit_entry_id) < sa.tuple_(*before))
    return query


# --- revocations


@dataclass(frozen=True, slots=True)
class RevocationRow:
    """Tokens of a subject issued until `revoke_time` are revoked."""

    revocation_id: int
    kind: str
    subject_id: uuid.UUID
    revoke_time: datetime


ISSUED_AFTER = timedelta(seconds=1)
"""How long after a revocation of its account a token says it was issued, if it really was at the same time."""


def _last_revoke_time(kind: str, subject_id: uuid.UUID | sa.Column[uuid.UUID]) -> sa.ScalarSelect[datetime]:
    last = sa.select(sa.func.max(revocations.c.revoke_time)).where(revocations.c.kind == kind, revocations.c.subject_id == subject_id)
    return last.scalar_subquery()


async def insert_revocation(connection: AsyncConnection, *, kind: str, subject_id: uuid.UUID, margin: timedelta) -> None:
    """Revoke what was issued until `margin` from now, and what `account_issue_time` gave out since the last time."""
    # Whole seconds, as in tokens, so that nobody rounds.
    revoke_time = sa.func.greatest(
        sa.func.date_trunc("second", sa.func.clock_timestamp()) + margin, _last_revoke_time(kind, subject_id) + ISSUED_AFTER
    )
    await connection.execute(revocations.insert().values(kind=kind, subject_id=subject_id, revoke_time=revoke_time))


async def revoked_ahead(connection: AsyncConnection, user_id: uuid.UUID) -> timedelta:
    """How far the last revocation of an account's tokens lies ahead of now; not above zero if it lies behind."""
    ahead = _last_revoke_time("user", user_id) - sa.func.clock_timestamp()
    return (await connection.execute(sa.select(sa.func.coalesce(ahead, sa.text("interval '0'"))))).scalar_one()


async def account_issue_time(connection: AsyncConnection, user_id: uuid.UUID) -> datetime:
    """The database's now, or right after the last revocation of the account's tokens."""
    query = sa.select(sa.func.greatest(sa.func.date_trunc("second", sa.func.now()), _last_revoke_time("user", user_id) + ISSUED_AFTER))
    return (await connection.execute(query)).scalar_one()


async def list_revocations(connection: AsyncConnection, *, after: int, limit: int) -> list[RevocationRow]:
    """Revocations in the order they were written down, those after `after`."""
    query = sa.select(revocations).where(revocations.c.revocation_id > after).order_by(revocations.c.revocation_id).limit(limit)
    return [
        RevocationRow(revocation_id=row.revocation_id, kind=row.kind, subject_id=row.subject_id, revoke_time=row.revoke_time)
        for row in await connection.execute(query)
    ]


async def last_settled_revocation(connection: AsyncConnection, *, settle: timedelta) -> int:
    """The newest revocation that was written down `settle` ago or earlier; 0 if there is none."""
    query = (
        sa.select(revocations.c.revocation_id)
        .where(revocations.c.create_time <= sa.func.clock_timestamp() - settle)
        .order_by(revocations.c.create_time.desc(), revocations.c.revocation_id.desc())
        .limit(1)
    )
    return (await connection.execute(query)).scalar_one_or_none() or 0


async def delete_old_revocations(connection: AsyncConnection, *, age: timedelta, limit: int) -> int:
    """Delete up to `limit` revocations written down `age` ago or earlier; the number deleted."""
    old = (
        sa.select(revocations.c.revocation_id)
        .where(revocations.c.create_time <= sa.func.now() - age)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    return (await connection.execute(revocations.delete().where(revocations.c.revocation_id.in_(old)))).rowcount
