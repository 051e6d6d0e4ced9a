"""What administrators do to accounts: roles, plans, disabling; and that somebody is left who can."""

import asyncio
import uuid
from typing import Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa

from gateway import app
from gateway.revocations import revoke
from gateway.tables import revocations, sessions, users
from genmesh.identity.v1 import identity_pb2
from servicekit.database import migrate, transaction
from servicekit.errors import Reason
from servicekit.settings import DatabaseSettings
from tests.service.gateway.callers import Person, admin, claims_of, create_key, get_me, key_sign_in, person, sign_in, update


@pytest_asyncio.fixture(scope="module")
async def boss(gateway: Any) -> Person:
    return await admin(gateway)


@pytest_asyncio.fixture
async def alone(postgres: Any, start_gateway: Any) -> Any:
    """A gateway without accounts."""
    url = postgres.create_database()
    await asyncio.to_thread(migrate, DatabaseSettings.model_validate({"database_url": url}), package="gateway", schema=app.SCHEMA)
    return await start_gateway(database_url=url)


def refresh(gateway: Any, who: Person) -> Any:
    return gateway.users.RefreshSession(identity_pb2.RefreshSessionRequest(refresh_token=who.refresh_token))


async def revocations_of(gateway: Any, user_id: uuid.UUID) -> int:
    async with transaction(gateway.engine) as connection:
        return (await connection.execute(sa.select(sa.func.count()).where(revocations.c.subject_id == user_id))).scalar_one()


async def test_new_roles_are_in_the_next_token_and_the_old_one_stops(gateway: Any, boss: Person, refused: Any) -> None:
    who = await person(gateway)
    updated = await update(gateway, boss, who.user_id, roles=["operator", "admin"])
    assert list(updated.roles) == ["admin", "operator"]
    await gateway.deps.revocations.poll()
    error = await refused(get_me(gateway, who.access_token))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_TOKEN_REVOKED)
    # The session stays: refreshed, it works at once.
    refreshed = await refresh(gateway, who)
    assert claims_of(refreshed.access_token)["roles"] == ["admin", "operator"]
    assert (await get_me(gateway, refreshed.access_token)).user == updated
    again = Person(refreshed.user, refreshed.access_token, refreshed.refresh_token)
    await gateway.admin.ListUsers(identity_pb2.ListUsersRequest(page_size=1), metadata=again.metadata)
    # And back, right away.
    await update(gateway, boss, who.user_id, roles=[])
    await gateway.deps.revocations.poll()
    assert (await refused(get_me(gateway, again.access_token))).reason == Reason.ERROR_REASON_TOKEN_REVOKED
    plain = await refresh(gateway, again)
    assert claims_of(plain.access_token)["roles"] == []
    await get_me(gateway, plain.access_token)


@pytest.mark.parametrize("roles", [["root"], ["admin", "admin"], [""]])
async def test_roles_that_there_are_not(gateway: Any, boss: Person, refused: Any, roles: list[str]) -> None:
    who = await person(gateway)
    error = await refused(update(gateway, boss, who.user_id, roles=roles))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.message.startswith("roles.roles")


async def test_nothing_new_revokes_nothing(gateway: Any, boss: Person) -> None:
    who = await person(gateway)
    await update(gateway, boss, who.user_id)
    await update(gateway, boss, who.user_id, roles=[], disabled=False, plan=identity_pb2.PLAN_FREE)
    assert await revocations_of(gateway, who.user_id) == 0
    await update(gateway, boss, who.user_id, roles=["operator"], plan=identity_pb2.PLAN_PRO)
    assert await revocations_of(gateway, who.user_id) == 1


async def test_a_disabled_account_is_out_everywhere(gateway: Any, boss: Person, refused: Any) -> None:
    who = await person(gateway)
    other_session = await sign_in(gateway, who.user.email)
    key = await create_key(gateway, who)
    key_token = (await key_sign_in(gateway, key.secret)).access_token
    disabled = await update(gateway, boss, who.user_id, disabled=True)
    assert disabled.disabled
    request = identity_pb2.ListUsersRequest(email=who.user.email)
    [listed] = (await gateway.admin.ListUsers(request, metadata=boss.metadata)).users
    assert listed == disabled
    async with transaction(gateway.engine) as connection:
        query = sa.select(sessions.c.end_reason).where(sessions.c.user_id == who.user_id)
        assert (await connection.execute(query)).scalars().all() == ["account_disabled"] * 2
    await gateway.deps.revocations.poll()
    for token in (who.access_token, other_session.access_token, key_token):
        assert (await refused(get_me(gateway, token))).reason == Reason.ERROR_REASON_TOKEN_REVOKED
    for call, reason in (
        (sign_in(gateway, who.user.email), Reason.ERROR_REASON_ACCOUNT_DISABLED),
        (refresh(gateway, who), Reason.ERROR_REASON_REFRESH_TOKEN_INVALID),
        (key_sign_in(gateway, key.secret), Reason.ERROR_REASON_API_KEY_INVALID),
    ):
        assert (await refused(call)).reason == reason
    # Enabled again: sessions that ended stay ended, the key works, and so does a new session.
    assert not (await update(gateway, boss, who.user_id, disabled=False)).disabled
    await gateway.deps.revocations.poll()
    assert (await refused(refresh(gateway, who))).reason == Reason.ERROR_REASON_REFRESH_TOKEN_INVALID
    assert (await refused(get_me(gateway, who.access_token))).reason == Reason.ERROR_REASON_TOKEN_REVOKED
    await get_me(gateway, (await sign_in(gateway, who.user.email)).access_token)
    await get_me(gateway, (await key_sign_in(gateway, key.secret)).access_token)


