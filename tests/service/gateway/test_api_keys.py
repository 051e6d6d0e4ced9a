"""API keys through the real server: made, shown once, listed, revoked, limited, and changed for access tokens."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa

from gateway import accounts, store
from gateway import api_keys as domain
from gateway.api_keys import secret_hash
from gateway.revocations import revoke
from gateway.tables import api_keys, revocations, users
from gateway.tokens import SigningKeys
from genmesh.credits.v1 import credits_pb2, credits_pb2_grpc
from genmesh.identity.v1 import identity_pb2
from servicekit.audit import AuditEntry
from servicekit.database import transaction
from servicekit.errors import Reason, permission_denied
from servicekit.identity import TokenVerifier, current_user_id
from servicekit.paging import encode_token
from servicekit.server import MeshServer
from servicekit.settings import ServerSettings
from tests.service.gateway.callers import Person, admin, bearer, claims_of, create_key, get_me, key_sign_in, person, revoke_key, update

FORM = re.compile(r"gmk_[0-9A-Za-z]{12}_[0-9A-Za-z]{43}")


def timestamp(time: datetime) -> Any:
    message = identity_pb2.ApiKey().expire_time
    message.FromDatetime(time)
    return message


async def change_row(gateway: Any, api_key_id: str, **values: Any) -> None:
    async with transaction(gateway.engine) as connection:
        await connection.execute(api_keys.update().where(api_keys.c.api_key_id == uuid.UUID(api_key_id)).values(**values))


async def row(gateway: Any, api_key_id: str) -> Any:
    async with transaction(gateway.engine) as connection:
        return (await connection.execute(api_keys.select().where(api_keys.c.api_key_id == uuid.UUID(api_key_id)))).one()


async def list_keys(gateway: Any, owner: Person, **page: Any) -> identity_pb2.ListApiKeysResponse:
    return await gateway.users.ListApiKeys(identity_pb2.ListApiKeysRequest(**page), metadata=owner.metadata)


async def disable(gateway: Any, owner: Person) -> None:
    async with transaction(gateway.engine) as connection:
        await connection.execute(users.update().where(users.c.user_id == owner.user_id).values(disabled_time=sa.func.now()))


# --- for owners


async def test_the_secret_is_shown_once_and_stored_as_a_hash(gateway: Any) -> None:
    owner = await person(gateway)
    expire_time = timestamp(datetime.now(UTC) + timedelta(days=1))
    made = await create_key(gateway, owner, "submit", "read", display_name="laptop", expire_time=expire_time)
    assert FORM.fullmatch(made.secret)
    key = made.api_key
    assert made.secret.startswith(key.prefix + "_")
    assert uuid.UUID(key.api_key_id).version == 7
    assert (key.display_name, key.expire_time) == ("laptop", expire_time)
    assert list(key.scopes) == [identity_pb2.API_KEY_SCOPE_SUBMIT, identity_pb2.API_KEY_SCOPE_READ]
    assert not key.HasField("last_use_time")
    assert not key.HasField("revoke_time")
    stored = await row(gateway, key.api_key_id)
    assert stored.key_hash == secret_hash(made.secret)
    assert made.secret.rpartition("_")[2] not in repr(tuple(stored))
    [listed] = (await list_keys(gateway, owner)).api_keys
    assert listed == key


async def test_keys_are_listed_newest_first_to_their_owner_only(gateway: Any, refused: Any) -> None:
    owner, other = await person(gateway), await person(gateway)
    made = [(await create_key(gateway, owner)).api_key for _ in range(5)]
    await create_key(gateway, other)
    found: list[identity_pb2.ApiKey] = []
    token = ""
    while True:
        page = await list_keys(gateway, owner, page_size=2, page_token=token)
        found += page.api_keys
        token = page.next_page_token
        if not token:
            break
        error = await refused(gateway.users.ListApiKeys(identity_pb2.ListApiKeysRequest(page_token=token), metadata=other.metadata))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert found == made[::-1]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"display_name": ""}, "display_name"),
        ({"display_name": "x" * 101}, "display_name"),
        ({"display_name": "a\0b"}, "display_name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": [identity_pb2.API_KEY_SCOPE_READ] * 2}, "scopes"),
        ({"scopes": [identity_pb2.API_KEY_SCOPE_UNSPECIFIED]}, "scopes[0]"),
        ({"scopes": [77]}, "scopes[0]"),
        ({"expire_time": timestamp(datetime(2020, 1, 1, tzinfo=UTC))}, "expire_time"),
        ({"expire_time": {"seconds": 2**60}}, "expire_time"),
        ({"daily_ceiling_millicredits": -1}, "daily_ceiling_millicredits"),
    ],
)
async def test_what_making_a_key_refuses(gateway: Any, refused: Any, values: dict[str, Any], field: str) -> None:
    owner = await person(gateway)
    error = await refused(create_key(gateway, owner, **values))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.message.startswith(f"{field}: ")
    assert not (await list_keys(gateway, owner)).api_keys


async def test_of_many_keys_made_at_once_only_so_many_work(gateway: Any, refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain, "WORKING_KEYS_MAX", 3)
    owner = await person(gateway)
    answers = await asyncio.gather(*(create_key(gateway, owner) for _ in range(8)), return_exceptions=True)
    made = [answer.api_key for answer in answers if isinstance(answer, identity_pb2.CreateApiKeyResponse)]
    assert len(made) == len((await list_keys(gateway, owner)).api_keys) == 3
    error = await refused(create_key(gateway, owner))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED)
    # What works no more takes no room.
    await revoke_key(gateway, owner, made[0].api_key_id)
    await create_key(gateway, owner)
    await change_row(gateway, made[1].api_key_id, expire_time=sa.func.now())
    await create_key(gateway, owner)
    await refused(create_key(gateway, owner))


async def test_forged_page_tokens_are_refused(gateway: Any, refused: Any) -> None:
    owner, boss = await person(gateway), await admin(gateway)
    for position in (b"x", b"x" * 15, b"x" * 17):
        of_keys = encode_token(position, domain.PAGES_OF + owner.user_id.bytes)
        of_users = encode_token(position, accounts.PAGES_OF)
        of_members = encode_token(position, accounts.PAGES_OF_MEMBERS)
        for call in (
            gateway.users.ListApiKeys(identity_pb2.ListApiKeysRequest(page_token=of_keys), metadata=owner.metadata),
            gateway.admin.ListUsers(identity_pb2.ListUsersRequest(page_token=of_users), metadata=boss.metadata),
            gateway.members.ListMembers(identity_pb2.ListMembersRequest(page_token=of_members)),
        ):
            error = await refused(call)
            assert (error.code, error.message.partition(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "page_token")


@pytest.mark.parametrize("change", [{"plan": "PLAN_PRO"}, {"disabled_time": sa.func.now()}], ids=["plan", "disabled"])
async def test_a_token_for_a_key_waits_for_a_change_of_the_account(gateway: Any, refused: Any, change: dict[str, Any]) -> None:
    owner = await person(gateway)
    made = await create_key(gateway, owner)
    async with transaction(gateway.engine) as connection:
        await store.lock_user(connection, owner.user_id)
        await connection.execute(users.update().where(users.c.user_id == owner.user_id).values(**change))
        await revoke(connection, "user", owner.user_id)
        waiting = asyncio.ensure_future(key_sign_in(gateway, made.secret))
        done, _ = await asyncio.wait([waiting, asyncio.ensure_future(lock_is_waited_for(gateway))], return_when=asyncio.FIRST_COMPLETED)
        assert waiting not in done
    if "disabled_time" in change:
        assert (await refused(waiting)).reason == Reason.ERROR_REASON_API_KEY_INVALID
    else:
        answer = await waiting
        assert answer.user.plan == identity_pb2.PLAN_PRO
        await gateway.deps.revocations.poll()
        await get_me(gateway, answer.access_token)


async def lock_is_waited_for(gateway: Any) -> None:
    query = sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype IN ('transactionid', 'tuple')")
    async with asyncio.timeout(20):
        while True:
            async with transaction(gateway.engine) as connection:
                if (await connection.execute(query)).scalar_one():
                    return
            await asyncio.sleep(0.02)


async def test_sign_ins_with_keys_are_counted_and_requests_with_them_are_not(start_gateway: Any, refused: Any) -> None:
    gateway = await start_gateway(sign_ins_max=3)
    made = await create_key(gateway, await person(gateway))
    for _ in range(2):  # the first was the owner's own
        await key_sign_in(gateway, made.secret)
    assert (await refused(key_sign_in(gateway, made.secret))).reason == Reason.ERROR_REASON_LIMIT_REACHED
    await gateway.deps.api_keys.check(made.secret, client_address="127.0.0.1")


async def test_revoking_ends_a_key_for_good(gateway: Any, refused: Any) -> None:
    owner = await person(gateway)
    made = await create_key(gateway, owner)
    token = (await key_sign_in(gateway, made.secret)).access_token
    revoked = await revoke_key(gateway, owner, made.api_key.api_key_id)
    assert abs(revoked.revoke_time.ToSeconds() - time.time()) < 60
    error = await refused(key_sign_in(gateway, made.secret))
    assert error.reason == Reason.ERROR_REASON_API_KEY_INVALID
    await gateway.deps.revocations.poll()
    error = await refused(get_me(gateway, token))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_API_KEY_INVALID)
    # Again: no error, nothing new.
    assert await revoke_key(gateway, owner, made.api_key.api_key_id) == revoked
    async with transaction(gateway.engine) as connection:
        about = revocations.c.subject_id == uuid.UUID(made.api_key.api_key_id)
        assert (await connection.execute(sa.select(sa.func.count()).where(about))).scalar_one() == 1
    await get_me(gateway, owner.access_token)  # the owner's own session goes on


async def test_keys_of_others_are_not_there(gateway: Any, refused: Any) -> None:
    owner, other = await person(gateway), await person(gateway)
    made = await create_key(gateway, owner)
    for api_key_id in (made.api_key.api_key_id, str(uuid.uuid4())):
        error = await refused(revoke_key(gateway, other, api_key_id))
        assert (error.code, error.message) == (grpc.StatusCode.NOT_FOUND, "API key not found")
    await key_sign_in(gateway, made.secret)


# --- for programs


async def test_a_key_is_changed_for_an_access_token(gateway: Any) -> None:
    owner = await person(gateway)
    made = await create_key(gateway, owner, "read", "submit")
    session = await key_sign_in(gateway, made.secret)
    assert (session.refresh_token, session.user) == ("", owner.user)
    claims = claims_of(session.access_token)
    assert set(claims) == {"iss", "aud", "sub", "iat", "exp", "jti", "roles", "plan", "api_key_id", "scopes"}
    assert (claims["sub"], claims["api_key_id"]) == (owner.user.user_id, made.api_key.api_key_id)
    assert (claims["scopes"], claims["roles"], claims["plan"]) == (["read", "submit"], [], "PLAN_FREE")
    assert claims["exp"] - claims["iat"] == gateway.settings.access_token_ttl_s
    assert session.expire_time.ToSeconds() == claims["exp"]
    assert (await get_me(gateway, session.access_token)).user == owner.user


async def test_a_key_does_only_what_its_scopes_say(gateway: Any, refused: Any) -> None:
    owner = await person(gateway)
    submit = (await key_sign_in(gateway, (await create_key(gateway, owner, "submit")).secret)).access_token
    error = await refused(get_me(gateway, submit))
    assert (error.code, error.reason, error.metadata) == (
        grpc.StatusCode.PERMISSION_DENIED,
        Reason.ERROR_REASON_SCOPE_MISSING,
        {"scope": "read"},
    )
    everything = await create_key(gateway, owner, "read", "submit", "admin")
    token = (await key_sign_in(gateway, everything.secret)).access_token
    # No key makes, lists or ends keys, nor is it told of its owner's identities elsewhere.
    for call, request in (
        (gateway.users.CreateApiKey, identity_pb2.CreateApiKeyRequest(display_name="x", scopes=[identity_pb2.API_KEY_SCOPE_READ])),
        (gateway.users.ListApiKeys, identity_pb2.ListApiKeysRequest()),
        (gateway.users.RevokeApiKey, identity_pb2.RevokeApiKeyRequest(api_key_id=everything.api_key.api_key_id)),
        (gateway.users.ListIdentities, identity_pb2.ListIdentitiesRequest()),
        (gateway.users.UnlinkIdentity, identity_pb2.UnlinkIdentityRequest(identity_id=str(uuid.uuid4()))),
    ):
        error = await refused(call(request, metadata=bearer(token)))
        assert (error.reason, error.metadata) == (Reason.ERROR_REASON_SCOPE_MISSING, {"scope": ""})
    # The scope admin is not the role.
    error = await refused(gateway.admin.ListUsers(identity_pb2.ListUsersRequest(), metadata=bearer(token)))
    assert error.reason == Reason.ERROR_REASON_PERMISSION_DENIED


async def test_roles_of_the_owner_come_with_the_scope_admin_only(gateway: Any, refused: Any) -> None:
    owner = await admin(gateway)
    plain = (await key_sign_in(gateway, (await create_key(gateway, owner, "read", "submit")).secret)).access_token
    assert claims_of(plain)["roles"] == []
    await refused(gateway.admin.ListUsers(identity_pb2.ListUsersRequest(), metadata=bearer(plain)))
    privileged = (await key_sign_in(gateway, (await create_key(gateway, owner, "admin")).secret)).access_token
    assert claims_of(privileged)["roles"] == ["admin"]
    await gateway.admin.ListUsers(identity_pb2.ListUsersRequest(), metadata=bearer(privileged))


async def test_no_token_outlives_its_key(gateway: Any) -> None:
    owner = await person(gateway)
    expire_time = datetime.now(UTC) + timedelta(seconds=90)
    made = await create_key(gateway, owner, expire_time=timestamp(expire_time))
    session = await key_sign_in(gateway, made.secret)
    assert claims_of(session.access_token)["exp"] == session.expire_time.ToSeconds() == int(expire_time.timestamp())


async def test_whatever_is_wrong_with_a_key_is_told_alike(gateway: Any, refused: Any) -> None:
    owner, gone = await person(gateway), await person(gateway)
    right, revoked, expired = [await create_key(gateway, owner) for _ in range(3)]
    of_disabled = await create_key(gateway, gone)
    await revoke_key(gateway, owner, revoked.api_key.api_key_id)
    await change_row(gateway, expired.api_key.api_key_id, expire_time=sa.func.now())
    await disable(gateway, gone)
    wrong = [
        right.api_key.prefix + "_" + "x" * 43,
        "gmk_" + "x" * 12 + right.secret[16:],
        right.secret[:-1],
        right.secret + "x",
        " " + right.secret,
        right.api_key.prefix,
        "gmk_\0",
        "é" * 60,
        revoked.secret,
        expired.secret,
        of_disabled.secret,
    ]
    errors = [await refused(key_sign_in(gateway, secret)) for secret in wrong]
    assert {(error.code, error.reason, error.message, str(error.metadata)) for error in errors} == {
        (grpc.StatusCode.UNAUTHENTICATED, Reason.ERROR_REASON_API_KEY_INVALID, "the API key is not valid", "{}")
    }
    await key_sign_in(gateway, right.secret)


async def test_last_use_is_told_to_the_minute(gateway: Any) -> None:
    owner = await person(gateway)
    made = await create_key(gateway, owner)
    await key_sign_in(gateway, made.secret)
    assert (await row(gateway, made.api_key.api_key_id)).last_use_time is None  # off the way of the call
    await gateway.deps.api_keys.note_uses()
    [listed] = (await list_keys(gateway, owner)).api_keys
    assert listed.last_use_time.ToSeconds() % 60 == 0
    assert abs(listed.last_use_time.ToSeconds() - time.time()) < 120
    # A use long ago is renewed, one noted in this minute is not written again.
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    await change_row(gateway, made.api_key.api_key_id, last_use_time=long_ago)
    await key_sign_in(gateway, made.secret)
    await gateway.deps.api_keys.note_uses()
    assert (await row(gateway, made.api_key.api_key_id)).last_use_time > long_ago
    await change_row(gateway, made.api_key.api_key_id, last_use_time=datetime(2999, 1, 1, tzinfo=UTC))
    await key_sign_in(gateway, made.secret)
    await gateway.deps.api_keys.note_uses()
    assert (await row(gateway, made.api_key.api_key_id)).last_use_time.year == 2999


async def test_a_changed_plan_is_in_the_next_token_which_works_at_once(gateway: Any) -> None:
    owner, boss = await person(gateway), await admin(gateway)
    made = await create_key(gateway, owner)
    await update(gateway, boss, owner.user_id, plan=identity_pb2.PLAN_PRO)
    await gateway.deps.revocations.poll()
    token = (await key_sign_in(gateway, made.secret)).access_token
    assert claims_of(token)["plan"] == "PLAN_PRO"
    assert (await get_me(gateway, token)).user.plan == identity_pb2.PLAN_PRO


async def test_guessing_is_slow_and_stops_no_right_key(start_gateway: Any, refused: Any) -> None:
    gateway = await start_gateway(sign_in_client_failures_max=3)
    owner = await person(gateway)
    made = await create_key(gateway, owner)
    guesser = [("x-client-address", "203.0.113.7")]
    for _ in range(3):
        error = await refused(key_sign_in(gateway, "gmk_guess", guesser))
        assert error.reason == Reason.ERROR_REASON_API_KEY_INVALID
    for secret in ("gmk_guess", made.secret[:-1] + ("a" if made.secret[-1] != "a" else "b")):
        error = await refused(key_sign_in(gateway, secret, guesser))
        assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED)
        assert error.retry_after_s is not None
    await key_sign_in(gateway, made.secret, guesser)


# --- ceilings


class CreditsStandIn(credits_pb2_grpc.CreditsServiceServicer):
    """credit_service as far as ceilings of keys go; its audit trail, too."""

    def __init__(self) -> None:
        self.calls: list[tuple[credits_pb2.SetKeyCeilingRequest, str]] = []
        """Requests, and in whose name they came."""
        self.begun: list[AuditEntry] = []
        self.refuse = False

    async def SetKeyCeiling(self, request: credits_pb2.SetKeyCeilingRequest, context: Any) -> credits_pb2.SetKeyCeilingResponse:  # noqa: N802
        self.calls.append((request, current_user_id()))
        if self.refuse:
            raise permission_denied("no")
        return credits_pb2.SetKeyCeilingResponse()

    async def begin(self, entry: AuditEntry) -> None:
        self.begun.append(entry)

    async def finish(self, entry: AuditEntry) -> None:
        pass


@dataclass(frozen=True)
class WithCredits:
    """A gateway whose credit_service is a stand-in."""

    gateway: Any
    credits: CreditsStandIn


@pytest_asyncio.fixture(scope="module")
async def with_credits(start_gateway: Any, certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[WithCredits]:
    directory = tmp_path_factory.mktemp("keys")
    settings = ServerSettings.model_validate({"certificates_dir": certificates, "drain_s": 0})
    verifier = TokenVerifier(SigningKeys.open(directory), issuer=settings.token_issuer, audience=settings.token_audience)
    stand_in = CreditsStandIn()  # pyright: ignore[reportAbstractUsage]  # its other methods are not called
    # As services answer: with typed refusals, to callers that they proved.
    server = MeshServer(settings, service="credit_service", verifier=verifier, checks={}, audit=stand_in)
    credits_pb2_grpc.add_CreditsServiceServicer_to_server(stand_in, server.grpc)
    async with server.running("genmesh.credits.v1.CreditsService"):
        gateway = await start_gateway(credits_address=f"127.0.0.1:{server.port}", signing_keys_dir=directory)
        yield WithCredits(gateway, stand_in)


async def test_ceilings_are_set_in_the_owners_name(with_credits: WithCredits) -> None:
    gateway, calls = with_credits.gateway, with_credits.credits.calls
    calls.clear()
    owner = await person(gateway)
    made = await create_key(gateway, owner, daily_ceiling_millicredits=0, monthly_ceiling_millicredits=5)
    [(request, user_id)] = calls
    assert request == credits_pb2.SetKeyCeilingRequest(api_key_id=made.api_key.api_key_id, daily_millicredits=0, monthly_millicredits=5)
    assert user_id == owner.user.user_id
    calls.clear()
    await create_key(gateway, owner, monthly_ceiling_millicredits=7)
    [(request, _)] = calls
    assert not request.HasField("daily_millicredits")
    calls.clear()
    await create_key(gateway, owner)
    assert calls == []


async def test_the_trail_tells_where_the_owner_called_from_when_a_ceiling_is_set(with_credits: WithCredits) -> None:
    owner = await person(with_credits.gateway)
    with_credits.credits.begun.clear()
    request_id = str(uuid.uuid4())
    metadata = [*owner.metadata, ("x-client-address", "203.0.113.9"), ("x-request-id", request_id)]
    request = identity_pb2.CreateApiKeyRequest(display_name="ci", scopes=[identity_pb2.API_KEY_SCOPE_READ], daily_ceiling_millicredits=1)
    made = await with_credits.gateway.users.CreateApiKey(request, metadata=metadata)
    [entry] = with_credits.credits.begun
    assert (entry.method, entry.subject) == ("genmesh.credits.v1.CreditsService/SetKeyCeiling", made.api_key.api_key_id)
    assert (entry.actor_user_id, entry.actor_service) == (owner.user.user_id, "")
    assert (entry.client_address, entry.request_id) == ("203.0.113.9", request_id)


async def test_without_its_ceiling_there_is_no_key(gateway: Any, with_credits: WithCredits, refused: Any) -> None:
    stand_in, bounded = with_credits.credits, with_credits.gateway
    owner = await person(bounded)
    stand_in.refuse = True
    try:
        error = await refused(create_key(bounded, owner, daily_ceiling_millicredits=1))
    finally:
        stand_in.refuse = False
    assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, Reason.ERROR_REASON_PERMISSION_DENIED)
    assert not (await list_keys(bounded, owner)).api_keys
    # Nobody listens where this one looks for credit_service.
    alone = await person(gateway)
    error = await refused(create_key(gateway, alone, daily_ceiling_millicredits=1))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    assert not (await list_keys(gateway, alone)).api_keys
