"""Revocations: what is listed to the services of the mesh, that nothing is missed, and that the list does not grow for ever."""

import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa

from gateway import revocations as domain
from gateway import store
from gateway.revocations import KEEP, MARGINS, SETTLE, revoke
from gateway.tables import revocations
from genmesh.identity.v1 import identity_pb2 as pb
from genmesh.identity.v1 import identity_pb2_grpc
from servicekit.client import mesh_channel
from servicekit.database import transaction
from servicekit.errors import Reason
from servicekit.revocations import FORGET_AFTER_S, Kind, Revocations, remote_fetch
from tests.service.gateway.callers import admin, claims_of, get_me, person

KINDS: tuple[Kind, ...] = ("session", "api_key", "user")


@pytest_asyncio.fixture(scope="module")
async def jobs_channel(gateway: Any) -> AsyncIterator[grpc.aio.Channel]:
    async with mesh_channel(gateway.settings, f"127.0.0.1:{gateway.port}", caller="jobs_service", service="gateway") as channel:
        yield channel


@pytest.fixture(scope="module")
def service(jobs_channel: grpc.aio.Channel) -> Any:
    """RevocationService, as jobs_service calls it."""
    return identity_pb2_grpc.RevocationServiceStub(jobs_channel)


async def revoke_one(gateway: Any, kind: Kind = "user") -> uuid.UUID:
    subject_id = uuid.uuid4()
    async with transaction(gateway.engine) as connection:
        await revoke(connection, kind, subject_id)
    return subject_id


async def age(gateway: Any, by: timedelta) -> None:
    """Everything that is there now was written down that much earlier."""
    async with transaction(gateway.engine) as connection:
        await connection.execute(revocations.update().values(create_time=revocations.c.create_time - by))


def subject_of(revocation: pb.Revocation) -> uuid.UUID:
    which = revocation.WhichOneof("subject")
    assert which is not None
    return uuid.UUID(getattr(revocation, which))


async def listed(service: Any, cursor: str = "", page_size: int = 1000) -> tuple[list[uuid.UUID], str]:
    """All that is listed after a cursor, page by page, and the cursor after that."""
    found: list[uuid.UUID] = []
    more = True
    while more:
        page = await service.ListRevocations(pb.ListRevocationsRequest(cursor=cursor, page_size=page_size))
        assert len(page.revocations) <= page_size
        found += [subject_of(one) for one in page.revocations]
        cursor, more = page.cursor, page.more
    return found, cursor


@pytest.mark.parametrize("kind", KINDS)
async def test_a_revocation_says_whose_tokens_and_until_when(gateway: Any, service: Any, kind: Kind) -> None:
    subject_id = await revoke_one(gateway, kind)
    page = await service.ListRevocations(pb.ListRevocationsRequest(page_size=1000))
    [found] = [one for one in page.revocations if subject_of(one) == subject_id]
    assert found.WhichOneof("subject") == f"{kind}_id"
    async with transaction(gateway.engine) as connection:
        row = (await connection.execute(revocations.select().where(revocations.c.subject_id == subject_id))).one()
    assert found.revoke_time.nanos == 0
    assert found.revoke_time.ToSeconds() == int((row.create_time + MARGINS[kind]).timestamp())


async def test_what_was_revoked_since_is_listed_page_by_page(gateway: Any, service: Any) -> None:
    await revoke_one(gateway)
    await age(gateway, SETTLE)
    _, cursor = await listed(service)
    assert (await listed(service, cursor))[0] == []
    made = [await revoke_one(gateway) for _ in range(5)]
    assert (await listed(service, cursor, page_size=2))[0] == made
    # What is young is listed again, until it has settled.
    again, same = await listed(service, cursor)
    assert (again, same) == (made, cursor)
    await age(gateway, SETTLE)
    _, later = await listed(service, cursor)
    assert later != cursor
    assert (await listed(service, later))[0] == []


