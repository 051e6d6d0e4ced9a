"""Ceilings: what an account or one of its API keys may spend a day and a month, refused before anything is held."""

import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from sqlalchemy.ext.asyncio import AsyncEngine

from credit_service import app, store
from credit_service.balances import BalanceFeed
from credit_service.ledger import INT64_MAX, KEY_CEILINGS_MAX, BrokenCeiling, Ceiling, Outcome, ReservationAnswer
from credit_service.settings import CreditSettings
from genmesh.credits.v1 import credits_pb2 as pb
from genmesh.credits.v1 import credits_pb2_grpc as pb_grpc
from servicekit.client import mesh_channel
from servicekit.database import transaction
from servicekit.doorkeeper import Doorkeeper
from tests.service.credits.callers import Signer, refused
from tests.service.credits.clocked_ledger import ClockedLedger

if TYPE_CHECKING:
    from genmesh.credits.v1.credits_pb2_grpc import CreditsServiceAsyncStub, LedgerAdminServiceAsyncStub, LedgerServiceAsyncStub

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
TTL = timedelta(days=90)
MIDNIGHT = datetime(2031, 3, 15, tzinfo=UTC)
NEXT_MONTH = datetime(2031, 4, 1, tzinfo=UTC)
FUNDS = 10**12


class Budget:
    """A rich user with ceilings, on a ledger whose clock is set."""

    def __init__(self, ledger: ClockedLedger, user_id: uuid.UUID) -> None:
        self._ledger = ledger
        self.user_id = user_id

    async def fund(self, amount: int = FUNDS) -> None:
        async with self._ledger.engine.connect() as connection:
            await store.grant(
                connection,
                actor_id=uuid.uuid4(),
                request_id=uuid.uuid4(),
                user_id=self.user_id,
                amount_millicredits=amount,
                reason="test",
            )

    async def set(self, daily: int | None, monthly: int | None = None, *, key: uuid.UUID | None = None) -> tuple[Outcome, Ceiling]:
        async with self._ledger.engine.connect() as connection:
            return await store.set_ceiling(
                connection, user_id=self.user_id, api_key_id=key, daily_millicredits=daily, monthly_millicredits=monthly
            )

    async def ask(
        self, amount: int, *, key: uuid.UUID | None = None, reservation_id: uuid.UUID | None = None, ttl: timedelta = TTL
    ) -> ReservationAnswer:
        known = reservation_id or uuid.uuid4()
        async with self._ledger.engine.connect() as connection:
            return await store.reserve(
                connection,
                reservation_id=known,
                job_id=known,
                user_id=self.user_id,
                amount_millicredits=amount,
                ttl=ttl,
                api_key_id=key,
            )

    async def hold(self, amount: int, *, key: uuid.UUID | None = None, ttl: timedelta = TTL) -> uuid.UUID:
        answer = await self.ask(amount, key=key, ttl=ttl)
        assert answer.outcome is Outcome.OK, answer
        assert answer.reservation is not None
        return answer.reservation.reservation_id

    async def refused(self, amount: int, *, key: uuid.UUID | None = None) -> BrokenCeiling:
        answer = await self.ask(amount, key=key)
        assert (answer.outcome, answer.reservation) == (Outcome.CEILING, None)
        assert answer.broken is not None
        return answer.broken

    async def capture(self, reservation_id: uuid.UUID, amount: int) -> None:
        async with self._ledger.engine.connect() as connection:
            answer = await store.capture(connection, reservation_id=reservation_id, amount_millicredits=amount)
        assert answer.outcome is Outcome.OK

    async def release(self, reservation_id: uuid.UUID) -> None:
        async with self._ledger.engine.connect() as connection:
            assert (await store.release(connection, reservation_id=reservation_id)).outcome is Outcome.OK

    async def spent(self, *, key: uuid.UUID | None = None) -> tuple[int, int]:
        """Today, this month."""
        async with self._ledger.engine.connect() as connection:
            ceilings = await store.list_ceilings(connection, user_id=self.user_id)
        (found,) = (ceiling for ceiling in ceilings if ceiling.api_key_id == key)
        return found.spent_today_millicredits, found.spent_this_month_millicredits


