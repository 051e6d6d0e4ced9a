"""Accounts and sessions through the real server, over the real database."""

import asyncio
import time
import uuid
from typing import Any

import grpc
import jwt
import pytest
import pytest_asyncio
import sqlalchemy as sa

from gateway import store
from gateway.identity import refresh_token_hash
from gateway.tables import passwords, refresh_tokens, sessions, users
from genmesh.identity.v1 import identity_pb2
from servicekit.database import transaction
from servicekit.errors import Reason

PASSWORD = "correct horse battery"


def fresh_email() -> str:
    return f"ann-{uuid.uuid4().hex}@example.org"


def bearer(token: str) -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {token}")]


async def register(gateway: Any, email: str | None = None, display_name: str = "") -> identity_pb2.User:
    response = await gateway.users.RegisterUser(
        identity_pb2.RegisterUserRequest(email=email or fresh_email(), password=PASSWORD, display_name=display_name)
    )
    return response.user


def sign_in(gateway: Any, email: str, password: str = PASSWORD) -> Any:
    return gateway.users.SignIn(identity_pb2.SignInRequest(password=identity_pb2.PasswordCredential(email=email, password=password)))


def refresh(gateway: Any, token: str) -> Any:
    return gateway.users.RefreshSession(identity_pb2.RefreshSessionRequest(refresh_token=token))


def get_me(gateway: Any, access_token: str) -> Any:
    return gateway.users.GetMe(identity_pb2.GetMeRequest(), metadata=bearer(access_token))


async def disable(gateway: Any, user: identity_pb2.User) -> None:
    async with transaction(gateway.engine) as connection:
        await connection.execute(users.update().where(users.c.user_id == uuid.UUID(user.user_id)).values(disabled_time=sa.func.now()))


async def session_of(gateway: Any, refresh_token: str) -> Any:
    """The row of the session that a refresh token belongs to."""
    async with transaction(gateway.engine) as connection:
        return (
            await connection.execute(
                sa.select(sessions)
                .join(refresh_tokens, refresh_tokens.c.session_id == sessions.c.session_id)
                .where(refresh_tokens.c.token_hash == refresh_token_hash(refresh_token))
            )
        ).one()


# --- registration


async def test_register_sign_in_get_me(gateway: Any) -> None:
    email = fresh_email()
    user = await register(gateway, email.upper(), "Ann")
    assert (user.email, user.display_name, list(user.roles), user.plan) == (email, "Ann", [], identity_pb2.PLAN_FREE)
    assert uuid.UUID(user.user_id).version == 7
    assert abs(user.create_time.ToSeconds() - time.time()) < 60
    session = await sign_in(gateway, email.title())
    assert session.user == user
    assert (await get_me(gateway, session.access_token)).user == user


async def test_the_access_token_says_who_and_for_how_long(gateway: Any) -> None:
    user = await register(gateway)
    session = await sign_in(gateway, user.email)
    claims: dict[str, Any] = jwt.decode(session.access_token, options={"verify_signature": False})
    assert jwt.get_unverified_header(session.access_token) == {"alg": "EdDSA", "kid": gateway.keys.key_id, "typ": "JWT"}
    assert set(claims) == {"iss", "aud", "sub", "sid", "iat", "exp", "jti", "roles", "plan"}
    assert (claims["iss"], claims["aud"], claims["sub"]) == ("https://genmesh.internal", "genmesh", user.user_id)
    assert (claims["roles"], claims["plan"]) == ([], "PLAN_FREE")
    assert claims["exp"] - claims["iat"] == 15 * 60
    assert session.expire_time.ToSeconds() == claims["exp"]


@pytest.mark.parametrize("form", [str, str.upper])
async def test_an_address_is_taken_once_in_any_case(gateway: Any, refused: Any, form: Any) -> None:
    email = fresh_email()
    await register(gateway, email)
    error = await refused(gateway.users.RegisterUser(identity_pb2.RegisterUserRequest(email=form(email), password="another password")))
    assert (error.code, error.reason) == (grpc.StatusCode.ALREADY_EXISTS, Reason.ERROR_REASON_EMAIL_TAKEN)
    await sign_in(gateway, email)  # and the password stays the first one's


