"""Plans: administrators change them, credit_service reads who has which since when.

And what migrations made of rows from before: how accounts got the start of their plans, and identities their ids.
"""

import asyncio
import uuid
from importlib import resources
from typing import Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
import structlog
from alembic import command
from alembic.config import Config
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway import app
from gateway.tables import users
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from servicekit.client import mesh_channel
from servicekit.database import create_engine, migrate, transaction
from servicekit.errors import Reason
from servicekit.settings import DatabaseSettings

PASSWORD = "correct horse battery"
OLD_ACCOUNTS = 2500
"""More than two batches of the migration that fills in the start of their plans."""


def bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


async def register(gateway: Any) -> identity_pb2.User:
    request = identity_pb2.RegisterUserRequest(email=f"bob-{uuid.uuid4().hex}@example.org", password=PASSWORD)
    return (await gateway.users.RegisterUser(request)).user


async def token_of(gateway: Any, email: str) -> str:
    credential = identity_pb2.PasswordCredential(email=email, password=PASSWORD)
    return (await gateway.users.SignIn(identity_pb2.SignInRequest(password=credential))).access_token


@pytest_asyncio.fixture(scope="module")
async def admin(gateway: Any) -> identity_pb2.User:
    """An administrator."""
    email = f"admin-{uuid.uuid4().hex}@example.org"
    await gateway.accounts.ensure_admin(email=email, password=PASSWORD)
    credential = identity_pb2.PasswordCredential(email=email, password=PASSWORD)
    return (await gateway.users.SignIn(identity_pb2.SignInRequest(password=credential))).user


@pytest_asyncio.fixture(scope="module")
async def admin_token(gateway: Any, admin: identity_pb2.User) -> str:
    return await token_of(gateway, admin.email)


async def update(gateway: Any, token: str, user_id: str, **changes: Any) -> identity_pb2.User:
    request = identity_pb2.UpdateUserRequest(user_id=user_id, **changes)
    return (await gateway.admin.UpdateUser(request, metadata=bearer(token))).user


async def members(gateway: Any, page_size: int = 200) -> list[identity_pb2.Member]:
    """All members, page by page."""
    found: list[identity_pb2.Member] = []
    token = ""
    while True:
        page = await gateway.members.ListMembers(identity_pb2.ListMembersRequest(page_size=page_size, page_token=token))
        found += page.members
        token = page.next_page_token
        if not token:
            return found


async def member(gateway: Any, user: identity_pb2.User) -> identity_pb2.Member:
    [found] = [one for one in await members(gateway) if one.user_id == user.user_id]
    return found


# --- administrators


async def test_a_new_plan_is_in_the_account_and_in_the_next_token(gateway: Any, admin: identity_pb2.User, admin_token: str) -> None:
    user = await register(gateway)
    with structlog.testing.capture_logs() as logs:
        updated = await update(gateway, admin_token, user.user_id, plan=identity_pb2.PLAN_PRO)
    user.plan = identity_pb2.PLAN_PRO
    assert updated == user
    credential = identity_pb2.PasswordCredential(email=user.email, password=PASSWORD)
    session = await gateway.users.SignIn(identity_pb2.SignInRequest(password=credential))
    assert session.user == user
    me = await gateway.users.GetMe(identity_pb2.GetMeRequest(), metadata=bearer(session.access_token))
    assert me.user == user
    [told] = [log for log in logs if log["event"] == "account.plan_changed"]
    assert {key: told[key] for key in ("user_id", "actor_id", "before", "plan")} == {
        "user_id": user.user_id,
        "actor_id": admin.user_id,
        "before": "PLAN_FREE",
        "plan": "PLAN_PRO",
    }


async def test_the_same_plan_again_changes_nothing(gateway: Any, admin_token: str) -> None:
    user = await register(gateway)
    first = await member(gateway, user)
    await update(gateway, admin_token, user.user_id, plan=identity_pb2.PLAN_FREE)
    assert await member(gateway, user) == first
    await update(gateway, admin_token, user.user_id, plan=identity_pb2.PLAN_PRO)
    second = await member(gateway, user)
    assert second.plan == identity_pb2.PLAN_PRO
    assert second.plan_start_time.ToNanoseconds() > first.plan_start_time.ToNanoseconds()
    with structlog.testing.capture_logs() as logs:
        answers = await asyncio.gather(*(update(gateway, admin_token, user.user_id, plan=identity_pb2.PLAN_PRO) for _ in range(4)))
    assert {answer.plan for answer in answers} == {identity_pb2.PLAN_PRO}
    assert [log for log in logs if log["event"] == "account.plan_changed"] == []
    assert await member(gateway, user) == second


