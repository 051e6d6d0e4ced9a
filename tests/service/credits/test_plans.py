"""Grants of plans: the months, and rounds over the real ledger, asking a gateway over mTLS."""

# ruff: noqa: N802  # RPC methods are named by the proto

import asyncio
import calendar
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Protocol

import grpc
import prometheus_client
import pytest
import pytest_asyncio
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import app
from credit_service import plans as plans_module
from credit_service.plans import GRACE, Month, PlanGrants, due_month, month_at, month_start
from credit_service.prices import PriceTable, load_prices
from credit_service.settings import CreditSettings
from gateway import app as gateway_app
from gateway.accounts import Accounts
from gateway.admin import Administration
from gateway.settings import GatewaySettings
from genmesh.identity.v1 import identity_pb2, identity_pb2_grpc
from servicekit import database
from servicekit.client import mesh_channel
from servicekit.errors import unavailable
from servicekit.identity import TokenVerifier
from servicekit.process import end
from servicekit.server import MeshServer
from servicekit.settings import DatabaseSettings
from tests.service.credits.callers import Signer
from tests.service.credits.conftest import Databases

DEADLINE_S = 60.0
POLL_S = 0.02
PRICES = load_prices()
FREE, PRO = PRICES.plans["PLAN_FREE"], PRICES.plans["PLAN_PRO"]
PRO_MILLICREDITS = PRO.monthly_grant_millicredits

# --- months ------------------------------------------------------------------------------------------------------------------


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("start", "starts"),
    [
        (utc(2026, 1, 31, 12), [utc(2026, 1, 31, 12), utc(2026, 2, 28, 12), utc(2026, 3, 31, 12), utc(2026, 4, 30, 12)]),
        (utc(2027, 12, 30), [utc(2027, 12, 30), utc(2028, 1, 30), utc(2028, 2, 29), utc(2028, 3, 30)]),
        (utc(2028, 2, 29), [utc(2028, 2, 29), utc(2028, 3, 29), utc(2028, 4, 29)]),
        # 31 January in Auckland is still the 30th in UTC.
        (
            datetime(2026, 1, 31, 1, tzinfo=timezone(timedelta(hours=13))),
            [utc(2026, 1, 30, 12), utc(2026, 2, 28, 12), utc(2026, 3, 30, 12)],
        ),
    ],
)
def test_months_start_on_the_day_of_the_plan_or_the_last_there_is(start: datetime, starts: list[datetime]) -> None:
    assert [month_start(start, number) for number in range(len(starts))] == starts


TIMES = st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))


@given(TIMES, st.integers(0, 1200))
def test_a_month_later_is_the_next_calendar_month_and_the_same_time_of_day(start: datetime, number: int) -> None:
    found = month_start(start, number)
    assert (found.year * 12 + found.month) - (start.year * 12 + start.month) == number
    assert found.day == min(start.day, calendar.monthrange(found.year, found.month)[1])
    assert found.timetz() == start.timetz()
    assert found < month_start(start, number + 1)


@given(TIMES, TIMES)
def test_every_moment_of_a_plan_is_in_one_month(start: datetime, moment: datetime) -> None:
    month = month_at(start, moment)
    if moment < start:
        assert month is None
    else:
        assert month is not None
        assert month.start_time <= moment < month.end_time
        assert (month.start_time, month.end_time) == (month_start(start, month.number), month_start(start, month.number + 1))
        assert month_at(start, month.start_time) == month
        assert month_at(start, month.end_time) == Month(month.number + 1, month.end_time, month_start(start, month.number + 2))


@given(TIMES, st.integers(0, 40), st.floats(0, 1, exclude_max=True))
def test_what_is_due(start: datetime, number: int, part: float) -> None:
    begin, end = month_start(start, number), month_start(start, number + 1)
    moment = min(begin + part * (end - begin), end - timedelta(microseconds=1))
    month = Month(number, begin, end)
    assert due_month(PRO, start, moment) == month
    assert due_month(FREE, start, moment) == (month if number else None)
    assert due_month(replace(PRO, monthly_grant_millicredits=0), start, moment) is None


# --- rounds ------------------------------------------------------------------------------------------------------------------


