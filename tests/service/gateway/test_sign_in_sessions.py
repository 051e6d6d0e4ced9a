"""Sessions: cookies for browsers, sign-out, and that access tokens end with their session."""

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any

import grpc
import jwt
import pytest
import sqlalchemy as sa

from gateway import store
from gateway.identity import refresh_token_hash
from gateway.revocations import revoke
from gateway.tables import audit_entries, audit_outcomes, refresh_tokens, revocations, sessions, users
from genmesh.identity.v1 import identity_pb2
from servicekit.database import transaction
from servicekit.errors import Reason

PASSWORD = "correct horse battery"
COOKIE = "__Host-genmesh_refresh"
INVALID = Reason.ERROR_REASON_REFRESH_TOKEN_INVALID
NOTHING = (grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_TOKEN_MISSING)


def bearer(session: Any) -> tuple[str, str]:
    return ("authorization", f"Bearer {session.access_token}")


def fresh_email() -> str:
    return f"ann-{uuid.uuid4().hex}@example.org"


async def register(gateway: Any) -> str:
    email = fresh_email()
    await gateway.users.RegisterUser(identity_pb2.RegisterUserRequest(email=email, password=PASSWORD))
    return email


def sign_in(gateway: Any, email: str, **fields: Any) -> Any:
    credential = identity_pb2.PasswordCredential(email=email, password=PASSWORD)
    return gateway.users.SignIn(identity_pb2.SignInRequest(password=credential, **fields))


def refresh(gateway: Any, token: str = "", *, cookie: str | None = None) -> Any:
    metadata = [("cookie", cookie)] if cookie is not None else None
    return gateway.users.RefreshSession(identity_pb2.RefreshSessionRequest(refresh_token=token), metadata=metadata)


def sign_out(gateway: Any, session: Any, token: str = "", *, cookie: str | None = None) -> Any:
    metadata = [bearer(session), *([("cookie", cookie)] if cookie is not None else [])]
    return gateway.users.SignOut(identity_pb2.SignOutRequest(refresh_token=token), metadata=metadata)


async def headers_of(call: Any) -> dict[str, str]:
    await call
    return {key: value for key, value in await call.initial_metadata() if isinstance(value, str)}


class Jar:
    """A browser's cookie, kept as the browser would."""

    def __init__(self) -> None:
        self.value = ""
        self.attributes: Mapping[str, str] = {}

    async def take(self, call: Any) -> Any:
        """The answer to a call, its cookie kept."""
        answer = await call
        set_cookies = [value for key, value in await call.initial_metadata() if key == "set-cookie"]
        for header in set_cookies:
            pair, *attributes = (part.strip() for part in header.split(";"))
            name, _, self.value = pair.partition("=")
            assert name == COOKIE
            self.attributes = {key: value for key, _, value in (attribute.partition("=") for attribute in attributes)}
        return answer

    @property
    def header(self) -> str:
        return f"theme=dark; {COOKIE}={self.value}; other=1"


async def session_row(gateway: Any, session: Any) -> Any:
    async with transaction(gateway.engine) as connection:
        query = sessions.select().where(sessions.c.session_id == uuid.UUID(sid(session)))
        return (await connection.execute(query)).one()


async def revoked(gateway: Any, subject_id: str) -> list[str]:
    """What was written down about a session or an account."""
    async with transaction(gateway.engine) as connection:
        return list(
            (await connection.execute(sa.select(revocations.c.kind).where(revocations.c.subject_id == uuid.UUID(subject_id)))).scalars()
        )


def sid(session: Any) -> str:
    return jwt.decode(session.access_token, options={"verify_signature": False})["sid"]


def get_me(gateway: Any, session: Any) -> Any:
    return gateway.users.GetMe(identity_pb2.GetMeRequest(), metadata=[bearer(session)])


async def assert_ended(gateway: Any, refused: Any, session: Any) -> None:
    """The session's tokens are refused as soon as the list of revocations has been read again."""
    assert await revoked(gateway, sid(session)) == ["session"]
    await gateway.deps.revocations.poll()
    error = await refused(get_me(gateway, session))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_TOKEN_REVOKED)


# --- cookies


async def test_a_browser_keeps_its_refresh_token_where_no_script_reads_it(gateway: Any, refused: Any) -> None:
    jar, email = Jar(), await register(gateway)
    first = await jar.take(sign_in(gateway, email, refresh_token_cookie=True))
    assert (first.refresh_token, len(jar.value) > 40) == ("", True)
    assert jar.attributes == {
        "Path": "/",
        "Max-Age": str(gateway.settings.refresh_token_ttl_s),
        "Secure": "",
        "HttpOnly": "",
        "SameSite": "Strict",
    }
    kept = jar.value
    second = await jar.take(refresh(gateway, cookie=jar.header))
    assert (second.refresh_token, second.user, kept != jar.value) == ("", first.user, True)
    await jar.take(sign_out(gateway, second, cookie=jar.header))
    assert (jar.value, jar.attributes["Max-Age"]) == ("", "0")
    await assert_ended(gateway, refused, second)


