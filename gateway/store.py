"""All SQL of the gateway. Functions take the caller's connection, so that they compose into transactions.

Time is the database's: replicas need not agree on a clock.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.identity import Account, RefreshState
from gateway.tables import passwords, refresh_tokens, sessions, users


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
    connection: AsyncConnection, *, user_id: uuid.UUID, email: str, display_name: str, roles: Sequence[str], plan: str, password_hash: str
) -> Account | None:
    """Make an account with a password; None if the address is taken."""
    inserted = await connection.execute(
        insert(users)
        .values(user_id=user_id, email=email, display_name=display_name, roles=list(roles), plan=plan)
        .on_conflict_do_nothing(index_elements=[users.c.email])
        .returning(users)
    )
    row = inserted.one_or_none()
    if row is None:
        return None
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


async def get_password(connection: AsyncConnection, email: str) -> tuple[Account, str] | None:
    """The account with this address (canonical form) and its password hash."""
    query = sa.select(users, passwords.c.hash).join(passwords, passwords.c.user_id == users.c.user_id).where(users.c.email == email)
    row = (await connection.execute(query)).one_or_none()
    return (_account(row), row.hash) if row else None


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


async def insert_session(connection: AsyncConnection, *, session_id: uuid.UUID, user_id: uuid.UUID, ttl: timedelta) -> None:
    """Start a session of `ttl`."""
    await connection.execute(sessions.insert().values(session_id=session_id, user_id=user_id, expire_time=sa.func.now() + ttl))


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
    """Read a token and its session, and keep others from using either until the transaction ends."""
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


async def end_session(connection: AsyncConnection, session_id: uuid.UUID, reason: str) -> None:
    """End a session; one that ended before keeps its reason."""
    await connection.execute(
        sessions.update()
        .where(sessions.c.session_id == session_id, sessions.c.end_time.is_(None))
        .values(end_time=sa.func.now(), end_reason=reason)
    )


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
