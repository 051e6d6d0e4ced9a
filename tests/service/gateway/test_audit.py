"""The audit trail: acts leave entries, which administrators list and nobody changes."""

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from gateway import app, audit, store
from genmesh.identity.v1 import identity_pb2 as pb
from genmesh.identity.v1 import identity_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2
from genmesh.options.v1 import options_pb2
from servicekit import paging
from servicekit.audit import Recorder, RemoteTrail, about
from servicekit.client import mesh_channel
from servicekit.database import migrate, transaction
from servicekit.errors import Reason
from servicekit.identity import Principal, set_principal
from servicekit.settings import DatabaseSettings
from tests.service.gateway.callers import (
    PASSWORD,
    Person,
    admin,
    bearer,
    create_key,
    fresh_email,
    key_sign_in,
    person,
    revoke_key,
    sign_in,
    update,
)

IDENTITY = "genmesh.identity.v1.IdentityService"
ADMIN = "genmesh.identity.v1.IdentityAdminService"
UPDATE_USER = f"{ADMIN}/UpdateUser"
REQUEUE = "genmesh.jobs.v1.JobsAdminService/RequeueDeadLetter"
SERVED = {
    "jobs_service": REQUEUE,
    "credit_service": "genmesh.credits.v1.LedgerAdminService/GrantCredits",
    "inference_service": "genmesh.inference.v1.InferenceService/Generate",
}
"""A method of each service that reports acts."""

Reporting = Callable[[str], AbstractAsyncContextManager[Any]]


@pytest_asyncio.fixture(scope="module")
async def boss(gateway: Any) -> Person:
    return await admin(gateway)


@pytest.fixture(scope="module")
def reporting(gateway: Any) -> Reporting:
    """AuditService, as a service calls it."""

    @asynccontextmanager
    async def calling(caller: str) -> AsyncGenerator[Any]:
        async with mesh_channel(gateway.settings, f"127.0.0.1:{gateway.port}", caller=caller, service="gateway") as channel:
            yield identity_pb2_grpc.AuditServiceStub(channel)

    return calling


@pytest_asyncio.fixture(scope="module")
async def trail(reporting: Reporting) -> AsyncIterator[Any]:
    """AuditService, as jobs_service calls it."""
    async with reporting("jobs_service") as stub:
        yield stub


async def entries(gateway: Any, boss: Person, **selection: Any) -> list[pb.AuditEntry]:
    """All pages of entries, newest first."""
    found: list[pb.AuditEntry] = []
    token = ""
    while True:
        request = pb.ListAuditEntriesRequest(page_token=token, **selection)
        page = await gateway.admin.ListAuditEntries(request, metadata=boss.metadata)
        found += page.audit_entries
        token = page.next_page_token
        if not token:
            return found


def begin(trail: Any, **values: Any) -> Any:
    values.setdefault("method", REQUEUE)
    return trail.BeginAuditEntry(pb.BeginAuditEntryRequest(entry=pb.AuditEntry(**values)))


def finish(trail: Any, audit_entry_id: str, **values: Any) -> Any:
    return trail.FinishAuditEntry(pb.FinishAuditEntryRequest(audit_entry_id=audit_entry_id, **values))


def fresh_id() -> str:
    return str(uuid.uuid4())


# --- what the gateway itself writes down


async def test_an_act_leaves_who_what_whom_from_where_and_how_it_ended(gateway: Any, boss: Person) -> None:
    who = await person(gateway)
    request = pb.UpdateUserRequest(user_id=who.user.user_id, roles=pb.Roles(roles=["operator"]), plan=pb.PLAN_PRO)
    request_id = fresh_id()
    metadata = [*boss.metadata, ("x-client-address", "203.0.113.9"), ("x-request-id", request_id)]
    await gateway.admin.UpdateUser(request, metadata=metadata)
    [entry] = await entries(gateway, boss, subject=who.user.user_id, method=UPDATE_USER)
    assert uuid.UUID(entry.audit_entry_id).version == 7
    assert abs(entry.act_time.ToDatetime(UTC) - datetime.now(UTC)) < timedelta(minutes=1)
    assert (entry.actor_user_id, entry.actor_api_key_id, entry.actor_service) == (boss.user.user_id, "", "")
    assert (entry.method, entry.subject) == (UPDATE_USER, who.user.user_id)
    assert (entry.client_address, entry.request_id) == ("203.0.113.9", request_id)
    assert (entry.HasField("code"), entry.code, entry.reason) == (True, 0, "")
    assert dict(entry.details) == {"roles_before": "", "roles": "operator", "plan_before": "PLAN_FREE", "plan": "PLAN_PRO"}


