"""Keys, roles, revocation and the audit trail through the edge, on all three transports."""

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message

from genmesh.credits.v1 import credits_pb2
from genmesh.identity.v1 import identity_pb2
from genmesh.inference.v1 import inference_pb2
from genmesh.jobs.v1 import jobs_pb2
from tests.e2e.caller import (
    CREATE_API_KEY,
    CREATE_JOB,
    GET_BALANCE,
    GET_JOB,
    GET_ME,
    GET_QUEUE_STATS,
    GRANT_CREDITS,
    LIST_API_KEYS,
    LIST_AUDIT_ENTRIES,
    LIST_IDENTITIES,
    LIST_JOBS,
    LIST_MODELS,
    LIST_USERS,
    PASSWORD,
    REFRESH_SESSION,
    REVOKE_API_KEY,
    SET_KEY_CEILING,
    SIGN_IN,
    SIGN_OUT,
    UNLINK_IDENTITY,
    UPDATE_USER,
    WATCH_BALANCE,
    Edge,
    Method,
    Refusal,
    Transport,
    User,
    eventually,
    image,
    refused,
    submission,
)
from tests.e2e.conftest import PLENTY, NewUser, sign_in

Code = grpc.StatusCode
READ, SUBMIT, ADMIN = identity_pb2.API_KEY_SCOPE_READ, identity_pb2.API_KEY_SCOPE_SUBMIT, identity_pb2.API_KEY_SCOPE_ADMIN
Scope = identity_pb2.ApiKeyScope.ValueType
TRANSPORTS = list(Transport)


def verdict(refusal: Refusal) -> tuple[grpc.StatusCode, str]:
    return refusal.code, refusal.reason


async def with_key(user: User, *scopes: Scope, **values: Any) -> tuple[User, identity_pb2.ApiKey]:
    """A program that has a new key of the user."""
    made = await user.call(CREATE_API_KEY, identity_pb2.CreateApiKeyRequest(display_name="a test", scopes=scopes, **values))
    assert made.secret.startswith(made.api_key.prefix)
    return User(user.edge, user.user_id, user.email, "", api_key=made.secret), made.api_key


async def no_longer(call: Callable[[], Awaitable[object]]) -> Refusal:
    """Call again and again until it is refused: revocations reach services within a bound."""

    async def attempt() -> Refusal | None:
        try:
            await call()
        except Refusal as refusal:
            return refusal
        return None

    refusal = await eventually(attempt, lambda refusal: refusal is not None)
    assert refusal is not None
    return refusal