@pytest_asyncio.fixture
async def budget(clocked: ClockedLedger, user_id: uuid.UUID) -> Budget:
    budget = Budget(clocked, user_id)
    await budget.fund()
    return budget


async def test_a_day_has_room_up_to_its_ceiling_and_no_further(budget: Budget):
    await budget.set(100)
    await budget.hold(60)
    assert await budget.refused(41) == BrokenCeiling(None, "day", 100, 60, MIDNIGHT)
    await budget.hold(40)
    assert await budget.refused(1) == BrokenCeiling(None, "day", 100, 100, MIDNIGHT)
    assert await budget.spent() == (100, 100)


async def test_the_next_day_has_all_its_room_again_and_the_month_has_not(clocked: ClockedLedger, budget: Budget):
    await budget.set(100, 150)
    await budget.hold(100)
    await clocked.set_time(MIDNIGHT - timedelta(microseconds=1))
    await budget.refused(1)
    await clocked.set_time(MIDNIGHT)
    assert await budget.spent() == (0, 100)
    assert await budget.refused(51) == BrokenCeiling(None, "month", 150, 100, NEXT_MONTH)
    await budget.hold(50)
    assert await budget.spent() == (50, 150)
    await clocked.set_time(NEXT_MONTH - timedelta(microseconds=1))
    assert await budget.spent() == (0, 150)
    await budget.refused(1)
    await clocked.set_time(NEXT_MONTH)
    assert await budget.spent() == (0, 0)
    await budget.hold(100)
    assert await budget.spent() == (100, 100)


async def test_december_is_followed_by_january(clocked: ClockedLedger, budget: Budget):
    await clocked.set_time(datetime(2031, 12, 31, 23, 59, 59, tzinfo=UTC))
    await budget.set(None, 10)
    await budget.hold(10)
    new_year = datetime(2032, 1, 1, tzinfo=UTC)
    assert await budget.refused(1) == BrokenCeiling(None, "month", 10, 10, new_year)
    await clocked.set_time(new_year)
    await budget.hold(10)


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "America/Los_Angeles"])
async def test_days_and_months_are_those_of_utc_wherever_the_database_thinks_it_is(clocked: ClockedLedger, user_id: uuid.UUID, zone: str):
    budget = Budget(clocked, user_id)
    await budget.fund()
    await clocked.query(f"ALTER ROLE CURRENT_USER SET timezone = '{zone}'")
    await clocked.engine.dispose()
    try:
        ((shown,),) = await clocked.query("SELECT current_setting('timezone')")
        assert shown == zone
        await budget.set(100, 100)
        await budget.hold(60)
        assert await budget.refused(41) == BrokenCeiling(None, "day", 100, 60, MIDNIGHT)
        await clocked.set_time(MIDNIGHT)
        assert await budget.spent() == (0, 60)
        assert await budget.refused(41) == BrokenCeiling(None, "month", 100, 60, NEXT_MONTH)
        await budget.set(100, 101)
        assert await budget.spent() == (0, 60)
        assert await clocked.query("SELECT * FROM credits.discrepancies") == []
    finally:
        await clocked.query("ALTER ROLE CURRENT_USER RESET timezone")
        await clocked.engine.dispose()


@pytest.mark.parametrize("end", ["release", "capture", "expire"])
async def test_what_comes_back_on_the_same_day_gives_room_again(clocked: ClockedLedger, budget: Budget, end: str):
    key = uuid.uuid4()
    await budget.set(100, 100)
    await budget.set(100, 100, key=key)
    reservation_id = await budget.hold(100, key=key, ttl=HOUR)
    paid = 0
    match end:
        case "release":
            await budget.release(reservation_id)
        case "capture":
            paid = 30
            await budget.capture(reservation_id, paid)
        case _:
            await clocked.advance(HOUR)
            async with clocked.engine.connect() as connection:
                await store.expire_holds(connection, limit=10)
    for one in (None, key):
        assert await budget.spent(key=one) == (paid, paid)
    assert (await budget.refused(101 - paid, key=key)).spent_millicredits == paid
    await budget.hold(100 - paid, key=key)