async def test_refusals_are_written_down_too(gateway: Any, boss: Person, refused: Any) -> None:
    nobody = fresh_id()
    await refused(update(gateway, boss, nobody, disabled=True))
    [entry] = await entries(gateway, boss, subject=nobody)
    assert (entry.code, entry.reason) == (grpc.StatusCode.NOT_FOUND.value[0], "ERROR_REASON_NOT_FOUND")


async def test_keys_leave_entries_without_secrets(gateway: Any, boss: Person, refused: Any) -> None:
    who = await person(gateway)
    made = await create_key(gateway, who, "read", "admin")
    await key_sign_in(gateway, made.secret)
    await refused(key_sign_in(gateway, made.secret[:-1] + "!"))
    await revoke_key(gateway, who, made.api_key.api_key_id)
    found = await entries(gateway, boss, subject=made.api_key.api_key_id)
    assert [entry.method for entry in found] == [f"{IDENTITY}/{name}" for name in ("RevokeApiKey", "SignIn", "CreateApiKey")]
    assert {entry.actor_user_id for entry in found} == {who.user.user_id}
    assert {(entry.subject, entry.reporter) for entry in found} == {(made.api_key.api_key_id, "gateway")}
    assert dict(found[-1].details) == {"prefix": made.api_key.prefix, "scopes": "read,admin"}
    assert found[-1:] == await entries(gateway, boss, actor_user_id=who.user.user_id, method=f"{IDENTITY}/CreateApiKey")
    assert made.secret.rpartition("_")[2] not in repr(await entries(gateway, boss))


async def test_an_act_with_a_key_says_which(gateway: Any, boss: Person) -> None:
    made = await create_key(gateway, boss, "admin")
    token = (await key_sign_in(gateway, made.secret)).access_token
    await gateway.admin.ListUsers(pb.ListUsersRequest(page_size=1), metadata=bearer(token))
    entry = (await entries(gateway, boss, actor_user_id=boss.user.user_id, method="genmesh.identity.v1.IdentityAdminService/ListUsers"))[0]
    assert (entry.actor_user_id, entry.actor_api_key_id) == (boss.user.user_id, made.api_key.api_key_id)


async def test_a_failed_sign_in_is_written_down_without_an_actor(gateway: Any, boss: Person, refused: Any) -> None:
    who = await person(gateway)
    wrong = pb.PasswordCredential(email=who.user.email, password="wrong password")
    await refused(gateway.users.SignIn(pb.SignInRequest(password=wrong)))
    entry = (await entries(gateway, boss, subject=who.user.user_id, method=f"{IDENTITY}/SignIn"))[0]
    assert (entry.actor_user_id, entry.code, entry.reason) == ("", 16, "ERROR_REASON_BAD_CREDENTIALS")


# --- what other services send


async def test_a_service_begins_and_finishes_an_entry(gateway: Any, boss: Person, trail: Any) -> None:
    entry = {
        "audit_entry_id": fresh_id(),
        "actor_user_id": fresh_id(),
        "actor_api_key_id": fresh_id(),
        "method": REQUEUE,
        "subject": fresh_id(),
        "client_address": "203.0.113.4",
        "request_id": "r-1",
        "details": {"a": "1", "b": "2"},
    }
    await begin(trail, **entry)
    [begun] = await entries(gateway, boss, subject=entry["subject"])
    assert not begun.HasField("code")
    assert {name: getattr(begun, name) for name in entry if name != "details"} | {"details": dict(begun.details)} == entry
    assert begun.reporter == "jobs_service"
    await begin(trail, **entry | {"subject": "something else", "reporter": "gateway"})  # sent again: changes nothing
    await finish(trail, begun.audit_entry_id, code=9, reason="ERROR_REASON_JOB_TERMINAL", details={"b": "3", "c": "4"})
    await finish(trail, begun.audit_entry_id, code=0)  # the first outcome stays
    [finished] = await entries(gateway, boss, subject=entry["subject"])
    assert (finished.code, finished.reason, dict(finished.details)) == (9, "ERROR_REASON_JOB_TERMINAL", {"a": "1", "b": "3", "c": "4"})
    assert (finished.act_time, finished.reporter) == (begun.act_time, "jobs_service")


