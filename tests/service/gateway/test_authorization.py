"""Envoy's question about requests with an API key: answered with an access token in the key's place, or refused."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa

from ext_authz import external_auth_pb2 as pb
from ext_authz import external_auth_pb2_grpc
from gateway import authorization
from gateway.authorization import CACHE_S, KeyTokens
from gateway.tables import api_keys, users
from genmesh.identity.v1 import identity_pb2
from servicekit.client import mesh_channel
from servicekit.database import transaction
from servicekit.errors import MeshError, Reason, unavailable
from servicekit.identity import TokenVerifier
from tests.service.gateway.callers import admin, bearer, claims_of, create_key, get_me, person, revoke_key, update

OVERWRITE = pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


def question(address: str = "203.0.113.1", **headers: str) -> pb.CheckRequest:
    request = pb.CheckRequest()
    request.attributes.source.address.socket_address.address = address
    http = request.attributes.request.http
    http.method, http.path = "GET", "/v1/me"
    for name, value in headers.items():
        http.headers[name.replace("_", "-")] = value
    return request


@pytest_asyncio.fixture(scope="module")
async def check(gateway: Any) -> AsyncIterator[Any]:
    """The call, as Envoy makes it."""
    async with mesh_channel(gateway.settings, f"127.0.0.1:{gateway.port}", caller="envoy", service="gateway") as channel:
        yield external_auth_pb2_grpc.AuthorizationStub(channel).Check


def token_in(answer: pb.CheckResponse) -> str:
    assert answer.status.code == 0
    assert list(answer.ok_response.headers_to_remove) == ["x-api-key"]
    [option] = answer.ok_response.headers
    assert (option.header.key, option.append_action) == ("authorization", OVERWRITE)
    scheme, _, token = option.header.value.partition(" ")
    assert scheme == "Bearer"
    return token


def refusal_in(answer: pb.CheckResponse) -> tuple[int, int, str]:
    """HTTP status, google.rpc.Code, body."""
    assert answer.WhichOneof("http_response") == "denied_response"
    assert not answer.denied_response.headers
    return answer.denied_response.status.code, answer.status.code, answer.denied_response.body


INVALID = (401, 16, "the API key is not valid")


async def test_a_request_goes_on_with_an_access_token_in_the_keys_place(gateway: Any, check: Any) -> None:
    owner = await person(gateway)
    made = await create_key(gateway, owner, "read", "submit")
    token = token_in(await check(question(x_api_key=made.secret)))
    claims = claims_of(token)
    assert (claims["sub"], claims["api_key_id"], claims["scopes"]) == (
        owner.user.user_id,
        made.api_key.api_key_id,
        ["read", "submit"],
    )
    assert (await get_me(gateway, token)).user == owner.user


async def test_a_key_and_a_token_are_too_much(gateway: Any, check: Any) -> None:
    owner = await person(gateway)
    made = await create_key(gateway, owner)
    answer = await check(question(x_api_key=made.secret, authorization=f"Bearer {owner.access_token}"))
    status, code, body = refusal_in(answer)
    assert (status, code) == (400, 3)
    assert body == "x-api-key: send an API key or an access token, not both"


async def test_whatever_is_wrong_is_told_alike(gateway: Any, check: Any) -> None:
    owner, gone = await person(gateway), await person(gateway)
    right, revoked, of_disabled = await create_key(gateway, owner), await create_key(gateway, owner), await create_key(gateway, gone)
    await revoke_key(gateway, owner, revoked.api_key.api_key_id)
    async with transaction(gateway.engine) as connection:
        await connection.execute(users.update().where(users.c.user_id == gone.user_id).values(disabled_time=sa.func.now()))
    unknown = "gmk_" + "0" * 12 + right.secret[16:]
    wrong = ["", "x", right.secret[:-1], right.secret[:-1] + "!", right.api_key.prefix + "_" + "0" * 43, unknown,
             f"{right.secret},{right.secret}", revoked.secret, of_disabled.secret]  # fmt: skip
    answers = [await check(question(x_api_key=secret)) for secret in wrong]
    assert {refusal_in(answer) for answer in answers} == {INVALID}
    assert len({answer.SerializeToString() for answer in answers}) == 1
    assert refusal_in(await check(question())) == INVALID


async def test_a_token_is_handed_out_again_until_its_key_is_revoked(gateway: Any, check: Any) -> None:
    owner = await person(gateway)
    made = await create_key(gateway, owner)
    request = question(x_api_key=made.secret)
    tokens = {token_in(answer) for answer in await asyncio.gather(*(check(request) for _ in range(8)))}
    assert len(tokens) == 1
    assert token_in(await check(request)) in tokens
    await revoke_key(gateway, owner, made.api_key.api_key_id)
    await gateway.deps.revocations.poll()
    assert refusal_in(await check(request)) == INVALID


async def test_a_changed_account_gets_a_new_token_at_once(gateway: Any, check: Any, refused: Any) -> None:
    owner, boss = await person(gateway), await admin(gateway)
    made = await create_key(gateway, owner)
    request = question(x_api_key=made.secret)
    before = token_in(await check(request))
    await update(gateway, boss, owner.user_id, plan=identity_pb2.PLAN_PRO)
    await gateway.deps.revocations.poll()
    after = token_in(await check(request))
    assert claims_of(after)["plan"] == "PLAN_PRO"
    assert (await refused(get_me(gateway, before))).reason == Reason.ERROR_REASON_TOKEN_REVOKED
    await get_me(gateway, after)
    assert token_in(await check(request)) == after  # and is remembered
    await update(gateway, boss, owner.user_id, disabled=True)
    await gateway.deps.revocations.poll()
    assert refusal_in(await check(request)) == INVALID


async def test_an_address_that_guesses_is_stopped_but_for_right_keys(start_gateway: Any) -> None:
    gateway = await start_gateway(sign_in_client_failures_max=3)
    owner = await person(gateway)
    known, unknown, revoked = [await create_key(gateway, owner) for _ in range(3)]
    await revoke_key(gateway, owner, revoked.api_key.api_key_id)
    async with mesh_channel(gateway.settings, f"127.0.0.1:{gateway.port}", caller="envoy", service="gateway") as channel:
        check: Any = external_auth_pb2_grpc.AuthorizationStub(channel).Check
        token = token_in(await check(question(x_api_key=known.secret)))
        for _ in range(3):
            assert refusal_in(await check(question(x_api_key="gmk_guess"))) == INVALID
        for secret in ("gmk_guess", unknown.secret[:-1] + "!", revoked.secret):
            status, code, _ = refusal_in(await check(question(x_api_key=secret)))
            assert (status, code) == (429, 8)
        assert token_in(await check(question(x_api_key=known.secret))) == token
        token_in(await check(question(x_api_key=unknown.secret)))
        assert refusal_in(await check(question("203.0.113.2", x_api_key="gmk_guess"))) == INVALID
        # Behind a load balancer the address is the one that Envoy trusts.
        assert refusal_in(await check(question("203.0.113.2", x_api_key="gmk_guess", x_client_address="203.0.113.1")))[0] == 429


async def test_without_the_database_nobody_gets_in(start_gateway: Any) -> None:
    lost = await start_gateway(database_url="postgresql+asyncpg://nobody:x@127.0.0.1:1/none")
    async with mesh_channel(lost.settings, f"127.0.0.1:{lost.port}", caller="envoy", service="gateway") as channel:
        check: Any = external_auth_pb2_grpc.AuthorizationStub(channel).Check
        answer = await check(question(x_api_key=f"gmk_{'a' * 12}_{'b' * 43}"))
    assert refusal_in(answer)[:2] == (503, 14)


@pytest.mark.parametrize("caller", ["jobs_service", "credit_service", "gateway"])
async def test_only_envoy_asks(gateway: Any, refused: Any, caller: str) -> None:
    owner = await person(gateway)
    async with mesh_channel(gateway.settings, f"127.0.0.1:{gateway.port}", caller=caller, service="gateway") as channel:
        check: Any = external_auth_pb2_grpc.AuthorizationStub(channel).Check
        for metadata in ([], bearer(owner.access_token)):
            error = await refused(check(question(x_api_key="x"), metadata=metadata))
            assert error.code is grpc.StatusCode.PERMISSION_DENIED


# --- what is remembered


class Remembered:
    """KeyTokens with a clock of its own, and how often it asked."""

    def __init__(self, gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.asked: list[str] = []
        self.error: Exception | None = None
        prove = gateway.deps.api_keys.prove

        async def counted(secret: str) -> Any:
            self.asked.append(secret)
            await asyncio.sleep(0)  # others come in meanwhile
            if self.error is not None:
                raise self.error
            return await prove(secret)

        monkeypatch.setattr(gateway.deps.api_keys, "prove", counted)
        settings = gateway.settings
        verifier = TokenVerifier(
            gateway.keys, issuer=settings.token_issuer, audience=settings.token_audience, revocations=gateway.deps.revocations
        )
        self._key_tokens = KeyTokens(gateway.deps.api_keys, verifier, clock=lambda: self.now)

    async def get(self, secret: str) -> str:
        return await self._key_tokens.get(secret, client_address="203.0.113.3")


@pytest.fixture
def remembered(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> Remembered:
    return Remembered(gateway, monkeypatch)


async def test_a_key_is_looked_up_anew_after_a_while(gateway: Any, remembered: Remembered) -> None:
    made = await create_key(gateway, await person(gateway))
    first = await remembered.get(made.secret)
    remembered.now += CACHE_S - 0.001
    assert await remembered.get(made.secret) == first
    assert len(remembered.asked) == 1
    remembered.now += 0.001
    assert await remembered.get(made.secret) != first
    assert len(remembered.asked) == 2


async def test_a_key_that_ended_meanwhile_is_forgotten(gateway: Any, remembered: Remembered) -> None:
    made = await create_key(gateway, await person(gateway))
    await remembered.get(made.secret)
    async with transaction(gateway.engine) as connection:
        await connection.execute(api_keys.update().where(api_keys.c.prefix == made.api_key.prefix).values(expire_time=sa.func.now()))
    remembered.now += CACHE_S
    for _ in range(2):
        with pytest.raises(MeshError):
            await remembered.get(made.secret)
    assert len(remembered.asked) == 3


async def test_an_outage_shuts_the_door_and_forgets_nobody(gateway: Any, remembered: Remembered) -> None:
    made = await create_key(gateway, await person(gateway))
    await remembered.get(made.secret)
    remembered.now += CACHE_S
    remembered.error = unavailable("away")
    with pytest.raises(type(remembered.error)) as caught:
        await remembered.get(made.secret)
    assert caught.value.code is grpc.StatusCode.UNAVAILABLE
    remembered.error = None
    assert await remembered.get(made.secret)


async def test_many_at_once_ask_once(gateway: Any, remembered: Remembered) -> None:
    made = await create_key(gateway, await person(gateway))
    assert len(set(await asyncio.gather(*(remembered.get(made.secret) for _ in range(50))))) == 1
    assert len(remembered.asked) == 1


async def test_one_who_hangs_up_does_not_take_the_answer_from_others(gateway: Any, remembered: Remembered) -> None:
    made = await create_key(gateway, await person(gateway))
    asking = [asyncio.create_task(remembered.get(made.secret)) for _ in range(3)]
    await asyncio.sleep(0)
    asking[0].cancel()
    assert len(set(await asyncio.gather(*asking[1:]))) == 1
    assert asking[0].cancelled()
    assert len(remembered.asked) == 1


async def test_so_many_keys_are_remembered_and_no_more(gateway: Any, remembered: Remembered, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authorization, "CACHED_KEYS_MAX", 2)
    owner = await person(gateway)
    first, second, third = [(await create_key(gateway, owner)).secret for _ in range(3)]
    for secret in (first, second, first, third, first):
        await remembered.get(secret)
    assert remembered.asked == [first, second, third]
    await remembered.get(second)  # the one that went longest unused had to go
    assert remembered.asked == [first, second, third, second]