async def test_what_comes_back_on_another_day_gives_room_in_the_month_alone(clocked: ClockedLedger, budget: Budget):
    await budget.set(100, 150)
    yesterday = await budget.hold(80)
    await clocked.set_time(MIDNIGHT)
    await budget.hold(60)
    assert await budget.spent() == (60, 140)
    await budget.release(yesterday)
    assert await budget.spent() == (60, 60)
    # The counter may still be that of a day long gone: nothing was spent since.
    await clocked.set_time(MIDNIGHT + DAY)
    other = await budget.hold(10)
    await clocked.set_time(NEXT_MONTH + DAY)
    await budget.release(other)
    assert await budget.spent() == (0, 0)
    await budget.hold(100)
    assert await budget.spent() == (100, 100)


async def test_the_time_of_an_account_does_not_run_backwards(clocked: ClockedLedger, budget: Budget):
    await budget.set(100)
    await clocked.set_time(MIDNIGHT)
    tomorrow = await budget.hold(50)
    await clocked.set_time(MIDNIGHT - timedelta(microseconds=1))
    await budget.hold(10)
    assert (await budget.refused(41)).spent_millicredits == 60, "a new day does not begin twice"
    await clocked.set_time(MIDNIGHT)
    await budget.hold(10)
    await budget.release(tomorrow)
    assert await budget.spent() == (20, 20)
    await budget.set(100)  # counts anew, from the reservations
    assert await budget.spent() == (20, 20)


async def test_the_ceiling_of_an_account_and_that_of_a_key_stand_beside_each_other(budget: Budget):
    small, large, free = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    await budget.set(100)
    await budget.set(30, key=small)
    await budget.set(500, key=large)
    await budget.hold(30, key=small)
    assert await budget.refused(1, key=small) == BrokenCeiling(small, "day", 30, 30, MIDNIGHT)
    await budget.hold(50, key=large)
    # Where both stand against it, the account's is named.
    assert await budget.refused(451, key=large) == BrokenCeiling(None, "day", 100, 80, MIDNIGHT)
    assert await budget.refused(21, key=free) == BrokenCeiling(None, "day", 100, 80, MIDNIGHT)
    assert await budget.refused(21) == BrokenCeiling(None, "day", 100, 80, MIDNIGHT)
    await budget.hold(20, key=free)
    assert [await budget.spent(), await budget.spent(key=small), await budget.spent(key=large)] == [(100, 100), (30, 30), (50, 50)]


async def test_a_refusal_of_the_key_counts_nothing_against_the_account(budget: Budget):
    key = uuid.uuid4()
    await budget.set(100)
    await budget.set(10, key=key)
    await budget.refused(11, key=key)
    assert [await budget.spent(), await budget.spent(key=key)] == [(0, 0), (0, 0)]
    await budget.hold(100)


async def test_a_ceiling_set_after_spending_counts_what_was_spent(clocked: ClockedLedger, budget: Budget):
    key = uuid.uuid4()
    await budget.hold(7)
    await clocked.set_time(MIDNIGHT)
    await budget.capture(await budget.hold(50, key=key), 20)
    await budget.release(await budget.hold(500, key=key))
    held = await budget.hold(4)
    assert await budget.set(30, 40) == (Outcome.OK, Ceiling(None, 30, 40, 24, 31))
    assert await budget.set(30, None, key=key) == (Outcome.OK, Ceiling(key, 30, None, 20, 20))
    assert (await budget.refused(7)).spent_millicredits == 24
    await budget.release(held)
    assert await budget.spent() == (20, 27)
    # Last month does not count.
    await clocked.set_time(NEXT_MONTH)
    assert await budget.set(1, 1) == (Outcome.OK, Ceiling(None, 1, 1, 0, 0))


async def test_a_ceiling_below_what_is_spent_refuses_all_until_there_is_room(clocked: ClockedLedger, budget: Budget):
    await budget.set(100)
    held = await budget.hold(100)
    assert await budget.set(40) == (Outcome.OK, Ceiling(None, 40, None, 100, 100))
    assert await budget.refused(1) == BrokenCeiling(None, "day", 40, 100, MIDNIGHT)
    await budget.capture(held, 39)
    await budget.refused(2)
    await budget.hold(1)
    await clocked.set_time(MIDNIGHT)
    await budget.hold(40)