async def test_what_an_act_was_done_to_may_become_known_while_it_happens(gateway: Any, boss: Person, trail: Any) -> None:
    late, begun = fresh_id(), fresh_id()
    await begin(trail, audit_entry_id=begun)
    await finish(trail, begun, subject=late)
    await finish(trail, begun, subject=(other := fresh_id()))  # the first outcome stays
    [entry] = await entries(gateway, boss, subject=late)
    assert (entry.audit_entry_id, entry.subject, entry.HasField("code")) == (begun, late, True)
    assert await entries(gateway, boss, subject=other) == []
    # What was said before the act is not rewritten after it.
    named, second = fresh_id(), fresh_id()
    await begin(trail, audit_entry_id=second, subject=named)
    await finish(trail, second, subject=other)
    [entry] = await entries(gateway, boss, subject=named)
    assert (entry.audit_entry_id, entry.subject, entry.HasField("code")) == (second, named, True)
    assert await entries(gateway, boss, subject=other) == []


async def test_an_act_of_a_service_says_what_became_known_and_who_wrote_it_down(gateway: Any, boss: Person) -> None:
    late = fresh_id()
    async with mesh_channel(gateway.settings, f"127.0.0.1:{gateway.port}", caller="jobs_service", service="gateway") as channel:
        recorder = Recorder(RemoteTrail(channel))
        set_principal(Principal(user_id=boss.user.user_id))
        async with recorder.around(f"/{REQUEUE}", jobs_pb2.ListJobsRequest(), options_pb2.ACCESS_ADMIN):
            about(subject=late, amount="1")
            about(subject=fresh_id())
        request = jobs_pb2.RequeueDeadLetterRequest(job_id=(job_id := fresh_id()))
        async with recorder.around(f"/{REQUEUE}", request, options_pb2.ACCESS_ADMIN):
            about(subject=late)
    [entry] = await entries(gateway, boss, subject=late)
    assert (entry.subject, entry.reporter, dict(entry.details), entry.HasField("code")) == (late, "jobs_service", {"amount": "1"}, True)
    [entry] = await entries(gateway, boss, subject=job_id)
    assert (entry.subject, entry.HasField("code")) == (job_id, True)


async def test_who_signed_out_is_found_by_their_account(gateway: Any, boss: Person) -> None:
    who = await person(gateway)
    await gateway.users.SignOut(pb.SignOutRequest(), metadata=who.metadata)
    [entry] = await entries(gateway, boss, subject=who.user.user_id, method=f"{IDENTITY}/SignOut")
    assert (entry.actor_user_id, entry.details["ended"]) == (who.user.user_id, "signed_out")


async def test_an_entry_can_come_with_its_outcome(gateway: Any, boss: Person, trail: Any) -> None:
    subject = fresh_id()
    # Who reports it is not theirs to say.
    await begin(trail, audit_entry_id=fresh_id(), actor_service="jobs_service", subject=subject, code=0, reason="", reporter="gateway")
    [entry] = await entries(gateway, boss, subject=subject)
    assert (entry.HasField("code"), entry.code, entry.actor_service, entry.reporter) == (True, 0, "jobs_service", "jobs_service")