async def test_of_many_changes_at_once_each_that_changes_is_told_once(gateway: Any, admin_token: str) -> None:
    user = await register(gateway)
    with structlog.testing.capture_logs() as logs:
        await asyncio.gather(*(update(gateway, admin_token, user.user_id, plan=identity_pb2.PLAN_PRO) for _ in range(8)))
    assert len([log for log in logs if log["event"] == "account.plan_changed"]) == 1


async def test_nothing_set_changes_nothing(gateway: Any, admin_token: str) -> None:
    user = await register(gateway)
    before = await member(gateway, user)
    assert await update(gateway, admin_token, user.user_id) == user
    assert await member(gateway, user) == before


async def test_an_account_that_is_not_there(gateway: Any, admin_token: str, refused: Any) -> None:
    for changes in ({}, {"plan": identity_pb2.PLAN_PRO}):
        error = await refused(update(gateway, admin_token, str(uuid.uuid4()), **changes))
        assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, Reason.ERROR_REASON_NOT_FOUND)


async def test_a_disabled_account_can_be_changed(gateway: Any, admin_token: str) -> None:
    user = await register(gateway)
    await disable(gateway, user)
    assert (await update(gateway, admin_token, user.user_id, plan=identity_pb2.PLAN_PRO)).plan == identity_pb2.PLAN_PRO