# --- API keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_key_reads_what_its_owner_reads(alice: User, transport: Transport) -> None:
    reader, _ = await with_key(alice, READ)
    assert (await reader.call(GET_ME, identity_pb2.GetMeRequest(), transport)).user.user_id == alice.user_id
    balance = await reader.call(GET_BALANCE, credits_pb2.GetBalanceRequest(), transport)
    assert balance.available_millicredits > 0
    assert (await reader.call(LIST_MODELS, inference_pb2.ListModelsRequest(), transport)).models
    await reader.call(LIST_JOBS, jobs_pb2.ListJobsRequest(), transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_key_does_only_what_its_scopes_say(alice: User, transport: Transport) -> None:
    reader, _ = await with_key(alice, READ)
    refusal = await refused(reader.call(CREATE_JOB, submission(), transport))
    assert (verdict(refusal), refusal.metadata) == ((Code.PERMISSION_DENIED, "SCOPE_MISSING"), {"scope": "submit"})
    submitter, key = await with_key(alice, SUBMIT)
    job = (await submitter.call(CREATE_JOB, submission(image(steps=1)), transport)).job
    refusal = await refused(submitter.call(GET_JOB, jobs_pb2.GetJobRequest(job_id=job.job_id), transport))
    assert (verdict(refusal), refusal.metadata) == ((Code.PERMISSION_DENIED, "SCOPE_MISSING"), {"scope": "read"})
    await alice.finished(job.job_id)
    # What belongs to people: their keys, ceilings, sessions, identities elsewhere.
    all_scopes, _ = await with_key(alice, READ, SUBMIT, ADMIN)
    people: list[tuple[Method[Any, Any], Message]] = [
        (CREATE_API_KEY, identity_pb2.CreateApiKeyRequest(display_name="another", scopes=[READ])),
        (LIST_API_KEYS, identity_pb2.ListApiKeysRequest()),
        (REVOKE_API_KEY, identity_pb2.RevokeApiKeyRequest(api_key_id=key.api_key_id)),
        (SET_KEY_CEILING, credits_pb2.SetKeyCeilingRequest(api_key_id=key.api_key_id, lift=True)),
        (SIGN_OUT, identity_pb2.SignOutRequest()),
        (LIST_IDENTITIES, identity_pb2.ListIdentitiesRequest()),
        (UNLINK_IDENTITY, identity_pb2.UnlinkIdentityRequest(identity_id=str(uuid.uuid4()))),
    ]
    for method, request in people:
        assert verdict(await refused(all_scopes.call(method, request, transport))) == (Code.PERMISSION_DENIED, "SCOPE_MISSING"), method.path


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_key_has_no_roles_that_its_owner_lacks(alice: User, admin: User, transport: Transport) -> None:
    pretender, _ = await with_key(alice, READ, ADMIN)
    assert verdict(await refused(pretender.call(LIST_USERS, identity_pb2.ListUsersRequest(), transport))) == (
        Code.PERMISSION_DENIED,
        "PERMISSION_DENIED",
    )
    reader, _ = await with_key(admin, READ)
    refusal = await refused(reader.call(LIST_USERS, identity_pb2.ListUsersRequest(), transport))
    assert (verdict(refusal), refusal.metadata) == ((Code.PERMISSION_DENIED, "SCOPE_MISSING"), {"scope": "admin"})
    administrator, _ = await with_key(admin, ADMIN)
    assert (await administrator.call(LIST_USERS, identity_pb2.ListUsersRequest(page_size=1), transport)).users


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_what_is_not_a_key_opens_nothing(edge: Edge, alice: User, transport: Transport) -> None:
    good, _ = await with_key(alice, READ)
    prefix, _, secret = good.api_key.rpartition("_")
    other, _ = await with_key(alice, READ)
    bad = ("", "x", prefix, f"{prefix}_", f"{prefix}_{secret[:-1]}", f"{prefix}_{secret}x", f"{prefix}_{other.api_key.rpartition('_')[2]}",
           good.api_key.swapcase(), "gmk_" + "0" * 12 + "_" + "0" * 43, "a" * 500)  # fmt: skip
    for key in bad:
        refusal = await refused(edge.call(GET_ME, identity_pb2.GetMeRequest(), transport=transport, headers={"x-api-key": key}))
        assert verdict(refusal) == (Code.UNAUTHENTICATED, "API_KEY_INVALID"), key
        assert refusal.http_status == (401 if transport is Transport.JSON else None)
    await good.call(GET_ME, identity_pb2.GetMeRequest(), transport)


async def test_a_key_and_a_token_together_are_refused(edge: Edge, alice: User) -> None:
    """Which of the two would count is nothing to guess about."""
    program, _ = await with_key(alice, READ)
    for transport in Transport:
        refusal = await refused(edge.call(GET_ME, identity_pb2.GetMeRequest(), alice.token, transport, {"x-api-key": program.api_key}))
        assert refusal.code in (Code.UNAUTHENTICATED, Code.INVALID_ARGUMENT)


async def test_a_key_signs_in(edge: Edge, alice: User) -> None:
    program, key = await with_key(alice, READ)
    for transport in Transport:
        session = await edge.call(SIGN_IN, identity_pb2.SignInRequest(api_key=program.api_key), transport=transport)
        assert (session.user.user_id, session.refresh_token) == (alice.user_id, "")
        assert (await edge.call(GET_ME, identity_pb2.GetMeRequest(), session.access_token, transport)).user.user_id == alice.user_id
        assert (await refused(edge.call(CREATE_JOB, submission(), session.access_token, transport))).reason == "SCOPE_MISSING"
        wrong = identity_pb2.SignInRequest(api_key=program.api_key + "x")
        assert verdict(await refused(edge.call(SIGN_IN, wrong, transport=transport))) == (Code.UNAUTHENTICATED, "API_KEY_INVALID")

    async def listed() -> identity_pb2.ApiKey:
        keys = (await alice.call(LIST_API_KEYS, identity_pb2.ListApiKeysRequest())).api_keys
        return next(one for one in keys if one.api_key_id == key.api_key_id)

    await eventually(listed, lambda one: one.HasField("last_use_time"))


async def test_a_key_ends_with_its_time(alice: User) -> None:
    expire_time = datetime.now(UTC) + timedelta(seconds=3)
    program, _ = await with_key(alice, READ, expire_time=expire_time)
    refusal = await no_longer(lambda: program.call(GET_ME, identity_pb2.GetMeRequest()))
    assert datetime.now(UTC) >= expire_time
    assert refusal.code is Code.UNAUTHENTICATED


async def test_keys_of_others_do_not_exist(alice: User, new_user: NewUser) -> None:
    program, key = await with_key(alice, READ)
    eve = await new_user(0)
    for transport in Transport:
        request = identity_pb2.RevokeApiKeyRequest(api_key_id=key.api_key_id)
        assert verdict(await refused(eve.call(REVOKE_API_KEY, request, transport))) == (Code.NOT_FOUND, "NOT_FOUND")
        assert list((await eve.call(LIST_API_KEYS, identity_pb2.ListApiKeysRequest(), transport)).api_keys) == []
    await program.call(GET_ME, identity_pb2.GetMeRequest())


async def test_a_key_spends_no_more_than_its_ceiling(alice: User) -> None:
    program, key = await with_key(alice, SUBMIT, daily_ceiling_millicredits=1)
    refusal = await refused(program.call(CREATE_JOB, submission()))
    assert verdict(refusal) == (Code.RESOURCE_EXHAUSTED, "CEILING_REACHED")
    assert refusal.metadata["api_key_id"] == key.api_key_id
    job = await alice.submit(image(steps=1))  # the ceiling is the key's, not its owner's
    await alice.finished(job.job_id)


async def test_secrets_are_shown_once_and_are_in_no_log(edge: Edge, alice: User) -> None:
    program, key = await with_key(alice, READ)
    for transport in Transport:
        await program.call(GET_ME, identity_pb2.GetMeRequest(), transport)
        shown = await alice.call(LIST_API_KEYS, identity_pb2.ListApiKeysRequest(), transport)
        assert key.api_key_id in {one.api_key_id for one in shown.api_keys}
        assert program.api_key not in str(shown)
    secret, token = program.api_key.rpartition("_")[2], alice.token.rpartition(".")[2]
    for log in (edge.stack.state.path / "logs").iterdir():
        text = log.read_text(errors="replace")
        assert secret not in text, log.name
        assert token not in text, log.name
        assert PASSWORD not in text, log.name


# --- revocation ------------------------------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def mallory(new_user: NewUser) -> User:
    """Somebody whose account is about to change."""
    return await new_user(PLENTY)


Streams = Callable[[User], list[asyncio.Task[Refusal]]]


@pytest_asyncio.fixture
async def streams() -> AsyncGenerator[Callable[[User], Awaitable[list[asyncio.Task[Refusal]]]]]:
    """Opens streams of a user that only a refusal ends, and waits until each has said something."""
    tasks: list[asyncio.Task[Refusal]] = []

    async def follow(stream: AsyncGenerator[Any], begun: asyncio.Event) -> Refusal:
        async def drain() -> None:
            async with aclosing(stream) as messages:
                async for _ in messages:
                    begun.set()

        return await refused(drain())

    async def start(user: User) -> list[asyncio.Task[Refusal]]:
        begun = [asyncio.Event(), asyncio.Event()]
        started = [
            asyncio.create_task(follow(user.watch(), begun[0])),
            asyncio.create_task(follow(user.stream(WATCH_BALANCE, credits_pb2.WatchBalanceRequest()), begun[1])),
        ]
        tasks.extend(started)
        for one in begun:
            await one.wait()
        return started

    yield start
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_signing_out_ends_tokens_and_streams(edge: Edge, mallory: User, streams: Any) -> None:
    other = await sign_in(edge, mallory.email, PASSWORD)
    watching = await streams(mallory)
    every_service: list[Method[Any, Any]] = [GET_ME, GET_BALANCE, LIST_JOBS, LIST_MODELS]
    await mallory.call(SIGN_OUT, identity_pb2.SignOutRequest())
    for transport in Transport:
        for method in every_service:
            request = method.request()
            refusal = await no_longer(lambda m=method, r=request, t=transport: mallory.call(m, r, t))
            assert verdict(refusal) == (Code.UNAUTHENTICATED, "TOKEN_REVOKED"), method.path
    for stream in watching:
        assert verdict(await stream) == (Code.UNAUTHENTICATED, "TOKEN_REVOKED")
    refresh = identity_pb2.RefreshSessionRequest(refresh_token=mallory.refresh_token)
    assert verdict(await refused(edge.call(REFRESH_SESSION, refresh))) == (Code.UNAUTHENTICATED, "REFRESH_TOKEN_INVALID")
    await other.call(GET_ME, identity_pb2.GetMeRequest())  # another session of theirs goes on
    await other.balance()


async def test_a_revoked_key_ends_with_its_streams(alice: User, streams: Any) -> None:
    program, key = await with_key(alice, READ)
    watching = await streams(program)
    revoked = await alice.call(REVOKE_API_KEY, identity_pb2.RevokeApiKeyRequest(api_key_id=key.api_key_id))
    assert revoked.api_key.HasField("revoke_time")
    await alice.call(REVOKE_API_KEY, identity_pb2.RevokeApiKeyRequest(api_key_id=key.api_key_id))
    for transport in Transport:
        refusal = await no_longer(lambda t=transport: program.call(GET_ME, identity_pb2.GetMeRequest(), t))
        assert verdict(refusal) == (Code.UNAUTHENTICATED, "API_KEY_INVALID")
    for stream in watching:
        assert verdict(await stream) == (Code.UNAUTHENTICATED, "API_KEY_INVALID")


async def test_a_disabled_account_is_shut_everywhere(edge: Edge, admin: User, mallory: User, streams: Any) -> None:
    program, _ = await with_key(mallory, READ)
    watching = [*await streams(mallory), *await streams(program)]
    changed = await admin.call(UPDATE_USER, identity_pb2.UpdateUserRequest(user_id=mallory.user_id, disabled=True))
    assert changed.user.disabled
    credential = identity_pb2.PasswordCredential(email=mallory.email, password=PASSWORD)
    for transport in Transport:
        assert (await no_longer(lambda t=transport: mallory.call(LIST_JOBS, jobs_pb2.ListJobsRequest(), t))).reason == "TOKEN_REVOKED"
        assert (await no_longer(lambda t=transport: program.call(LIST_JOBS, jobs_pb2.ListJobsRequest(), t))).code is Code.UNAUTHENTICATED
        refusal = await refused(edge.call(SIGN_IN, identity_pb2.SignInRequest(password=credential), transport=transport))
        assert verdict(refusal) == (Code.PERMISSION_DENIED, "ACCOUNT_DISABLED")
    for stream in watching:
        assert verdict(await stream) == (Code.UNAUTHENTICATED, "TOKEN_REVOKED")
    refresh = identity_pb2.RefreshSessionRequest(refresh_token=mallory.refresh_token)
    assert (await refused(edge.call(REFRESH_SESSION, refresh))).code is Code.UNAUTHENTICATED
    # Back again: old tokens stay dead, new ones work at once.
    await admin.call(UPDATE_USER, identity_pb2.UpdateUserRequest(user_id=mallory.user_id, disabled=False))

    async def back() -> User | None:
        """Tokens of the second in which the account was disabled do not hold."""
        again = await sign_in(edge, mallory.email, PASSWORD)
        try:
            await again.balance()
        except Refusal:
            return None
        return again

    assert await eventually(back, lambda again: again is not None)


async def test_roles_come_and_go(edge: Edge, admin: User, mallory: User) -> None:
    with_roles = lambda *roles: identity_pb2.UpdateUserRequest(user_id=mallory.user_id, roles=identity_pb2.Roles(roles=roles))  # noqa: E731
    changed = await admin.call(UPDATE_USER, with_roles("operator"))
    assert list(changed.user.roles) == ["operator"]

    async def renewed() -> User | None:
        again = await sign_in(edge, mallory.email, PASSWORD)
        try:
            await again.call(GET_QUEUE_STATS, jobs_pb2.GetQueueStatsRequest())
        except Refusal as refusal:
            if refusal.reason != "TOKEN_REVOKED":  # a token of the very second of the change
                raise
            return None
        return again

    operator = await eventually(renewed, lambda again: again is not None)
    assert operator is not None
    grant = credits_pb2.GrantCreditsRequest(request_id=str(uuid.uuid4()), user_id=mallory.user_id, amount_millicredits=1, reason="me")
    above: list[tuple[Method[Any, Any], Message]] = [
        (GRANT_CREDITS, grant),
        (LIST_USERS, identity_pb2.ListUsersRequest()),
        (UPDATE_USER, with_roles("admin")),
    ]
    for transport in Transport:
        await operator.call(GET_QUEUE_STATS, jobs_pb2.GetQueueStatsRequest(), transport)
        for method, request in above:
            assert verdict(await refused(operator.call(method, request, transport))) == (Code.PERMISSION_DENIED, "PERMISSION_DENIED")
    await admin.call(UPDATE_USER, with_roles())
    for transport in Transport:
        refusal = await no_longer(lambda t=transport: operator.call(GET_QUEUE_STATS, jobs_pb2.GetQueueStatsRequest(), t))
        assert verdict(refusal) == (Code.UNAUTHENTICATED, "TOKEN_REVOKED")
    # The session was not ended: its next token says what is true now.
    session = await edge.call(REFRESH_SESSION, identity_pb2.RefreshSessionRequest(refresh_token=operator.refresh_token))
    plain = dataclasses.replace(operator, token=session.access_token)

    async def denied() -> Refusal:
        return await refused(plain.call(GET_QUEUE_STATS, jobs_pb2.GetQueueStatsRequest()))

    assert (await denied()).code in (Code.PERMISSION_DENIED, Code.UNAUTHENTICATED)


async def test_somebody_has_to_be_left_who_administers(admin: User) -> None:
    for change in ({"roles": identity_pb2.Roles()}, {"disabled": True}):
        request = identity_pb2.UpdateUserRequest(user_id=admin.user_id, **change)  # pyright: ignore[reportArgumentType]
        for transport in Transport:
            assert verdict(await refused(admin.call(UPDATE_USER, request, transport))) == (Code.FAILED_PRECONDITION, "LAST_ADMIN")
    assert (await admin.call(GET_ME, identity_pb2.GetMeRequest())).user.roles == ["admin"]


# --- the audit trail -------------------------------------------------------------------------------------------------


async def trail(admin: User, **filters: Any) -> list[identity_pb2.AuditEntry]:
    """Entries, newest first, over all pages."""
    found: list[identity_pb2.AuditEntry] = []
    request = identity_pb2.ListAuditEntriesRequest(page_size=3, **filters)
    while True:
        page = await admin.call(LIST_AUDIT_ENTRIES, request)
        found += page.audit_entries
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def test_who_did_what_to_whom_from_where(edge: Edge, admin: User, new_user: NewUser) -> None:
    user = await new_user(0)
    request_id = str(uuid.uuid4())
    grant = credits_pb2.GrantCreditsRequest(request_id=request_id, user_id=user.user_id, amount_millicredits=5, reason="for the trail")
    await admin.call(GRANT_CREDITS, grant)
    refusal = await refused(admin.call(GRANT_CREDITS, credits_pb2.GrantCreditsRequest(
        request_id=request_id, user_id=user.user_id, amount_millicredits=6, reason="for the trail")))  # fmt: skip
    assert refusal.reason == "REQUEST_ID_REUSED"
    await admin.call(UPDATE_USER, identity_pb2.UpdateUserRequest(user_id=user.user_id, plan=identity_pb2.PLAN_PRO))
    entries = await trail(admin, subject=user.user_id, actor_user_id=admin.user_id)
    assert [entry.method.rpartition("/")[2] for entry in entries] == ["UpdateUser", "GrantCredits", "GrantCredits"]
    assert [(entry.code, entry.reason.removeprefix("ERROR_REASON_")) for entry in entries] == [(0, ""), (6, "REQUEST_ID_REUSED"), (0, "")]
    assert {entry.client_address for entry in entries} == {"127.0.0.1"}
    assert [entry.reporter for entry in entries] == ["gateway", "credit_service", "credit_service"]
    assert len({entry.request_id for entry in entries} - {""}) == 3
    assert entries[2].act_time.ToDatetime() <= entries[0].act_time.ToDatetime()
    only = await trail(admin, subject=user.user_id, method="genmesh.identity.v1.IdentityAdminService/UpdateUser")
    assert [entry.audit_entry_id for entry in only] == [entries[0].audit_entry_id]
    # Reading the trail is an act too.
    [latest] = (await admin.call(LIST_AUDIT_ENTRIES, identity_pb2.ListAuditEntriesRequest(page_size=1))).audit_entries
    assert latest.method.endswith("/ListAuditEntries")
    assert latest.actor_user_id == admin.user_id


async def test_acts_of_people_on_their_own_accounts_are_there(edge: Edge, admin: User, new_user: NewUser) -> None:
    user = await new_user(0)
    program, key = await with_key(user, READ, daily_ceiling_millicredits=1)
    await user.call(REVOKE_API_KEY, identity_pb2.RevokeApiKeyRequest(api_key_id=key.api_key_id))
    of_key = await trail(admin, subject=key.api_key_id)
    # The making began first, and had the ceiling set; the key had no id before that.
    assert [entry.method.rpartition("/")[2] for entry in of_key] == ["RevokeApiKey", "SetKeyCeiling", "CreateApiKey"]
    assert [entry.reporter for entry in of_key] == ["gateway", "credit_service", "gateway"]
    assert {(entry.actor_user_id, entry.code, entry.HasField("code")) for entry in of_key} == {(user.user_id, 0, True)}
    credential = identity_pb2.PasswordCredential(email=user.email, password="not the password")
    await refused(edge.call(SIGN_IN, identity_pb2.SignInRequest(password=credential)))
    await user.call(SIGN_OUT, identity_pb2.SignOutRequest())
    mine = await trail(admin, actor_user_id=user.user_id)
    acts = [(entry.method.rpartition("/")[2], entry.code) for entry in mine]
    for act in (("SignIn", 0), ("CreateApiKey", 0), ("RevokeApiKey", 0), ("SignOut", 0)):
        assert act in acts, acts
    whole = await trail(admin, subject=user.user_id)
    assert ("SignIn", Code.UNAUTHENTICATED.value[0]) in [(entry.method.rpartition("/")[2], entry.code) for entry in whole]
    for entry in [*mine, *whole]:
        assert PASSWORD not in str(entry)
        assert program.api_key not in str(entry)
        assert "not the password" not in str(entry)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_the_trail_is_for_administrators(edge: Edge, alice: User, transport: Transport) -> None:
    request = identity_pb2.ListAuditEntriesRequest()
    assert (await refused(edge.call(LIST_AUDIT_ENTRIES, request, transport=transport))).code is Code.UNAUTHENTICATED
    assert verdict(await refused(alice.call(LIST_AUDIT_ENTRIES, request, transport))) == (Code.PERMISSION_DENIED, "PERMISSION_DENIED")