async def test_what_cannot_be_stored_is_cut_and_not_refused(gateway: Any, boss: Person, trail: Any) -> None:
    subject = fresh_id()
    details = {f"{number:03}": "x" * 5000 for number in range(100)} | {"00\0": "\0"}
    many = "x" * 5000
    entry_id = fresh_id()
    long = {"actor_service": many, "client_address": many, "request_id": many}
    await begin(trail, audit_entry_id=entry_id, subject=subject + "\0" + many, method=REQUEUE + many, details=details, **long)
    await finish(trail, entry_id, details={number * 100: many for number in "abcdefghi"} | {many: ""})
    [entry] = [one for one in await entries(gateway, boss, method=(REQUEUE + many)[:256]) if one.audit_entry_id == entry_id]
    lengths = [len(text) for text in (entry.method, entry.subject, entry.request_id, entry.client_address, entry.actor_service)]
    assert lengths == [256, 256, 128, 64, 64]
    assert entry.subject.startswith(subject + "x")
    assert len(entry.details) == 32 + 10
    assert {len(name) for name in entry.details} == {2, 3, 64}
    assert {len(value) for value in entry.details.values()} == {0, 512}


async def test_what_is_no_entry(trail: Any, refused: Any) -> None:
    assert (await refused(begin(trail, audit_entry_id="x"))).code is grpc.StatusCode.INVALID_ARGUMENT
    assert (await refused(begin(trail, audit_entry_id=fresh_id(), actor_user_id="x"))).code is grpc.StatusCode.INVALID_ARGUMENT
    assert (await refused(finish(trail, "x"))).code is grpc.StatusCode.INVALID_ARGUMENT
    assert (await refused(finish(trail, fresh_id()))).code is grpc.StatusCode.NOT_FOUND
    begun = fresh_id()
    await begin(trail, audit_entry_id=begun)
    for code in (-1, 17):
        assert (await refused(finish(trail, begun, code=code))).code is grpc.StatusCode.INVALID_ARGUMENT
        assert (await refused(begin(trail, audit_entry_id=fresh_id(), code=code))).code is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_act_whose_caller_hung_up_is_told_from_one_that_goes_on(gateway: Any, boss: Person, trail: Any) -> None:
    begun, subject = fresh_id(), fresh_id()
    await begin(trail, audit_entry_id=begun, subject=subject)
    await finish(trail, begun, code=grpc.StatusCode.CANCELLED.value[0])
    [entry] = await entries(gateway, boss, subject=subject)
    assert (entry.HasField("code"), entry.code) == (True, 1)


@pytest.mark.parametrize("caller", SERVED)
async def test_a_service_reports_only_what_it_serves(gateway: Any, boss: Person, reporting: Reporting, refused: Any, caller: str) -> None:
    subject = fresh_id()
    others = [method for service, method in SERVED.items() if service != caller]
    async with reporting(caller) as stub:
        for method in (*others, UPDATE_USER, f"{IDENTITY}/SignIn", "", SERVED[caller].replace(".v1.", ".v1x.")):
            error = await refused(begin(stub, audit_entry_id=fresh_id(), method=method, subject=subject, actor_user_id=boss.user.user_id))
            assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, Reason.ERROR_REASON_PERMISSION_DENIED)
        assert await entries(gateway, boss, subject=subject) == []
        await begin(stub, audit_entry_id=fresh_id(), method=SERVED[caller], subject=subject)
    [entry] = await entries(gateway, boss, subject=subject)
    assert entry.reporter == caller