async def test_answers_with_tokens_are_not_for_caches_and_others_set_no_cookie(gateway: Any) -> None:
    email = await register(gateway)
    headers = await headers_of(sign_in(gateway, email))
    assert (headers["cache-control"], "set-cookie" in headers) == ("no-store", False)
    session = await sign_in(gateway, email)
    headers = await headers_of(refresh(gateway, session.refresh_token))
    assert (headers["cache-control"], "set-cookie" in headers) == ("no-store", False)


async def test_a_token_in_the_request_goes_before_the_cookie_which_stays_as_it_is(gateway: Any) -> None:
    jar, email = Jar(), await register(gateway)
    await jar.take(sign_in(gateway, email, refresh_token_cookie=True))
    own = await sign_in(gateway, email)
    kept = jar.value
    answer = await jar.take(refresh(gateway, own.refresh_token, cookie=jar.header))
    assert (answer.refresh_token != "", jar.value, sid(answer)) == (True, kept, sid(own))
    await jar.take(sign_out(gateway, answer, answer.refresh_token, cookie=jar.header))
    assert jar.value == kept
    await jar.take(refresh(gateway, cookie=jar.header))


@pytest.mark.parametrize(
    "cookie",
    [
        None,
        "",
        "theme=dark",
        f"{COOKIE}=",
        f"{COOKIE}=made-up",
        f"{COOKIE}={'x' * 600}",
        f"{COOKIE.lower()}=TOKEN",
        f"x{COOKIE}=TOKEN",
        "genmesh_refresh=TOKEN",
        f"{COOKIE}=TOKEN; {COOKIE}=another",  # whose is it?
        f"theme={COOKIE}=TOKEN",
    ],
)
async def test_cookies_that_are_none(gateway: Any, refused: Any, cookie: str | None) -> None:
    session = await sign_in(gateway, await register(gateway))
    call = refresh(gateway, cookie=cookie.replace("TOKEN", session.refresh_token) if cookie is not None else None)
    error = await refused(call)
    assert (error.code, error.reason) == ((grpc.StatusCode.UNAUTHENTICATED, INVALID) if "made-up" in (cookie or "") else NOTHING)
    # What cannot be used need not be sent again.
    dropped = [value for key, value in await call.initial_metadata() if key == "set-cookie"]
    assert [header.startswith(f"{COOKIE}=; Max-Age=0;") for header in dropped] == ([True] if "made-up" in (cookie or "") else [])
    await refresh(gateway, session.refresh_token)


async def test_an_api_key_leaves_no_cookie(gateway: Any) -> None:
    session = await sign_in(gateway, await register(gateway))
    scopes = [identity_pb2.API_KEY_SCOPE_READ]
    made = await gateway.users.CreateApiKey(identity_pb2.CreateApiKeyRequest(display_name="k", scopes=scopes), metadata=[bearer(session)])
    call = gateway.users.SignIn(identity_pb2.SignInRequest(api_key=made.secret, refresh_token_cookie=True))
    answer = await call
    assert (answer.refresh_token, answer.user) == ("", session.user)
    assert not [key for key, _ in await call.initial_metadata() if key == "set-cookie"]


@pytest.mark.parametrize("what", ["sign-in", "refresh"])
async def test_who_hangs_up_once_the_cookie_is_there_is_written_down(gateway: Any, what: str) -> None:
    jar, email = Jar(), await register(gateway)
    session = await jar.take(sign_in(gateway, email, refresh_token_cookie=True))
    method = "SignIn" if what == "sign-in" else "RefreshSession"
    before = await entries_of(gateway, session, method)
    call = sign_in(gateway, email, refresh_token_cookie=True) if what == "sign-in" else refresh(gateway, cookie=jar.header)
    assert "set-cookie" in dict(await call.initial_metadata())
    call.cancel()
    async with asyncio.timeout(20):
        while True:
            if await entries_of(gateway, session, method) > before:
                return
            await asyncio.sleep(0.02)


async def entries_of(gateway: Any, session: Any, method: str) -> int:
    """How often the audit trail says that an account did something."""
    actor, name = uuid.UUID(session.user.user_id), f"genmesh.identity.v1.IdentityService/{method}"
    async with transaction(gateway.engine) as connection:
        query = sa.select(sa.func.count()).where(audit_entries.c.actor_user_id == actor, audit_entries.c.method == name)
        return (await connection.execute(query)).scalar_one()


# --- signing out