async def test_of_many_registrations_at_once_one_wins(gateway: Any) -> None:
    email = fresh_email()
    requests = [identity_pb2.RegisterUserRequest(email=email, password=f"{PASSWORD} {number}") for number in range(8)]
    answers: list[Any] = await asyncio.gather(*map(gateway.users.RegisterUser, requests), return_exceptions=True)
    won = [number for number, answer in enumerate(answers) if isinstance(answer, identity_pb2.RegisterUserResponse)]
    assert len(won) == 1
    assert {answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)} == {grpc.StatusCode.ALREADY_EXISTS}
    await sign_in(gateway, email, f"{PASSWORD} {won[0]}")


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"email": "nobody"}, "email"),
        ({"email": "a\0b@example.org"}, "email"),
        ({"email": "x" * 250 + "@example.org"}, "email"),
        ({"password": "too short"}, "password"),
        ({"password": "x" * 257}, "password"),
        ({"display_name": "x" * 101}, "display_name"),
        ({"display_name": "a\0b"}, "display_name"),
    ],
)
async def test_what_registration_refuses(gateway: Any, refused: Any, values: dict[str, str], field: str) -> None:
    request = identity_pb2.RegisterUserRequest(**({"email": fresh_email(), "password": PASSWORD} | values))
    error = await refused(gateway.users.RegisterUser(request))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.ERROR_REASON_INVALID_ARGUMENT)
    assert error.message.startswith(f"{field}: ")


async def test_passwords_are_stored_as_argon2id_and_refresh_tokens_as_hashes(gateway: Any) -> None:
    user = await register(gateway)
    session = await sign_in(gateway, user.email)
    async with transaction(gateway.engine) as connection:
        stored = (await connection.execute(sa.select(passwords.c.hash).where(passwords.c.user_id == uuid.UUID(user.user_id)))).scalar_one()
        tokens = (await connection.execute(sa.select(refresh_tokens.c.token_hash))).scalars().all()
    assert stored.startswith("$argon2id$")
    assert refresh_token_hash(session.refresh_token) in tokens
    assert session.refresh_token.encode() not in tokens


# --- sign in


async def test_wrong_password_and_unknown_address_are_told_alike(gateway: Any, refused: Any) -> None:
    user = await register(gateway)
    wrong = await refused(sign_in(gateway, user.email, "wrong password"))
    unknown = await refused(sign_in(gateway, fresh_email(), "wrong password"))
    assert (wrong.code, wrong.reason) == (grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_BAD_CREDENTIALS)
    assert (unknown.code, unknown.reason, unknown.message) == (wrong.code, wrong.reason, wrong.message)


async def test_an_address_with_nul_is_invalid_not_internal(gateway: Any, refused: Any) -> None:
    error = await refused(sign_in(gateway, "a\0b"))
    assert (error.code, error.message) == (grpc.StatusCode.INVALID_ARGUMENT, "password.email: must not contain NUL")


async def test_a_disabled_account_is_told_to_its_owner_only(gateway: Any, refused: Any) -> None:
    user = await register(gateway)
    session = await sign_in(gateway, user.email)
    await disable(gateway, user)
    disabled = (grpc.StatusCode.PERMISSION_DENIED, Reason.ERROR_REASON_ACCOUNT_DISABLED)
    error = await refused(sign_in(gateway, user.email))
    assert (error.code, error.reason) == disabled
    error = await refused(get_me(gateway, session.access_token))
    assert (error.code, error.reason) == disabled
    assert (await refused(sign_in(gateway, user.email, "wrong password"))).reason == Reason.ERROR_REASON_BAD_CREDENTIALS
    assert (await refused(refresh(gateway, session.refresh_token))).reason == Reason.ERROR_REASON_REFRESH_TOKEN_INVALID
    assert (await session_of(gateway, session.refresh_token)).end_reason == "account_disabled"


async def test_new_parameters_take_effect_at_the_next_sign_in(gateway: Any, start_gateway: Any) -> None:
    user = await register(gateway)
    stronger = await start_gateway(password_hash_memory_kib=2048)

    async def stored() -> str:
        async with transaction(gateway.engine) as connection:
            query = sa.select(passwords.c.hash).where(passwords.c.user_id == uuid.UUID(user.user_id))
            return (await connection.execute(query)).scalar_one()

    assert "m=1024," in await stored()
    await sign_in(stronger, user.email)
    renewed = await stored()
    assert "m=2048," in renewed
    await sign_in(stronger, user.email)
    assert await stored() == renewed


# --- sessions