async def test_an_entry_is_ended_by_who_began_it(gateway: Any, boss: Person, trail: Any, reporting: Reporting, refused: Any) -> None:
    begun, subject = fresh_id(), fresh_id()
    await begin(trail, audit_entry_id=begun, subject=subject)
    who = await person(gateway)
    await update(gateway, boss, who.user_id, plan=pb.PLAN_PRO)
    [own] = await entries(gateway, boss, subject=who.user.user_id, method=UPDATE_USER)
    async with transaction(gateway.engine) as connection:  # an act of the gateway's own that goes on
        going_on = uuid.uuid4()
        copied = "audit_entry_id, actor_service, method, subject, client_address, request_id, details, reporter"
        query = (
            f"INSERT INTO audit_entries ({copied}) SELECT :new, {copied.partition(', ')[2]} FROM audit_entries WHERE audit_entry_id = :id"
        )
        await connection.execute(sa.text(query).bindparams(new=going_on, id=uuid.UUID(own.audit_entry_id)))
    async with reporting("credit_service") as stub:
        for theirs in (begun, str(going_on)):
            assert (await refused(finish(stub, theirs, code=0))).code is grpc.StatusCode.NOT_FOUND
            # Nor by beginning it once more, with an outcome; who finds their id taken must not act unrecorded.
            forged = begin(stub, audit_entry_id=theirs, method=SERVED["credit_service"], code=0)
            assert (await refused(forged)).code is grpc.StatusCode.PERMISSION_DENIED
    assert [entry.HasField("code") for entry in await entries(gateway, boss, subject=subject)] == [False]
    assert [entry.HasField("code") for entry in await entries(gateway, boss, subject=who.user.user_id, method=UPDATE_USER)] == [False, True]
    await finish(trail, begun, code=9)
    assert [entry.code for entry in await entries(gateway, boss, subject=subject)] == [9]


@pytest.mark.parametrize("caller", ["envoy", "gateway"])
async def test_only_services_write(gateway: Any, boss: Person, refused: Any, caller: str) -> None:
    async with mesh_channel(gateway.settings, f"127.0.0.1:{gateway.port}", caller=caller, service="gateway") as channel:
        stub: Any = identity_pb2_grpc.AuditServiceStub(channel)
        for metadata in ([], boss.metadata):
            request = pb.BeginAuditEntryRequest(entry=pb.AuditEntry(audit_entry_id=fresh_id()))
            error = await refused(stub.BeginAuditEntry(request, metadata=metadata))
            assert error.code is grpc.StatusCode.PERMISSION_DENIED


# --- listing


async def test_entries_are_selected_and_paged(gateway: Any, boss: Person, trail: Any, refused: Any) -> None:
    actor, subject, method = fresh_id(), fresh_id(), f"genmesh.jobs.v1.Test/{fresh_id()}"
    made: list[str] = []
    for number in range(7):
        made.append(fresh_id())
        await begin(trail, audit_entry_id=made[-1], actor_user_id=actor, subject=subject if number % 2 else "x", method=method)
    everything = await entries(gateway, boss, actor_user_id=actor, page_size=2)
    assert [entry.audit_entry_id for entry in everything] == made[::-1]
    times = [entry.act_time.ToNanoseconds() for entry in everything]
    assert times == sorted(times, reverse=True)
    assert [entry.audit_entry_id for entry in await entries(gateway, boss, method=method, subject=subject, page_size=1)] == made[5::-2]
    begun, ended = everything[4].act_time, everything[1].act_time
    between = await entries(gateway, boss, method=method, start_time=begun, end_time=ended, page_size=2)
    assert between == everything[2:5]
    # The token of one selection is not one of another.
    page = await gateway.admin.ListAuditEntries(pb.ListAuditEntriesRequest(method=method, page_size=1), metadata=boss.metadata)
    other = pb.ListAuditEntriesRequest(method=method, subject=subject, page_token=page.next_page_token)
    error = await refused(gateway.admin.ListAuditEntries(other, metadata=boss.metadata))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert await entries(gateway, boss, subject="\0") == []


async def test_entries_with_subjects_from_before_and_from_after_are_one_list(gateway: Any, boss: Person, trail: Any, refused: Any) -> None:
    subject, methods, actor = fresh_id(), [f"genmesh.jobs.v1.Test/{fresh_id()}" for _ in range(2)], fresh_id()
    made: list[str] = []
    for number in range(9):
        made.append(fresh_id())
        early = {"subject": subject} if number % 3 == 0 else {}
        await begin(trail, audit_entry_id=made[-1], method=methods[number % 2], actor_user_id=actor, **early)
    for number in (8, 1, 0, 2, 5, 3, 7):  # 4 is not known to be about it, nor is 6's outcome
        await finish(trail, made[number], subject=subject)
    expected = [made[number] for number in (8, 7, 6, 5, 3, 2, 1, 0)]
    for page_size in (1, 2, 3, 0):
        found = await entries(gateway, boss, subject=subject, page_size=page_size)
        assert [entry.audit_entry_id for entry in found] == expected
    assert {entry.subject for entry in found} == {subject}
    assert await entries(gateway, boss, subject=subject, actor_user_id=actor, page_size=3) == found
    assert await entries(gateway, boss, subject=subject, actor_user_id=fresh_id()) == []
    assert await entries(gateway, boss, subject=subject, method=methods[1], page_size=1) == [found[number] for number in (1, 3, 4, 6)]
    between = {"start_time": found[5].act_time, "end_time": found[1].act_time}
    assert await entries(gateway, boss, subject=subject, page_size=1, **between) == found[2:6]