@pytest.mark.parametrize("bounds", [(0, None), (None, 0), (0, 0)])
async def test_a_ceiling_of_nothing_refuses_everything(budget: Budget, bounds: tuple[int | None, int | None]):
    await budget.set(*bounds)
    assert (await budget.refused(1)).ceiling_millicredits == 0
    await budget.set(None)
    await budget.hold(1)


async def test_a_lifted_ceiling_is_gone_and_lifting_none_is_no_error(clocked: ClockedLedger, budget: Budget):
    await budget.set(1)
    assert await budget.set(None) == (Outcome.OK, Ceiling(None, None, None, 0, 0))
    assert await budget.set(None) == (Outcome.OK, Ceiling(None, None, None, 0, 0))
    await budget.hold(1000)
    async with clocked.engine.connect() as connection:
        assert await store.list_ceilings(connection, user_id=budget.user_id) == []


async def test_the_same_hold_again_is_counted_once_and_not_refused(budget: Budget):
    await budget.set(100)
    reservation_id = uuid.uuid4()
    first = await budget.ask(100, reservation_id=reservation_id)
    assert await budget.ask(100, reservation_id=reservation_id) == first
    assert await budget.spent() == (100, 100)


async def test_too_few_credits_are_what_is_said_first_and_count_nothing(budget: Budget):
    await budget.set(0)
    assert (await budget.ask(FUNDS + 1)).outcome is Outcome.INSUFFICIENT
    assert await budget.spent() == (0, 0)


async def test_what_users_spend_does_not_count_for_others(clocked: ClockedLedger, budget: Budget):
    other = Budget(clocked, uuid.uuid4())
    await other.fund()
    key = uuid.uuid4()
    await budget.set(10, key=key)
    await other.hold(11, key=key)
    assert await budget.spent(key=key) == (0, 0)


async def test_a_month_may_see_more_than_fits_a_balance(budget: Budget):
    nearly_all = INT64_MAX - FUNDS
    await budget.set(None, INT64_MAX)
    await budget.fund(nearly_all)
    await budget.capture(await budget.hold(nearly_all), nearly_all)
    await budget.fund(nearly_all)
    assert await budget.refused(nearly_all) == BrokenCeiling(None, "month", INT64_MAX, nearly_all, NEXT_MONTH)
    await budget.set(None, None)
    await budget.hold(nearly_all)
    _, ceiling = await budget.set(None, 5)
    assert ceiling.spent_this_month_millicredits == 2 * nearly_all
    assert (await budget.refused(1)).spent_millicredits == 2 * nearly_all


@pytest.mark.parametrize("account_too", [False, True])
async def test_as_many_keys_as_are_allowed_can_have_a_ceiling_and_no_more(clocked: ClockedLedger, budget: Budget, account_too: bool):
    if account_too:
        await budget.set(1000)
    keys = [uuid.uuid4() for _ in range(KEY_CEILINGS_MAX)]
    for key in keys:
        assert (await budget.set(10, key=key))[0] is Outcome.OK
    assert (await budget.set(10, key=uuid.uuid4()))[0] is Outcome.TOO_MANY
    # Those there are can be changed, that of the account set, and one lifted to make room.
    assert (await budget.set(20, key=keys[0]))[0] is Outcome.OK
    assert (await budget.set(2000))[0] is Outcome.OK
    assert (await budget.set(10, key=uuid.uuid4()))[0] is Outcome.TOO_MANY
    async with clocked.engine.connect() as connection:
        assert len(await store.list_ceilings(connection, user_id=budget.user_id)) == KEY_CEILINGS_MAX + 1
    await budget.set(None, key=keys[1])
    assert (await budget.set(10, key=uuid.uuid4()))[0] is Outcome.OK


# Over the wire.