async def test_refreshing_changes_both_tokens(gateway: Any) -> None:
    user = await register(gateway)
    first = await sign_in(gateway, user.email)
    second = await refresh(gateway, first.refresh_token)
    third = await refresh(gateway, second.refresh_token)
    assert len({first.refresh_token, second.refresh_token, third.refresh_token}) == 3
    assert len({first.access_token, second.access_token, third.access_token}) == 3
    assert third.user == user
    assert (await get_me(gateway, third.access_token)).user == user


async def test_a_token_used_twice_ends_the_whole_session_and_no_other(gateway: Any, refused: Any) -> None:
    user = await register(gateway)
    other = await sign_in(gateway, user.email)
    first = await sign_in(gateway, user.email)
    second = await refresh(gateway, first.refresh_token)
    for token in (first.refresh_token, second.refresh_token, first.refresh_token):
        error = await refused(refresh(gateway, token))
        assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_REFRESH_TOKEN_INVALID)
    assert (await session_of(gateway, second.refresh_token)).end_reason == "token_reused"
    await refresh(gateway, other.refresh_token)


async def test_of_parallel_refreshes_with_one_token_exactly_one_wins(gateway: Any, refused: Any) -> None:
    user = await register(gateway)
    for parallel in (2, 8):
        first = await sign_in(gateway, user.email)
        answers: list[Any] = await asyncio.gather(*(refresh(gateway, first.refresh_token) for _ in range(parallel)), return_exceptions=True)
        won = [answer for answer in answers if isinstance(answer, identity_pb2.RefreshSessionResponse)]
        assert len(won) == 1
        # The others were a second use: the winner's token is gone too.
        assert (await refused(refresh(gateway, won[0].refresh_token))).reason == Reason.ERROR_REASON_REFRESH_TOKEN_INVALID
        assert (await session_of(gateway, first.refresh_token)).end_reason == "token_reused"


@pytest.mark.parametrize("token", ["x", "é\0", "x" * 512])
async def test_unknown_refresh_tokens(gateway: Any, refused: Any, token: str) -> None:
    error = await refused(refresh(gateway, token))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_REFRESH_TOKEN_INVALID)


@pytest.mark.parametrize("table", [refresh_tokens, sessions], ids=["token", "session"])
async def test_expired_tokens_and_sessions_are_refused_and_swept(gateway: Any, refused: Any, table: Any) -> None:
    user = await register(gateway)
    session = await sign_in(gateway, user.email)
    row = await session_of(gateway, session.refresh_token)
    async with transaction(gateway.engine) as connection:
        await connection.execute(
            table.update().where(table.c.session_id == row.session_id).values(expire_time=sa.func.now() - sa.text("interval '1 s'"))
        )
    assert (await refused(refresh(gateway, session.refresh_token))).reason == Reason.ERROR_REASON_REFRESH_TOKEN_INVALID
    async with transaction(gateway.engine) as connection:
        assert await store.delete_expired(connection, limit=10) == 1
        assert await store.lock_refresh_token(connection, refresh_token_hash(session.refresh_token)) is None


async def test_no_token_outlives_its_session(start_gateway: Any) -> None:
    short = await start_gateway(refresh_token_ttl_s=3600, session_ttl_s=60)
    user = await register(short)
    session = await sign_in(short, user.email)
    async with transaction(short.engine) as connection:
        query = sa.select(refresh_tokens.c.expire_time, sessions.c.expire_time).join(
            sessions, sessions.c.session_id == refresh_tokens.c.session_id
        )
        token_end, session_end = (
            await connection.execute(query.where(refresh_tokens.c.token_hash == refresh_token_hash(session.refresh_token)))
        ).one()
    assert token_end == session_end


async def test_signing_out_ends_the_session_and_may_be_repeated(gateway: Any, refused: Any) -> None:
    user = await register(gateway)
    first = await sign_in(gateway, user.email)
    second = await refresh(gateway, first.refresh_token)
    for token in (first.refresh_token, second.refresh_token, "unknown"):
        await gateway.users.SignOut(identity_pb2.SignOutRequest(refresh_token=token), metadata=bearer(second.access_token))
    assert (await refused(refresh(gateway, second.refresh_token))).reason == Reason.ERROR_REASON_REFRESH_TOKEN_INVALID
    assert (await session_of(gateway, second.refresh_token)).end_reason == "signed_out"


async def test_nobody_ends_another_users_session(gateway: Any) -> None:
    ann, eve = await register(gateway), await register(gateway)
    session, hers = await sign_in(gateway, ann.email), await sign_in(gateway, eve.email)
    await gateway.users.SignOut(identity_pb2.SignOutRequest(refresh_token=session.refresh_token), metadata=bearer(hers.access_token))
    await refresh(gateway, session.refresh_token)