@pytest.mark.parametrize(
    ("changes", "field"), [({"user_id": "nobody"}, "user_id"), ({"plan": identity_pb2.PLAN_UNSPECIFIED}, "plan"), ({"plan": 77}, "plan")]
)
async def test_what_updating_refuses(gateway: Any, admin_token: str, refused: Any, changes: dict[str, Any], field: str) -> None:
    values: dict[str, Any] = {"user_id": str(uuid.uuid4())} | changes
    request = identity_pb2.UpdateUserRequest(**values)
    error = await refused(gateway.admin.UpdateUser(request, metadata=bearer(admin_token)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.message.startswith(f"{field}: ")


async def test_only_administrators_change_plans(gateway: Any, refused: Any) -> None:
    user = await register(gateway)
    token = await token_of(gateway, user.email)
    error = await refused(update(gateway, token, user.user_id, plan=identity_pb2.PLAN_PRO))
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, Reason.ERROR_REASON_PERMISSION_DENIED)
    assert (await member(gateway, user)).plan == identity_pb2.PLAN_FREE


# --- members


async def disable(gateway: Any, user: identity_pb2.User) -> None:
    async with transaction(gateway.engine) as connection:
        await connection.execute(users.update().where(users.c.user_id == uuid.UUID(user.user_id)).values(disabled_time=sa.func.now()))


async def test_a_plan_starts_with_the_account(gateway: Any) -> None:
    user = await register(gateway)
    assert await member(gateway, user) == identity_pb2.Member(
        user_id=user.user_id, plan=identity_pb2.PLAN_FREE, plan_start_time=user.create_time
    )


async def test_members_are_the_enabled_accounts_oldest_first(gateway: Any) -> None:
    made = [await register(gateway) for _ in range(5)]
    await disable(gateway, made[2])
    found = await members(gateway, page_size=2)
    expected = [user.user_id for user in made if user is not made[2]]
    assert [one.user_id for one in found][-4:] == expected
    assert found == await members(gateway)
    assert [one.user_id for one in found] == sorted(one.user_id for one in found)


async def test_an_account_made_between_two_pages_is_on_a_later_one(gateway: Any) -> None:
    [first, second] = [await register(gateway) for _ in range(2)]
    everybody = await members(gateway)
    page = await gateway.members.ListMembers(identity_pb2.ListMembersRequest(page_size=len(everybody) - 1))
    assert page.members[-1].user_id == first.user_id
    third = await register(gateway)
    rest = await gateway.members.ListMembers(identity_pb2.ListMembersRequest(page_token=page.next_page_token))
    assert [one.user_id for one in rest.members] == [second.user_id, third.user_id]
    assert rest.next_page_token == ""


async def test_tokens_of_other_lists_are_refused(gateway: Any, admin_token: str, refused: Any) -> None:
    await register(gateway)
    page = await gateway.admin.ListUsers(identity_pb2.ListUsersRequest(page_size=1), metadata=bearer(admin_token))
    error = await refused(gateway.members.ListMembers(identity_pb2.ListMembersRequest(page_token=page.next_page_token)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("caller", ["envoy", "jobs_service", "gateway"])
async def test_only_credit_service_lists_members(gateway: Any, refused: Any, admin_token: str, caller: str) -> None:
    async with mesh_channel(gateway.settings, f"127.0.0.1:{gateway.port}", caller=caller, service="gateway") as channel:
        stub: Any = identity_pb2_grpc.MembershipServiceStub(channel)
        for metadata in ([], bearer(admin_token)):
            error = await refused(stub.ListMembers(identity_pb2.ListMembersRequest(), metadata=metadata))
            assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, Reason.ERROR_REASON_PERMISSION_DENIED)


# --- the migration


def test_accounts_from_before_get_the_time_they_were_made(postgres: Any) -> None:
    url = postgres.create_database()
    config = Config()
    config.set_main_option("script_location", str(resources.files("gateway").joinpath("migrations")))
    config.attributes.update(database_url=url, schema=app.SCHEMA)
    settings = DatabaseSettings.model_validate({"database_url": url})

    def insert(ids: str) -> str:
        columns = "(user_id, email, display_name, roles, plan, create_time)"
        values = "SELECT id, id || '@example.org', 'x', '{}', 'PLAN_FREE', timestamptz '2026-01-31T10:00Z' - random() * interval '1 year'"
        return f"INSERT INTO users {columns} {values} FROM ({ids}) AS made (id)"

    command.upgrade(config, "0001")
    # Among them the lowest and the highest id there can be.
    edges = f"VALUES ('{uuid.UUID(int=0)}'::uuid), ('{uuid.UUID(int=2**128 - 1)}'::uuid)"
    asyncio.run(execute(settings, insert(f"SELECT gen_random_uuid() FROM generate_series(3, {OLD_ACCOUNTS}) UNION ALL {edges}")))
    command.upgrade(config, "0002")
    # What a gateway that does not know the column makes while the column is being filled.
    asyncio.run(execute(settings, insert("SELECT gen_random_uuid()")))
    migrate(settings, package="gateway", schema=app.SCHEMA)
    [counts, procedures, columns] = asyncio.run(
        execute(
            settings,
            "SELECT count(*) FILTER (WHERE plan_start_time = create_time), count(*) FILTER (WHERE plan_start_time > create_time)"
            " FROM users",
            "SELECT count(*) FROM pg_proc WHERE pronamespace = 'gateway'::regnamespace AND prokind = 'p'",
            "SELECT is_nullable FROM information_schema.columns WHERE table_name = 'users' AND column_name = 'plan_start_time'",
        )
    )
    assert (counts, procedures, columns) == ((OLD_ACCOUNTS, 1), (0,), ("NO",))


def test_identities_from_before_get_ids(postgres: Any) -> None:
    url = postgres.create_database()
    config = Config()
    config.set_main_option("script_location", str(resources.files("gateway").joinpath("migrations")))
    config.attributes.update(database_url=url, schema=app.SCHEMA)
    settings = DatabaseSettings.model_validate({"database_url": url})
    insert = (
        "WITH made AS (INSERT INTO users (user_id, email, display_name, roles, plan)"
        " SELECT id, id || '@example.org', 'x', '{}', 'PLAN_FREE' FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, 50)) AS ids"
        " RETURNING user_id) INSERT INTO identities (issuer, subject, user_id) SELECT 'https://issuer.example', user_id, user_id FROM made"
    )
    command.upgrade(config, "0008")
    asyncio.run(execute(settings, insert))
    command.upgrade(config, "0009")
    asyncio.run(execute(settings, insert))  # a gateway that does not know the column
    migrate(settings, package="gateway", schema=app.SCHEMA)
    [counts, columns, constraints] = asyncio.run(
        execute(
            settings,
            "SELECT count(*), count(DISTINCT identity_id) FROM identities",
            "SELECT is_nullable FROM information_schema.columns WHERE table_name = 'identities' AND column_name = 'identity_id'",
            "SELECT count(*) FROM pg_constraint WHERE conrelid = 'identities'::regclass AND contype = 'c'",
        )
    )
    assert (counts, columns, constraints) == ((100, 100), ("NO",), (0,))


async def execute(settings: DatabaseSettings, *statements: str) -> list[tuple[object, ...]]:
    """The first row of each statement that has one."""
    engine: AsyncEngine = create_engine(settings, schema=app.SCHEMA, application="test")
    try:
        async with transaction(engine) as connection:
            results = [await connection.execute(sa.text(statement)) for statement in statements]
            return [tuple(result.one()) for result in results if result.returns_rows]
    finally:
        await engine.dispose()