class Members(identity_pb2_grpc.MembershipServiceServicer):
    """The members a test wants, in pages as small as it wants."""

    def __init__(self) -> None:
        self.members: list[identity_pb2.Member] = []
        self.page_size = 200
        self.calls = 0
        self.before_page: Callable[[], Awaitable[None]] | None = None

    def add(self, plan: str, start: datetime) -> uuid.UUID:
        user_id = uuid.uuid4()
        member = identity_pb2.Member(user_id=str(user_id), plan=identity_pb2.Plan.Value(plan))
        member.plan_start_time.FromDatetime(start)
        self.members.append(member)
        return user_id

    async def ListMembers(self, request: identity_pb2.ListMembersRequest, context: Any) -> identity_pb2.ListMembersResponse:
        self.calls += 1
        if self.before_page is not None:
            await self.before_page()
        first = int(request.page_token or 0)
        after = first + self.page_size
        return identity_pb2.ListMembersResponse(
            members=self.members[first:after], next_page_token=str(after) if after < len(self.members) else ""
        )


@pytest_asyncio.fixture
async def served(credit_settings: CreditSettings, signer: Signer) -> AsyncIterator[tuple[Members, int]]:
    """Members and the port where they are served, under the gateway's name and the contract's rules."""
    members = Members()
    verifier = TokenVerifier(signer, issuer=credit_settings.token_issuer, audience=credit_settings.token_audience)
    server = MeshServer(credit_settings, service="gateway", verifier=verifier, checks={})
    identity_pb2_grpc.add_MembershipServiceServicer_to_server(members, server.grpc)
    async with server.running("genmesh.identity.v1.MembershipService"):
        yield members, server.port


@pytest.fixture
def members(served: tuple[Members, int]) -> Members:
    return served[0]


class MakePlanGrants(Protocol):
    """Makes a replica."""

    def __call__(
        self,
        prices: PriceTable = ...,
        *,
        interval_s: float = ...,
        lease_s: float = ...,
        changed: Callable[[uuid.UUID], None] = ...,
        engine: AsyncEngine | None = ...,
    ) -> PlanGrants: ...


@asynccontextmanager
async def replicas(settings: CreditSettings, engine: AsyncEngine, port: int) -> AsyncGenerator[MakePlanGrants]:
    async with mesh_channel(settings, f"127.0.0.1:{port}", caller=app.SERVICE, service="gateway") as channel:
        default_engine = engine

        def make(
            prices: PriceTable = PRICES,
            *,
            interval_s: float = 3600.0,
            lease_s: float = 60.0,
            changed: Callable[[uuid.UUID], None] = lambda _: None,
            engine: AsyncEngine | None = None,
        ) -> PlanGrants:
            return PlanGrants(
                engine or default_engine, channel, prices, interval_s=interval_s, timeout_s=10.0, changed=changed, lease_s=lease_s
            )

        yield make


@pytest_asyncio.fixture
async def replica(credit_settings: CreditSettings, engine: AsyncEngine, served: tuple[Members, int]) -> AsyncIterator[MakePlanGrants]:
    """See MakePlanGrants."""
    async with replicas(credit_settings, engine, served[1]) as make:
        yield make


@pytest_asyncio.fixture(autouse=True)
async def _a_round_is_due(engine: AsyncEngine) -> None:  # pyright: ignore[reportUnusedFunction]
    await round_is_due(engine)


async def round_is_due(engine: AsyncEngine) -> None:
    """As if the interval, or a dead holder's lease, were over."""
    async with engine.connect() as connection:
        await connection.execute(sa.text("UPDATE credits.rounds SET free_time = clock_timestamp()"))


async def now(engine: AsyncEngine) -> datetime:
    """The time that decides."""
    async with engine.connect() as connection:
        return (await connection.execute(sa.text("SELECT clock_timestamp()"))).scalar_one()


async def grants_of(engine: AsyncEngine, user_id: uuid.UUID) -> list[tuple[str, datetime, datetime, int]]:
    """Plan, start, end and credits of each grant of a user, oldest first."""
    query = "SELECT plan, start_time, end_time, amount_millicredits FROM credits.plan_grants WHERE user_id = :user_id ORDER BY event_id"
    async with engine.connect() as connection:
        rows = await connection.execute(sa.text(query), {"user_id": user_id})
        return [(row.plan, row.start_time, row.end_time, row.amount_millicredits) for row in rows]