@pytest.mark.parametrize("selection", [{"actor_user_id": "x"}, {"start_time": {"seconds": 2**60}}, {"end_time": {"seconds": -(2**60)}}])
async def test_selections_that_make_no_sense(gateway: Any, boss: Person, refused: Any, selection: dict[str, Any]) -> None:
    error = await refused(gateway.admin.ListAuditEntries(pb.ListAuditEntriesRequest(**selection), metadata=boss.metadata))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "position",
    [
        b"x",
        bytes(23),
        bytes(25),
        (2**63 - 1).to_bytes(8, "big") + bytes(16),
        (-(2**63)).to_bytes(8, "big", signed=True) + bytes(16),
    ],
)
async def test_forged_page_tokens(gateway: Any, boss: Person, refused: Any, position: bytes) -> None:
    token = paging.encode_token(position, audit.PAGES_OF + repr(audit.AuditFilter()).encode())
    error = await refused(gateway.admin.ListAuditEntries(pb.ListAuditEntriesRequest(page_token=token), metadata=boss.metadata))
    assert (error.code, error.message.partition(":")[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "page_token")


@pytest.mark.parametrize("moment", [datetime.min, datetime.max])
async def test_forged_page_tokens_at_the_ends_of_time(gateway: Any, boss: Person, moment: datetime) -> None:
    microseconds = (moment.replace(tzinfo=UTC) - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)
    position = microseconds.to_bytes(8, "big", signed=True) + bytes(16)
    token = paging.encode_token(position, audit.PAGES_OF + repr(audit.AuditFilter()).encode())
    page = await gateway.admin.ListAuditEntries(pb.ListAuditEntriesRequest(page_token=token, page_size=1), metadata=boss.metadata)
    assert len(page.audit_entries) == (moment == datetime.max)


async def test_who_was_looked_up_is_written_down(gateway: Any, boss: Person) -> None:
    email, method = fresh_email(), f"{ADMIN}/ListUsers"
    await gateway.admin.ListUsers(pb.ListUsersRequest(email=email), metadata=boss.metadata)
    await gateway.admin.ListUsers(pb.ListUsersRequest(), metadata=boss.metadata)
    all_of_them, one = (await entries(gateway, boss, method=method, actor_user_id=boss.user.user_id))[:2]
    assert (dict(one.details), dict(all_of_them.details)) == ({"email": email}, {})


async def test_what_was_looked_for_in_the_trail_is_written_down(gateway: Any, boss: Person) -> None:
    selection: dict[str, Any] = {"actor_user_id": fresh_id(), "subject": fresh_id(), "method": f"{ADMIN}/ListAuditEntries"}
    times: dict[str, Any] = {"start_time": datetime(2026, 1, 1, tzinfo=UTC), "end_time": datetime(2026, 1, 2, tzinfo=UTC)}
    await gateway.admin.ListAuditEntries(pb.ListAuditEntriesRequest(**selection, **times), metadata=boss.metadata)
    await gateway.admin.ListAuditEntries(pb.ListAuditEntriesRequest(), metadata=boss.metadata)
    shown = pb.ListAuditEntriesRequest(method=selection["method"], actor_user_id=boss.user.user_id, page_size=3)
    _, bare, entry = (await gateway.admin.ListAuditEntries(shown, metadata=boss.metadata)).audit_entries
    assert dict(entry.details) == {
        **{f"filter_{name}": value for name, value in selection.items()},
        "filter_start_time": "2026-01-01T00:00:00+00:00",
        "filter_end_time": "2026-01-02T00:00:00+00:00",
    }
    assert dict(bare.details) == {}
    assert entry.subject == ""


async def test_only_administrators_list(gateway: Any, boss: Person, refused: Any) -> None:
    operator = await person(gateway)
    await update(gateway, boss, operator.user_id, roles=["operator"])
    for caller in (await person(gateway), await sign_in(gateway, operator.user.email)):
        error = await refused(gateway.admin.ListAuditEntries(pb.ListAuditEntriesRequest(), metadata=caller.metadata))
        assert (error.code, error.reason) == (grpc.StatusCode.PERMISSION_DENIED, Reason.ERROR_REASON_PERMISSION_DENIED)


# --- in the database


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_entries SET subject = 'x'",
        "DELETE FROM audit_entries",
        "TRUNCATE audit_entries CASCADE",
        "UPDATE audit_outcomes SET code = 0",
        "DELETE FROM audit_outcomes",
        "TRUNCATE audit_outcomes",
    ],
)
async def test_nothing_is_changed_or_removed_even_by_the_owner(gateway: Any, boss: Person, statement: str) -> None:
    async def run(*statements: str) -> None:
        async with transaction(gateway.engine) as connection:
            for one in statements:
                await connection.execute(sa.text(one))

    before = await entries(gateway, boss, method=UPDATE_USER)
    await update(gateway, boss, (await person(gateway)).user_id, disabled=True)
    with pytest.raises(DBAPIError):
        await run(statement)
    # With the rights that the owner of a table can give back to itself, too.
    with pytest.raises(DBAPIError, match="append-only"):
        await run("GRANT ALL ON audit_entries, audit_outcomes TO CURRENT_USER", statement)
    [_, *rest] = await entries(gateway, boss, method=UPDATE_USER)
    assert rest == before