# --- the caller


async def test_get_me_needs_a_token_of_this_gateway(gateway: Any, start_gateway: Any, refused: Any) -> None:
    user = await register(gateway)
    assert (await refused(gateway.users.GetMe(identity_pb2.GetMeRequest()))).reason == Reason.ERROR_REASON_TOKEN_MISSING
    stranger = await start_gateway()  # same database, other keys
    foreign = await sign_in(stranger, user.email)
    assert (await refused(get_me(gateway, foreign.access_token))).reason == Reason.ERROR_REASON_TOKEN_INVALID


# --- administrators


@pytest_asyncio.fixture(scope="module")
async def admin_token(gateway: Any) -> str:
    email = fresh_email()
    await gateway.accounts.ensure_admin(email=email, password=PASSWORD)
    return (await sign_in(gateway, email)).access_token


async def test_the_first_administrator_is_made_once_by_many_replicas(gateway: Any) -> None:
    email = fresh_email()
    await asyncio.gather(*(gateway.accounts.ensure_admin(email=email.upper(), password=PASSWORD) for _ in range(4)))
    await gateway.accounts.ensure_admin(email=email, password="another password")
    session = await sign_in(gateway, email)  # a later password changes nothing
    assert list(session.user.roles) == ["admin"]
    assert jwt.decode(session.access_token, options={"verify_signature": False})["roles"] == ["admin"]


async def test_a_registered_account_does_not_become_administrator(gateway: Any) -> None:
    user = await register(gateway)
    await gateway.accounts.ensure_admin(email=user.email, password="the operator's password")
    assert list((await sign_in(gateway, user.email)).user.roles) == []


async def test_only_administrators_list(gateway: Any, refused: Any) -> None:
    user = await register(gateway)
    session = await sign_in(gateway, user.email)
    error = await refused(gateway.admin.ListUsers(identity_pb2.ListUsersRequest(), metadata=bearer(session.access_token)))
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, Reason.ERROR_REASON_PERMISSION_DENIED)


async def test_pages_are_newest_first_and_whole(gateway: Any, admin_token: str) -> None:
    made = [await register(gateway) for _ in range(5)]
    listed: list[identity_pb2.User] = []
    token = ""
    while len(listed) < 5:
        page = await gateway.admin.ListUsers(identity_pb2.ListUsersRequest(page_size=2, page_token=token), metadata=bearer(admin_token))
        assert len(page.users) == 2
        listed += page.users
        token = page.next_page_token
        # An account made between two pages belongs before the first: it moves nothing.
        await register(gateway)
    assert listed[:5] == made[::-1]


async def test_the_last_page_has_no_token(gateway: Any, admin_token: str) -> None:
    seen: set[str] = set()
    token = ""
    while True:
        page = await gateway.admin.ListUsers(identity_pb2.ListUsersRequest(page_size=200, page_token=token), metadata=bearer(admin_token))
        assert seen.isdisjoint(user.user_id for user in page.users)
        seen |= {user.user_id for user in page.users}
        token = page.next_page_token
        if not token:
            break
    async with transaction(gateway.engine) as connection:
        assert len(seen) == (await connection.execute(sa.select(sa.func.count()).select_from(users))).scalar_one()


async def test_accounts_are_found_by_address_in_any_case(gateway: Any, admin_token: str) -> None:
    user = await register(gateway)
    found = await gateway.admin.ListUsers(identity_pb2.ListUsersRequest(email=user.email.upper()), metadata=bearer(admin_token))
    assert (list(found.users), found.next_page_token) == ([user], "")
    none = await gateway.admin.ListUsers(identity_pb2.ListUsersRequest(email=fresh_email()), metadata=bearer(admin_token))
    assert list(none.users) == []


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (identity_pb2.ListUsersRequest(page_size=-1), "page_size"),
        (identity_pb2.ListUsersRequest(page_token="made up"), "page_token"),
        (identity_pb2.ListUsersRequest(email="a\0b"), "email"),
    ],
)
async def test_what_listing_refuses(gateway: Any, admin_token: str, refused: Any, request_: Any, field: str) -> None:
    error = await refused(gateway.admin.ListUsers(request_, metadata=bearer(admin_token)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.message.startswith(f"{field}: ")