async def test_a_revocation_that_is_committed_late_is_not_missed(gateway: Any, service: Any) -> None:
    late = uuid.uuid4()
    async with transaction(gateway.engine) as connection:
        await revoke(connection, "user", late)
        early = await revoke_one(gateway)
        found, cursor = await listed(service)
        assert early in found
        assert late not in found
    assert late in (await listed(service, cursor))[0]


@pytest.mark.parametrize("cursor", ["x", "-1", "1.5", "9" * 19, "\u0663", " 1"])
async def test_cursors_that_are_none(service: Any, refused: Any, cursor: str) -> None:
    error = await refused(service.ListRevocations(pb.ListRevocationsRequest(cursor=cursor)))
    assert (error.code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, Reason.ERROR_REASON_INVALID_ARGUMENT)


async def test_a_page_has_50_unless_more_are_asked_for(gateway: Any, service: Any) -> None:
    for _ in range(51):
        await revoke_one(gateway)
    page = await service.ListRevocations(pb.ListRevocationsRequest())
    assert (len(page.revocations), page.more) == (50, True)
    page = await service.ListRevocations(pb.ListRevocationsRequest(page_size=2**31 - 1))
    assert len(page.revocations) > 50


@pytest.mark.parametrize("caller", ["envoy", "gateway"])
async def test_only_services_ask(gateway: Any, refused: Any, caller: str) -> None:
    boss = await admin(gateway)
    async with mesh_channel(gateway.settings, f"127.0.0.1:{gateway.port}", caller=caller, service="gateway") as channel:
        stub: Any = identity_pb2_grpc.RevocationServiceStub(channel)
        for metadata in ([], boss.metadata):
            error = await refused(stub.ListRevocations(pb.ListRevocationsRequest(), metadata=metadata))
            assert error.code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("where", ["gateway", "service"])
async def test_a_signed_out_session_stops_in_the_gateway_and_in_services(
    gateway: Any, jobs_channel: grpc.aio.Channel, refused: Any, where: str
) -> None:
    who = await person(gateway)
    own = where == "gateway"
    known = gateway.deps.revocations if own else Revocations(remote_fetch(jobs_channel))
    await known.poll()
    claims = claims_of(who.access_token)
    proof: Any = {"issue_time": claims["iat"], "session_id": claims["sid"], "api_key_id": None, "user_id": claims["sub"]}
    known.check(**proof)
    await gateway.users.SignOut(pb.SignOutRequest(), metadata=who.metadata)
    await known.poll()
    with pytest.raises(Exception, match="revoked"):
        known.check(**proof)
    if own:
        assert (await refused(get_me(gateway, who.access_token))).reason == Reason.ERROR_REASON_TOKEN_REVOKED


async def test_a_token_never_passes_for_newer_than_a_second_change(gateway: Any) -> None:
    user_id = uuid.uuid4()
    known = Revocations(domain.fetch_from(gateway.engine))
    for _ in range(3):  # all in one second
        async with transaction(gateway.engine) as connection:
            issue_time = await store.account_issue_time(connection, user_id)
        token: Any = {"issue_time": issue_time.timestamp(), "session_id": None, "api_key_id": None, "user_id": str(user_id)}
        await known.poll()
        known.check(**token)
        async with transaction(gateway.engine) as connection:
            await revoke(connection, "user", user_id)
        await known.poll()
        with pytest.raises(Exception, match="revoked"):
            known.check(**token)


async def test_old_revocations_are_swept(gateway: Any) -> None:
    assert KEEP.total_seconds() > FORGET_AFTER_S
    await revoke_one(gateway)
    await age(gateway, KEEP)
    young = await revoke_one(gateway)

    async def sweep(limit: int) -> int:
        async with transaction(gateway.engine) as connection:
            return await store.delete_old_revocations(connection, age=KEEP, limit=limit)

    assert await sweep(1) == 1  # bounded
    await sweep(10_000)
    async with transaction(gateway.engine) as connection:
        assert (await connection.execute(sa.select(revocations.c.subject_id))).scalars().all() == [young]