@pytest_asyncio.fixture
async def empty_gateway(postgres: Any, start_gateway: Any) -> Any:
    """A gateway whose trail has nothing but what the test writes."""
    url = postgres.create_database()
    await asyncio.to_thread(migrate, DatabaseSettings.model_validate({"database_url": url}), package="gateway", schema=app.SCHEMA)
    return await start_gateway(database_url=url)


async def test_pages_of_a_subject_part_entries_of_one_moment(empty_gateway: Any) -> None:
    """Whether the entry or its outcome names the subject."""
    subject, count = fresh_id(), 40
    entries_of = (
        "INSERT INTO audit_entries (audit_entry_id, act_time, actor_service, method, subject, client_address, request_id, details)"
        " SELECT gen_random_uuid(), '2026-05-04T12:00:00Z', '', 'm', CASE n % 2 WHEN 0 THEN :subject ELSE '' END, '', '', '{}'"
        f" FROM generate_series(1, {count}) AS n"
    )
    outcomes_of = (
        "INSERT INTO audit_outcomes (audit_entry_id, act_time, code, reason, subject, details) SELECT audit_entry_id, act_time, 0, '',"
        " :subject, '{}' FROM audit_entries WHERE subject = ''"
    )
    async with empty_gateway.engine.begin() as connection:
        await connection.execute(sa.text(entries_of).bindparams(subject=subject))
        await connection.execute(sa.text(outcomes_of).bindparams(subject=subject))
    found: list[uuid.UUID] = []
    before: tuple[datetime, uuid.UUID] | None = None
    async with empty_gateway.engine.connect() as connection:
        while page := await store.list_audit_entries(connection, audit.AuditFilter(subject=subject), before=before, limit=7):
            found += [row.audit_entry_id for row in page]
            before = page[-1].act_time, page[-1].audit_entry_id
    assert len(found) == count
    assert found == sorted(set(found), reverse=True)