async def available(engine: AsyncEngine, *user_ids: uuid.UUID) -> list[int]:
    query = sa.text("SELECT coalesce((SELECT available_millicredits FROM credits.accounts WHERE user_id = :user_id), 0)")
    async with engine.connect() as connection:
        return [(await connection.execute(query, {"user_id": user_id})).scalar_one() for user_id in user_ids]


def months_before(moment: datetime, months: int) -> datetime:
    """A start of a plan whose month of this number began some time ago and is not over: no test depends on the date."""
    start = month_start(moment - timedelta(days=3), -months)
    month = month_at(start, moment)
    assert month is not None
    assert month.number == months
    return start


def granted_total(plan: str) -> float:
    return prometheus_client.REGISTRY.get_sample_value("genmesh_plan_grants_total", {"plan": plan}) or 0.0


async def test_a_month_is_granted_once_and_tells_who_changed(engine: AsyncEngine, members: Members, replica: MakePlanGrants) -> None:
    moment = await now(engine)
    new_free, old_free = members.add("PLAN_FREE", months_before(moment, 0)), members.add("PLAN_FREE", months_before(moment, 1))
    new_pro, old_pro = members.add("PLAN_PRO", months_before(moment, 0)), members.add("PLAN_PRO", months_before(moment, 1))
    users = (new_free, old_free, new_pro, old_pro)
    changed: list[uuid.UUID] = []
    before = granted_total("PLAN_FREE"), granted_total("PLAN_PRO")
    first = replica(changed=changed.append)

    assert await first.round() == 3
    expected = [0, FREE.monthly_grant_millicredits, PRO_MILLICREDITS, PRO_MILLICREDITS]
    assert await available(engine, *users) == expected
    assert changed == [old_free, new_pro, old_pro]
    assert (granted_total("PLAN_FREE") - before[0], granted_total("PLAN_PRO") - before[1]) == (1, 2)

    # Not due again; and when it is, everybody has the credits of the month.
    assert await first.round() is None
    assert members.calls == 1
    await round_is_due(engine)
    assert await replica().round() == 0
    assert members.calls == 2
    assert await available(engine, *users) == expected


async def test_a_grant_outlives_its_month_until_the_next_comes(engine: AsyncEngine, members: Members, replica: MakePlanGrants) -> None:
    start = months_before(await now(engine), 2)
    user_id = members.add("PLAN_PRO", start)
    await replica().round()
    assert await grants_of(engine, user_id) == [("PLAN_PRO", month_start(start, 2), month_start(start, 3), PRO_MILLICREDITS)]
    async with engine.connect() as connection:
        lots = "SELECT available_millicredits, expire_time FROM credits.lots WHERE user_id = :user_id"
        assert (await connection.execute(sa.text(lots), {"user_id": user_id})).all() == [(PRO_MILLICREDITS, month_start(start, 3) + GRACE)]


async def test_of_months_that_were_missed_only_the_current_is_granted(
    engine: AsyncEngine, members: Members, replica: MakePlanGrants
) -> None:
    start = months_before(await now(engine), 3)
    user_ids = [members.add(plan, start) for plan in ("PLAN_FREE", "PLAN_PRO")]
    assert await replica().round() == 2
    for user_id in user_ids:
        assert [(begin, end) for _, begin, end, _ in await grants_of(engine, user_id)] == [(month_start(start, 3), month_start(start, 4))]


async def test_a_plan_that_starts_later_by_the_gateways_clock_waits(engine: AsyncEngine, members: Members, replica: MakePlanGrants) -> None:
    user_id = members.add("PLAN_PRO", await now(engine) + timedelta(hours=1))
    assert await replica().round() == 0
    assert await available(engine, user_id) == [0]


async def test_a_plan_that_is_not_known_here_is_left_alone(engine: AsyncEngine, members: Members, replica: MakePlanGrants) -> None:
    moment = months_before(await now(engine), 1)
    unknown, known = members.add("PLAN_PRO", moment), members.add("PLAN_PRO", moment)
    members.members[0].plan = 77  # pyright: ignore[reportAttributeAccessIssue]
    assert await replica().round() == 1
    assert await available(engine, unknown, known) == [0, PRO_MILLICREDITS]