async def test_signing_out_ends_the_session_of_the_access_token(gateway: Any, refused: Any) -> None:
    email = await register(gateway)
    session, other = await sign_in(gateway, email), await sign_in(gateway, email)
    await sign_out(gateway, session)
    await assert_ended(gateway, refused, session)
    assert (await refused(refresh(gateway, session.refresh_token))).reason == INVALID
    assert (await session_row(gateway, session)).end_reason == "signed_out"
    await get_me(gateway, other)
    await refresh(gateway, other.refresh_token)


async def test_signing_out_again_is_no_error_and_revokes_nothing_anew(gateway: Any) -> None:
    session = await sign_in(gateway, await register(gateway))
    for _ in range(3):
        await sign_out(gateway, session, session.refresh_token)
    assert await revoked(gateway, sid(session)) == ["session"]


async def test_every_access_token_of_the_session_ends(gateway: Any, refused: Any) -> None:
    first = await sign_in(gateway, await register(gateway))
    second = await refresh(gateway, first.refresh_token)
    assert sid(first) == sid(second)
    await sign_out(gateway, second)
    for session in (first, second):
        await assert_ended(gateway, refused, session)


async def test_a_cookie_of_somebody_else_does_not_keep_the_caller_signed_in(gateway: Any, refused: Any) -> None:
    ann, eve, jar = await sign_in(gateway, await register(gateway)), Jar(), Jar()
    theirs = await eve.take(sign_in(gateway, await register(gateway), refresh_token_cookie=True))
    jar.value = eve.value
    await jar.take(sign_out(gateway, ann, cookie=jar.header))
    assert jar.value == ""
    await assert_ended(gateway, refused, ann)
    await get_me(gateway, theirs)
    await refresh(gateway, cookie=eve.header)


async def test_nobody_signs_another_out(gateway: Any) -> None:
    ann, eve = await sign_in(gateway, await register(gateway)), await sign_in(gateway, await register(gateway))
    await sign_out(gateway, eve, ann.refresh_token)
    assert await revoked(gateway, sid(ann)) == []
    await gateway.accounts.sign_out_session(uuid.UUID(eve.user.user_id), uuid.UUID(sid(ann)))
    await refresh(gateway, ann.refresh_token)


# --- what else ends access tokens


async def test_a_refresh_token_used_twice_ends_access_tokens_too(gateway: Any, refused: Any) -> None:
    first = await sign_in(gateway, await register(gateway))
    second = await refresh(gateway, first.refresh_token)
    assert (await refused(refresh(gateway, first.refresh_token))).reason == INVALID
    for session in (first, second):
        await assert_ended(gateway, refused, session)


async def test_disabling_ends_sessions_even_while_one_is_being_refreshed(gateway: Any, refused: Any) -> None:
    admin_email = fresh_email()
    await gateway.accounts.ensure_admin(email=admin_email, password=PASSWORD)
    admin = await sign_in(gateway, admin_email)
    for _ in range(5):
        session = await sign_in(gateway, await register(gateway))
        request = identity_pb2.UpdateUserRequest(user_id=session.user.user_id, disabled=True)
        answers: list[Any] = await asyncio.gather(
            refresh(gateway, session.refresh_token), gateway.admin.UpdateUser(request, metadata=[bearer(admin)]), return_exceptions=True
        )
        assert isinstance(answers[1], identity_pb2.UpdateUserResponse)
        await gateway.deps.revocations.poll()
        alive = [session, *([answers[0]] if isinstance(answers[0], identity_pb2.RefreshSessionResponse) else [])]
        for one in alive:
            assert (await refused(get_me(gateway, one))).reason == Reason.ERROR_REASON_TOKEN_REVOKED
            if one.refresh_token:
                assert (await refused(refresh(gateway, one.refresh_token))).reason == INVALID


async def test_a_token_made_right_after_a_change_of_the_account_holds(gateway: Any, refused: Any) -> None:
    first = await sign_in(gateway, await register(gateway))
    async with transaction(gateway.engine) as connection:
        await revoke(connection, "user", uuid.UUID(first.user.user_id))
    second = await refresh(gateway, first.refresh_token)
    await gateway.deps.revocations.poll()
    assert (await refused(get_me(gateway, first))).reason == Reason.ERROR_REASON_TOKEN_REVOKED
    await get_me(gateway, second)


async def test_signing_out_right_after_a_change_of_the_account_ends_that_token_too(gateway: Any, refused: Any) -> None:
    email = await register(gateway)
    first = await sign_in(gateway, email)
    async with transaction(gateway.engine) as connection:
        await revoke(connection, "user", uuid.UUID(first.user.user_id))
    session = await sign_in(gateway, email)
    await sign_out(gateway, session)
    await assert_ended(gateway, refused, session)