async def test_no_list_reads_the_whole_trail(empty_gateway: Any) -> None:
    subject, limit = fresh_id(), 51
    # One of ten entries has the subject, and one of ten gets it afterwards.
    entries_of = (
        "INSERT INTO audit_entries (audit_entry_id, act_time, actor_service, method, subject, client_address, request_id, details)"
        " SELECT gen_random_uuid(), now() - n * interval '1 s', '', 'm',"
        " CASE n % 10 WHEN 0 THEN :subject WHEN 1 THEN '' ELSE 'other ' || n END, '', '', '{}'"
        " FROM generate_series(1, 20000) AS n"
    )
    outcomes_of = (
        "INSERT INTO audit_outcomes (audit_entry_id, act_time, code, reason, subject, details) SELECT audit_entry_id, act_time, 0, '',"
        " CASE WHEN subject = '' THEN :subject ELSE '' END, '{}' FROM audit_entries"
    )
    plans: list[dict[str, Any]] = []

    async with empty_gateway.engine.connect() as connection:
        await connection.execute(sa.text(entries_of).bindparams(subject=subject))
        await connection.execute(sa.text(outcomes_of).bindparams(subject=subject))
        await connection.commit()
        await connection.execute(sa.text("ANALYZE audit_entries, audit_outcomes"))
        await connection.commit()
        asked: list[tuple[str, Any]] = []

        def note(*call: Any) -> None:
            asked.append((call[2], call[3]))

        event.listen(empty_gateway.engine.sync_engine, "before_cursor_execute", note)
        try:
            selection = audit.AuditFilter(subject=subject)
            first = await store.list_audit_entries(connection, selection, before=None, limit=limit)
            before = first[-1].act_time, first[-1].audit_entry_id
            second = await store.list_audit_entries(connection, selection, before=before, limit=limit)
            assert (len(first), len(second), len({row.audit_entry_id for row in (*first, *second)})) == (limit, limit, 2 * limit)
        finally:
            event.remove(empty_gateway.engine.sync_engine, "before_cursor_execute", note)
        for statement, parameters in asked:
            explained = await connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters)
            plans.append(explained.scalar_one()[0]["Plan"])

    def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
        return [plan, *(node for child in plan.get("Plans", ()) for node in nodes(child))]

    assert len(plans) == 2
    for plan in plans:
        assert {"ix_audit_entries_subject", "ix_audit_outcomes_subject"} <= {node.get("Index Name", "") for node in nodes(plan)}
        # Nor all that is about the subject, 2,000 entries of each kind: a page of each.
        for node in nodes(plan):
            assert node["Node Type"] != "Seq Scan"
            assert (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"] <= 2 * limit, node


async def test_what_cannot_be_written_down_does_not_happen(empty_gateway: Any, refused: Any) -> None:
    gateway = empty_gateway
    boss, who = await admin(gateway), await person(gateway)

    async def rights(statement: str) -> None:
        async with transaction(gateway.engine) as connection:
            await connection.execute(sa.text(statement))

    await rights("REVOKE INSERT ON audit_entries FROM CURRENT_USER")
    error = await refused(update(gateway, boss, who.user_id, roles=["admin"]))
    assert (error.code, error.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_UNAVAILABLE)
    error = await refused(create_key(gateway, who))
    assert error.code is grpc.StatusCode.UNAVAILABLE
    me = await gateway.users.GetMe(pb.GetMeRequest(), metadata=who.metadata)  # what is not audited goes on
    assert me.user == who.user
    await rights("GRANT INSERT ON audit_entries TO CURRENT_USER")
    # An outcome that cannot be written down undoes nothing.
    await rights("REVOKE INSERT ON audit_outcomes FROM CURRENT_USER")
    await update(gateway, boss, who.user_id, plan=pb.PLAN_PRO)
    await rights("GRANT INSERT ON audit_outcomes TO CURRENT_USER")
    [entry] = await entries(gateway, boss, subject=who.user.user_id, method=UPDATE_USER)
    assert not entry.HasField("code")


async def test_registering_is_written_down(gateway: Any, boss: Person) -> None:
    email = fresh_email()
    user = (await gateway.users.RegisterUser(pb.RegisterUserRequest(email=email, password=PASSWORD))).user
    [entry] = await entries(gateway, boss, subject=user.user_id)
    assert (entry.method, entry.code) == (f"{IDENTITY}/RegisterUser", 0)
    assert email not in repr(entry)