async def test_a_grant_that_does_not_fit_is_left_out(
    engine: AsyncEngine, members: Members, replica: MakePlanGrants, fund: Callable[[uuid.UUID, int], Awaitable[None]]
) -> None:
    moment = months_before(await now(engine), 1)
    rich, poor = members.add("PLAN_PRO", moment), members.add("PLAN_PRO", moment)
    async with engine.connect() as connection:
        call = "SELECT outcome FROM credits.grant_credits(gen_random_uuid(), gen_random_uuid(), :user_id, :amount, 'test', NULL)"
        answer = await connection.execute(sa.text(call), {"user_id": rich, "amount": 2**63 - 1})
        assert answer.scalar_one() == "ok"
    assert await replica().round() == 1
    assert await available(engine, rich, poor) == [2**63 - 1, PRO_MILLICREDITS]


async def test_nobody_to_grant_to(members: Members, replica: MakePlanGrants) -> None:
    assert await replica().round() == 0
    assert members.calls == 1


async def test_of_two_replicas_at_once_one_does_the_round(engine: AsyncEngine, members: Members, replica: MakePlanGrants) -> None:
    start = months_before(await now(engine), 1)
    user_ids = [members.add("PLAN_PRO", start) for _ in range(20)]
    members.page_size = 3
    answers = await asyncio.gather(*(replica().round() for _ in range(4)))
    assert sorted(answers, key=lambda answer: answer or 0) == [None, None, None, 20]
    assert members.calls == 7
    assert await available(engine, *user_ids) == [PRO_MILLICREDITS] * 20


async def test_two_replicas_that_take_the_round_from_each_other_grant_once(
    engine: AsyncEngine, members: Members, replica: MakePlanGrants
) -> None:
    start = months_before(await now(engine), 1)
    user_ids = [members.add("PLAN_PRO", start) for _ in range(20)]
    members.page_size = 3
    changed: list[uuid.UUID] = []
    # A claim that is over at once: every page of every replica begins by taking the round over.
    racing = [replica(lease_s=0, changed=changed.append) for _ in range(3)]
    await asyncio.gather(*(one.round() for one in racing))
    assert sorted(changed) == sorted(user_ids)
    assert await available(engine, *user_ids) == [PRO_MILLICREDITS] * 20


async def test_a_round_that_was_taken_over_is_left(engine: AsyncEngine, members: Members, replica: MakePlanGrants) -> None:
    start = months_before(await now(engine), 1)
    user_ids = [members.add("PLAN_PRO", start) for _ in range(4)]
    members.page_size = 2
    slow, quick = replica(), replica()
    waiting, go_on = asyncio.Event(), asyncio.Event()

    async def hang() -> None:
        members.before_page = None
        waiting.set()
        await go_on.wait()

    members.before_page = hang
    round_of_slow = asyncio.create_task(slow.round())
    async with asyncio.timeout(DEADLINE_S):
        await waiting.wait()
        assert await quick.round() is None
        await round_is_due(engine)  # the lease of the slow one is over
        assert await quick.round() == 4
        go_on.set()
        assert await round_of_slow is None
    assert members.calls == 3
    assert await available(engine, *user_ids) == [PRO_MILLICREDITS] * 4
    # And it did not touch the interval that the other one began.
    assert await quick.round() is None


@pytest.mark.parametrize("killed_after", [1, 2, 3, 4])
async def test_a_round_that_dies_between_two_grants_is_done_again(
    engine: AsyncEngine, members: Members, replica: MakePlanGrants, killed_after: int
) -> None:
    start = months_before(await now(engine), 1)
    user_ids = [members.add("PLAN_PRO", start) for _ in range(5)]
    members.page_size = 2
    changed: list[uuid.UUID] = []

    def kill_between(user_id: uuid.UUID) -> None:
        changed.append(user_id)
        if len(changed) == killed_after:
            doomed.cancel()

    doomed = asyncio.create_task(replica(changed=kill_between).run())
    async with asyncio.timeout(DEADLINE_S):
        with suppress(asyncio.CancelledError):
            await doomed
    assert changed == user_ids[:killed_after]
    # The next grant was under way: the database may have done it, and nobody heard of it.
    done = sum(amount > 0 for amount in await available(engine, *user_ids))
    assert done in (killed_after, killed_after + 1)

    # The dead replica's claim stands until its lease is over, and no longer: not for the interval.
    assert await replica().round() is None
    await round_is_due(engine)
    assert await replica().round() == 5 - done
    assert await available(engine, *user_ids) == [PRO_MILLICREDITS] * 5