async def test_of_a_session_begun_while_its_account_is_disabled_nothing_is_left(gateway: Any, boss: Person) -> None:
    who = await person(gateway)
    answers = await asyncio.gather(
        update(gateway, boss, who.user_id, disabled=True),
        *(sign_in(gateway, who.user.email) for _ in range(8)),
        *(refresh(gateway, who) for _ in range(2)),
        return_exceptions=True,
    )
    assert isinstance(answers[0], identity_pb2.User)
    async with transaction(gateway.engine) as connection:
        query = sa.select(sa.func.count()).where(sessions.c.user_id == who.user_id, sessions.c.end_time.is_(None))
        assert (await connection.execute(query)).scalar_one() == 0


@pytest.mark.parametrize("changes", [{"roles": []}, {"roles": ["operator"]}, {"disabled": True}, {"roles": [], "disabled": True}])
async def test_the_last_administrator_stays(alone: Any, refused: Any, changes: dict[str, Any]) -> None:
    boss, disabled = await admin(alone), await admin(alone)
    await update(alone, boss, disabled.user_id, disabled=True)  # is none any more
    error = await refused(update(alone, boss, boss.user_id, plan=identity_pb2.PLAN_PRO, **changes))
    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, Reason.ERROR_REASON_LAST_ADMIN)
    me = (await get_me(alone, boss.access_token)).user
    assert me == boss.user  # not the plan, either
    # What does not take the role away is allowed, and with another one all is.
    await update(alone, boss, boss.user_id, roles=["admin", "operator"], disabled=False)
    boss = await sign_in(alone, boss.user.email)
    await update(alone, boss, disabled.user_id, disabled=False)
    await update(alone, boss, boss.user_id, **changes)


async def test_two_administrators_cannot_depose_each_other(alone: Any) -> None:
    for _ in range(3):
        first, second = await admin(alone), await admin(alone)
        async with transaction(alone.engine) as connection:
            others = users.c.user_id.not_in([first.user_id, second.user_id])
            await connection.execute(users.update().where(others).values(roles=[]))
        answers = await asyncio.gather(
            update(alone, first, second.user_id, roles=[]), update(alone, second, first.user_id, disabled=True), return_exceptions=True
        )
        assert sum(isinstance(answer, identity_pb2.User) for answer in answers) == 1


async def test_only_administrators_change_accounts(gateway: Any, boss: Person, refused: Any) -> None:
    who, operator = await person(gateway), await person(gateway)
    await update(gateway, boss, operator.user_id, roles=["operator"])
    operator = await sign_in(gateway, operator.user.email)
    for caller in (who, operator):
        for changes in ({"roles": ["admin"]}, {"disabled": True}):
            error = await refused(update(gateway, caller, who.user_id, **changes))
            assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, Reason.ERROR_REASON_PERMISSION_DENIED)
    assert (await get_me(gateway, who.access_token)).user == who.user


async def test_changes_in_a_row_do_not_push_tokens_into_the_future(gateway: Any, boss: Person) -> None:
    who = await person(gateway)
    session: Any = who
    for number in range(4):
        plan = identity_pb2.PLAN_PRO if number % 2 == 0 else identity_pb2.PLAN_FREE
        await update(gateway, boss, who.user_id, plan=plan)
        session = await refresh(gateway, session)
        async with transaction(gateway.engine) as connection:
            now = (await connection.execute(sa.select(sa.func.clock_timestamp()))).scalar_one().timestamp()
        assert claims_of(session.access_token)["iat"] - now <= 3
        await gateway.deps.revocations.poll()
        await get_me(gateway, session.access_token)


async def test_changes_that_would_wait_too_long_are_refused(
    gateway: Any, boss: Person, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.admin.CHANGE_WAIT_MAX_S", 0.0)
    who = await person(gateway)
    async with transaction(gateway.engine) as connection:
        for _ in range(4):
            await revoke(connection, "user", who.user_id)
    error = await refused(update(gateway, boss, who.user_id, plan=identity_pb2.PLAN_PRO))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert error.retry_after_s is not None
    assert 0 < error.retry_after_s <= 4
    async with transaction(gateway.engine) as connection:
        assert (await connection.execute(sa.select(users.c.plan).where(users.c.user_id == who.user_id))).scalar_one() == "PLAN_FREE"
    # What is so already revokes nothing.
    await update(gateway, boss, who.user_id, plan=identity_pb2.PLAN_FREE)