@pytest_asyncio.fixture
async def clocked_channel(
    clocked: ClockedLedger, credit_settings: CreditSettings, signer: Signer
) -> AsyncIterator[tuple[grpc.aio.Channel, grpc.aio.Channel]]:
    """Channels of jobs_service and of Envoy to a server whose ledger stands still at this very moment."""
    await clocked.set_time(datetime.now(UTC))
    deps = app.Dependencies(clocked.engine, Doorkeeper(signer), BalanceFeed(clocked.engine))
    async with (
        app.build_server(credit_settings, deps).running(*app.GRPC_SERVICES) as server,
        mesh_channel(credit_settings, f"127.0.0.1:{server.port}", caller="jobs_service", service=app.SERVICE) as jobs,
        mesh_channel(credit_settings, f"127.0.0.1:{server.port}", caller="envoy", service=app.SERVICE) as edge,
    ):
        yield jobs, edge


async def details_of(call: "grpc.aio.UnaryUnaryCall[Any, Any]", *kinds: type[Message]) -> tuple[str, list[Message]]:
    """The message of a refusal, and its details of these kinds, in this order."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        status = rpc_status.from_call(error)  # pyright: ignore[reportArgumentType]  # has the same accessors as a Call
        assert status is not None
        found: list[Message] = []
        for kind in kinds:
            (packed,) = (detail for detail in status.details if detail.Is(kind.DESCRIPTOR))
            message = kind()
            packed.Unpack(message)
            found.append(message)
        return error.details() or "", found
    raise AssertionError("was not refused")


def reserve_request(user_id: uuid.UUID, amount: int, *, key: uuid.UUID | None = None) -> pb.ReserveCreditsRequest:
    request = pb.ReserveCreditsRequest(
        reservation_id=str(uuid.uuid4()), user_id=str(user_id), amount_millicredits=amount, api_key_id=str(key) if key else ""
    )
    request.ttl.FromSeconds(3600)
    return request


async def test_a_refusal_says_whose_ceiling_it_is_and_when_it_starts_anew(
    clocked: ClockedLedger, clocked_channel: tuple[grpc.aio.Channel, grpc.aio.Channel], signer: Signer, user_id: uuid.UUID
):
    jobs: LedgerServiceAsyncStub = pb_grpc.LedgerServiceStub(clocked_channel[0])
    users: CreditsServiceAsyncStub = pb_grpc.CreditsServiceStub(clocked_channel[1])
    admins: LedgerAdminServiceAsyncStub = pb_grpc.LedgerAdminServiceStub(clocked_channel[1])
    admin, user, key = signer.metadata(uuid.uuid4(), "admin"), signer.metadata(user_id), uuid.uuid4()
    await Budget(clocked, user_id).fund()
    await users.SetKeyCeiling(pb.SetKeyCeilingRequest(api_key_id=str(key), daily_millicredits=100), metadata=user)
    ceiling = (
        await admins.SetUserCeiling(pb.SetUserCeilingRequest(user_id=str(user_id), monthly_millicredits=150), metadata=admin)
    ).ceiling
    assert ceiling == pb.Ceiling(monthly_millicredits=150)
    await jobs.ReserveCredits(reserve_request(user_id, 70, key=key))

    refusal = await refused(jobs.ReserveCredits(reserve_request(user_id, 31, key=key)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "CEILING_REACHED")
    assert refusal.metadata == {
        "period": "day",
        "ceiling_millicredits": "100",
        "spent_millicredits": "70",
        "required_millicredits": "31",
        "api_key_id": str(key),
    }
    message, (quota, retry) = await details_of(
        jobs.ReserveCredits(reserve_request(user_id, 31, key=key)), error_details_pb2.QuotaFailure, error_details_pb2.RetryInfo
    )
    assert message == f"API key {key} may spend 100 millicredits a day; 70 are spent or held, 31 more are needed"
    assert isinstance(quota, error_details_pb2.QuotaFailure)
    assert [(one.subject, one.description) for one in quota.violations] == [
        (f"api_key:{key}", f"API key {key} may spend 100 millicredits a day")
    ]
    # Midnight comes while the ledger's clock stands still: 0 is the least that can be waited.
    midnight = datetime.combine(clocked.now.date() + DAY, datetime.min.time(), UTC)
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert 0 <= retry.retry_delay.ToTimedelta().total_seconds() <= (midnight - clocked.now).total_seconds()

    message, (info, quota, retry) = await details_of(
        jobs.ReserveCredits(reserve_request(user_id, 81)),
        error_details_pb2.ErrorInfo,
        error_details_pb2.QuotaFailure,
        error_details_pb2.RetryInfo,
    )
    assert message == "this account may spend 150 millicredits a month; 70 are spent or held, 81 more are needed"
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert "api_key_id" not in info.metadata
    assert isinstance(quota, error_details_pb2.QuotaFailure)
    assert [one.subject for one in quota.violations] == ["account"]

    listed = (await users.ListCeilings(pb.ListCeilingsRequest(), metadata=user)).ceilings
    assert list(listed) == [
        pb.Ceiling(monthly_millicredits=150, spent_today_millicredits=70, spent_this_month_millicredits=70),
        pb.Ceiling(api_key_id=str(key), daily_millicredits=100, spent_today_millicredits=70, spent_this_month_millicredits=70),
    ]
    account = await admins.GetAccount(pb.GetAccountRequest(user_id=str(user_id)), metadata=admin)
    assert list(account.ceilings) == list(listed)


async def test_bounds_of_zero_are_bounds_and_without_any_a_ceiling_goes(
    credits_stub: "CreditsServiceAsyncStub", signer: Signer, user_id: uuid.UUID
):
    user, key = signer.metadata(user_id), str(uuid.uuid4())
    zero = pb.SetKeyCeilingRequest(api_key_id=key, daily_millicredits=0)
    answer = (await credits_stub.SetKeyCeiling(zero, metadata=user)).ceiling
    assert answer.HasField("daily_millicredits")
    assert not answer.HasField("monthly_millicredits")
    assert len((await credits_stub.ListCeilings(pb.ListCeilingsRequest(), metadata=user)).ceilings) == 1
    lifted = (await credits_stub.SetKeyCeiling(pb.SetKeyCeilingRequest(api_key_id=key, lift=True), metadata=user)).ceiling
    assert lifted == pb.Ceiling(api_key_id=key)
    assert len((await credits_stub.ListCeilings(pb.ListCeilingsRequest(), metadata=user)).ceilings) == 0


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"api_key_id": "mine"}, "api_key_id"),
        ({"api_key_id": str(uuid.UUID(int=0))}, "api_key_id"),
        ({"daily_millicredits": -1}, "daily_millicredits"),
        ({"monthly_millicredits": -1}, "monthly_millicredits"),
    ],
)
async def test_bad_ceilings_name_the_field(
    credits_stub: "CreditsServiceAsyncStub", signer: Signer, user_id: uuid.UUID, change: dict[str, Any], field: str
):
    fields: dict[str, Any] = {"api_key_id": str(uuid.uuid4()), "daily_millicredits": 1}
    request = pb.SetKeyCeilingRequest(**fields | change)
    refusal = await refused(credits_stub.SetKeyCeiling(request, metadata=signer.metadata(user_id)))
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))


async def test_users_do_not_set_the_ceilings_of_accounts(admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer, user_id: uuid.UUID):
    request = pb.SetUserCeilingRequest(user_id=str(user_id), daily_millicredits=10**9)
    refusal = await refused(admin_stub.SetUserCeiling(request, metadata=signer.metadata(user_id)))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")


async def test_one_key_more_than_can_have_a_ceiling_is_refused(
    credits_stub: "CreditsServiceAsyncStub", signer: Signer, engine: AsyncEngine, user_id: uuid.UUID
):
    user = signer.metadata(user_id)

    def request() -> pb.SetKeyCeilingRequest:
        return pb.SetKeyCeilingRequest(api_key_id=str(uuid.uuid4()), daily_millicredits=1)

    async with transaction(engine) as connection:  # nobody may ask for so many at once
        for _ in range(KEY_CEILINGS_MAX - 1):
            await store.set_ceiling(connection, user_id=user_id, api_key_id=uuid.uuid4(), daily_millicredits=1, monthly_millicredits=None)
    await credits_stub.SetKeyCeiling(request(), metadata=user)
    refusal = await refused(credits_stub.SetKeyCeiling(request(), metadata=user))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "LIMIT_REACHED")