async def test_two_changes_of_the_account_in_one_second_end_what_was_made_between(gateway: Any, refused: Any) -> None:
    email = await register(gateway)
    made: list[Any] = []
    for _ in range(2):
        made.append(await sign_in(gateway, email))
        async with transaction(gateway.engine) as connection:
            await revoke(connection, "user", uuid.UUID(made[0].user.user_id))
    await gateway.deps.revocations.poll()
    for session in made:
        assert (await refused(get_me(gateway, session))).reason == Reason.ERROR_REASON_TOKEN_REVOKED


async def test_a_new_token_says_what_is_true_when_it_is_made(gateway: Any) -> None:
    """A change of the account that is under way is waited for."""
    session = await sign_in(gateway, await register(gateway))
    user_id = uuid.UUID(session.user.user_id)
    async with transaction(gateway.engine) as connection:
        await store.lock_user(connection, user_id)
        waiting = asyncio.ensure_future(refresh(gateway, session.refresh_token))
        await lock_is_waited_for(gateway)
        await connection.execute(users.update().where(users.c.user_id == user_id).values(plan="PLAN_PRO"))
    assert (await waiting).user.plan == identity_pb2.PLAN_PRO


async def lock_is_waited_for(gateway: Any) -> None:
    query = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype IN ('transactionid', 'tuple')")
    async with asyncio.timeout(20):
        while True:
            async with transaction(gateway.engine) as connection:
                if (await connection.execute(query)).scalar_one():
                    return
            await asyncio.sleep(0.02)


def from_(address: str) -> list[tuple[str, str]]:
    return [("x-client-address", address)]


async def entries_from(gateway: Any, address: str) -> list[str]:
    """Reasons of what the audit trail says of an address, in no order."""
    async with transaction(gateway.engine) as connection:
        query = (
            sa.select(audit_outcomes.c.reason)
            .join(audit_entries, audit_entries.c.audit_entry_id == audit_outcomes.c.audit_entry_id)
            .where(audit_entries.c.client_address == address)
        )
        return list((await connection.execute(query)).scalars())


async def test_asking_whether_anybody_is_signed_in_is_neither_counted_nor_written_down(start_gateway: Any, refused: Any) -> None:
    gateway = await start_gateway(sign_in_client_failures_max=2)
    for _ in range(4):
        call = gateway.users.RefreshSession(identity_pb2.RefreshSessionRequest(), metadata=from_("203.0.113.40"))
        error = await refused(call)
        assert (error.code, error.reason) == NOTHING
    assert await entries_from(gateway, "203.0.113.40") == []
    call = gateway.users.RefreshSession(identity_pb2.RefreshSessionRequest(refresh_token="made up"), metadata=from_("203.0.113.40"))
    assert (await refused(call)).reason == INVALID


async def test_wrong_refresh_tokens_are_counted_and_stop_no_right_one(start_gateway: Any, refused: Any) -> None:
    gateway = await start_gateway(sign_in_client_failures_max=4)
    session = await sign_in(gateway, await register(gateway))

    def attempt(token: str) -> Any:
        return gateway.users.RefreshSession(identity_pb2.RefreshSessionRequest(refresh_token=token), metadata=from_("203.0.113.41"))

    for _ in range(4):
        assert (await refused(attempt("made up"))).reason == INVALID
    for _ in range(2):
        error = await refused(attempt("made up"))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED)
    second = await attempt(session.refresh_token)
    # That a copy ended a session is told, whatever was counted; once.
    assert (await refused(attempt(session.refresh_token))).reason == INVALID
    assert (await refused(attempt(session.refresh_token))).reason == Reason.ERROR_REASON_LIMIT_REACHED
    await assert_ended(gateway, refused, second)
    reasons = await entries_from(gateway, "203.0.113.41")
    assert sorted(reasons) == ["", *["ERROR_REASON_REFRESH_TOKEN_INVALID"] * 5]


async def test_refreshes_that_succeed_are_counted_by_account_and_client(start_gateway: Any, refused: Any) -> None:
    gateway = await start_gateway(sign_ins_max=3)
    email = await register(gateway)
    session, other = await sign_in(gateway, email), await sign_in(gateway, await register(gateway))
    for _ in range(2):
        session = await refresh(gateway, session.refresh_token)
    assert (await refused(refresh(gateway, session.refresh_token))).reason == Reason.ERROR_REASON_LIMIT_REACHED
    # It was not used up.
    async with transaction(gateway.engine) as connection:
        query = sa.select(refresh_tokens.c.use_time).where(refresh_tokens.c.token_hash == refresh_token_hash(session.refresh_token))
        assert (await connection.execute(query)).scalar_one() is None
    await refresh(gateway, other.refresh_token)