async def test_the_lease_of_a_dead_replica_ends_by_itself(engine: AsyncEngine, members: Members, replica: MakePlanGrants) -> None:
    user_id = members.add("PLAN_PRO", months_before(await now(engine), 1))

    async def die() -> None:
        members.before_page = None
        raise unavailable("the gateway is away")

    members.before_page = die
    with pytest.raises(grpc.aio.AioRpcError):
        await replica(lease_s=0.2).round()
    survivor = asyncio.create_task(replica(interval_s=0.05).run())
    await eventually(lambda: available(engine, user_id), [PRO_MILLICREDITS])
    await ended(survivor)


# --- run ---------------------------------------------------------------------------------------------------------------------


async def eventually(probe: Callable[[], Awaitable[object]], wanted: object) -> None:
    answer = await probe()
    try:
        async with asyncio.timeout(DEADLINE_S):
            while answer != wanted:
                await asyncio.sleep(POLL_S)
                answer = await probe()
    except TimeoutError:
        raise AssertionError(f"never came; the last answer is {answer}") from None


async def ended(task: "asyncio.Task[None]") -> None:
    """Cancel a task that must have been running until now."""
    assert not task.done(), task
    await end({task})


async def test_rounds_go_on(engine: AsyncEngine, members: Members, replica: MakePlanGrants) -> None:
    start = months_before(await now(engine), 1)
    running = [asyncio.create_task(replica(interval_s=0.05).run()) for _ in range(2)]
    for _ in range(3):
        user_id = members.add("PLAN_PRO", start)
        await eventually(lambda user_id=user_id: available(engine, user_id), [PRO_MILLICREDITS])
    for task in running:
        await ended(task)


async def test_a_gateway_that_is_away_is_waited_for(
    engine: AsyncEngine, members: Members, replica: MakePlanGrants, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans_module, "RETRY_MIN_S", 0.01)
    user_id = members.add("PLAN_PRO", months_before(await now(engine), 1))

    async def away() -> None:
        if members.calls <= 3:
            raise unavailable("the gateway is away")

    members.before_page = away
    # The same replica goes on at once: its claim is its own, and an hour is not waited for.
    running = asyncio.create_task(replica().run())
    await eventually(lambda: available(engine, user_id), [PRO_MILLICREDITS])
    assert members.calls == 4
    await ended(running)


async def test_a_gateway_that_is_not_there_at_all(
    engine: AsyncEngine, credit_settings: CreditSettings, unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans_module, "RETRY_MIN_S", 0.01)
    async with replicas(credit_settings, engine, unused_port) as make:
        with pytest.raises(grpc.aio.AioRpcError):
            await make().round()
        running = asyncio.create_task(make(lease_s=0).run())
        _, pending = await asyncio.wait([running], timeout=0.2)
        assert pending
        await ended(running)


@pytest.fixture
def unused_port() -> int:
    """Where nobody listens: 1 is the port of a service that nobody runs any more."""
    return 1


async def test_a_database_that_drops_a_connection_amid_a_grant_is_asked_again(
    credit_settings: CreditSettings,
    engine: AsyncEngine,
    members: Members,
    replica: MakePlanGrants,
    fund: Callable[[uuid.UUID, int], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plans_module, "RETRY_MIN_S", 0.01)
    user_id = members.add("PLAN_PRO", months_before(await now(engine), 1))
    await fund(user_id, 1)
    own = database.create_engine(credit_settings, schema="credits", application="doomed", autocommit=True)

    async def killed_while_it_waits() -> int:
        query = (
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'doomed' AND wait_event_type = 'Lock'"
        )
        async with engine.connect() as connection:
            return (await connection.execute(sa.text(query))).scalar_one()

    async with engine.connect() as connection:
        await connection.execute(sa.text("BEGIN"))
        await connection.execute(sa.text("SELECT FROM credits.accounts WHERE user_id = :user_id FOR UPDATE"), {"user_id": user_id})
        running = asyncio.create_task(replica(engine=own).run())
        await eventually(killed_while_it_waits, 1)
        await connection.execute(sa.text("ROLLBACK"))
    await eventually(lambda: available(engine, user_id), [PRO_MILLICREDITS + 1])
    assert members.calls == 2
    await ended(running)
    await own.dispose()


async def test_a_mistake_of_ours_ends_the_task(engine: AsyncEngine, members: Members, replica: MakePlanGrants) -> None:
    members.add("PLAN_PRO", months_before(await now(engine), 1))

    def broken(_: uuid.UUID) -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        await asyncio.wait_for(replica(changed=broken).run(), DEADLINE_S)


# --- with the gateway itself -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gateway:
    """A running gateway."""

    accounts: Accounts
    administration: Administration
    engine: AsyncEngine
    port: int


@pytest_asyncio.fixture
async def gateway(postgres: Databases, redis_url: str, certificates: Path, tmp_path: Path) -> AsyncIterator[Gateway]:
    """The real gateway over a database of its own."""
    settings = GatewaySettings.model_validate(
        {
            "certificates_dir": certificates,
            "database_url": postgres.create_database(),
            "signing_keys_dir": tmp_path / "keys",
            "drain_s": 0,
            "password_hash_memory_kib": 1024,
            "password_hash_iterations": 1,
            "redis_url": redis_url,
            "redis_prefix": f"test-{uuid.uuid4().hex}",
        }
    )
    migrated = DatabaseSettings.model_validate({"database_url": settings.database_url})
    await asyncio.to_thread(database.migrate, migrated, package="gateway", schema=gateway_app.SCHEMA)
    async with (
        gateway_app.open_dependencies(settings) as deps,
        gateway_app.build_server(settings, deps).running(*gateway_app.SERVICE_NAMES) as server,
    ):
        yield Gateway(gateway_app.build_accounts(settings, deps), Administration(deps.engine), deps.engine, server.port)


async def test_who_changes_the_plan_to_and_fro_gets_the_month_once(
    engine: AsyncEngine, credit_settings: CreditSettings, gateway: Gateway
) -> None:
    account = await gateway.accounts.register(email="eve@example.org", password="correct horse battery", display_name="", client_address="")
    async with replicas(credit_settings, engine, gateway.port) as make:
        granted: list[int | None] = []
        for plan in ("PLAN_PRO", "PLAN_FREE", "PLAN_PRO", "PLAN_FREE", "PLAN_PRO"):
            await gateway.administration.update(account.user_id, actor_id="test", plan=plan)
            await round_is_due(engine)
            granted.append(await make().round())
    assert granted == [1, 0, 0, 0, 0]
    assert await available(engine, account.user_id) == [PRO_MILLICREDITS]


async def test_members_of_all_pages_but_disabled_ones(engine: AsyncEngine, credit_settings: CreditSettings, gateway: Gateway) -> None:
    count, disabled = 250, 7
    query = sa.text(
        "INSERT INTO users (user_id, email, display_name, roles, plan, plan_start_time, disabled_time)"
        " SELECT gen_random_uuid(), number || '@example.org', 'x', '{}', 'PLAN_FREE', now() - interval '40 days',"
        " CASE WHEN number <= :disabled THEN now() END FROM generate_series(1, :count) AS number RETURNING user_id"
    )
    async with database.transaction(gateway.engine) as connection:
        user_ids = list((await connection.execute(query, {"count": count, "disabled": disabled})).scalars())
    changed: set[uuid.UUID] = set()
    async with replicas(credit_settings, engine, gateway.port) as make:
        assert await make(changed=changed.add).round() == count - disabled
    assert changed == set(user_ids[disabled:])
    assert sum(await available(engine, *user_ids)) == (count - disabled) * FREE.monthly_grant_millicredits
