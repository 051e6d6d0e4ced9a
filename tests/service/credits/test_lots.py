"""Promotional credits: spent first and soonest first, given back to where they came from, gone when their time is over."""

import uuid
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf import timestamp_pb2

from credit_service import store
from credit_service.ledger import Account, EntryQuery, Kind, Outcome, Promotion, Swept
from genmesh.credits.v1 import credits_pb2 as pb
from tests.service.credits.callers import Signer, refused
from tests.service.credits.clocked_ledger import START, ClockedLedger

if TYPE_CHECKING:
    from genmesh.credits.v1.credits_pb2_grpc import CreditsServiceAsyncStub, LedgerAdminServiceAsyncStub

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
SOON, LATER = START + DAY, START + 2 * DAY


class Wallet:
    """What one user does on a ledger whose clock is set."""

    def __init__(self, ledger: ClockedLedger, user_id: uuid.UUID) -> None:
        self._ledger = ledger
        self.user_id = user_id

    async def grant(self, amount: int, expire_time: datetime | None = None) -> Outcome:
        async with self._ledger.engine.connect() as connection:
            answer = await store.grant(
                connection,
                actor_id=uuid.uuid4(),
                request_id=uuid.uuid4(),
                user_id=self.user_id,
                amount_millicredits=amount,
                reason="test",
                expire_time=expire_time,
            )
        return answer.outcome

    async def clawback(self, amount: int) -> Outcome:
        async with self._ledger.engine.connect() as connection:
            answer = await store.clawback(
                connection,
                actor_id=uuid.uuid4(),
                request_id=uuid.uuid4(),
                user_id=self.user_id,
                amount_millicredits=amount,
                reason="test",
            )
        return answer.outcome

    async def hold(self, amount: int, ttl: timedelta = 10 * DAY) -> uuid.UUID:
        reservation_id = uuid.uuid4()
        async with self._ledger.engine.connect() as connection:
            answer = await store.reserve(
                connection,
                reservation_id=reservation_id,
                job_id=reservation_id,
                user_id=self.user_id,
                amount_millicredits=amount,
                ttl=ttl,
            )
        assert answer.outcome is Outcome.OK, answer
        return reservation_id

    async def capture(self, reservation_id: uuid.UUID, amount: int) -> Outcome:
        async with self._ledger.engine.connect() as connection:
            return (await store.capture(connection, reservation_id=reservation_id, amount_millicredits=amount)).outcome

    async def release(self, reservation_id: uuid.UUID) -> Outcome:
        async with self._ledger.engine.connect() as connection:
            return (await store.release(connection, reservation_id=reservation_id)).outcome

    async def balance(self) -> tuple[int, int, int]:
        """(available, reserved, promotional)."""
        async with self._ledger.engine.connect() as connection:
            balance = await store.balance(connection, user_id=self.user_id)
        return balance.available_millicredits, balance.reserved_millicredits, balance.promotional_millicredits

    async def next_expire_time(self) -> datetime | None:
        async with self._ledger.engine.connect() as connection:
            return (await store.balance(connection, user_id=self.user_id)).next_expire_time

    async def promotions(self) -> list[Promotion]:
        async with self._ledger.engine.connect() as connection:
            return await store.promotions(connection, user_id=self.user_id)

    async def sweep(self) -> None:
        async with self._ledger.engine.connect() as connection:
            await store.expire_holds(connection, limit=1000)
            await store.lapse_due(connection, limit=1000)

    async def moves(self, *kinds: Kind) -> list[tuple[Kind, Account, int, datetime | None]]:
        """Entries, the oldest first: what, on which side, how much, of credits that expire when."""
        query = EntryQuery(self.user_id, kinds=frozenset(kinds))
        async with self._ledger.engine.connect() as connection:
            entries = await store.list_entries(connection, query, before=None, limit=1000)
        return [(entry.kind, entry.account, entry.amount_millicredits, entry.expire_time) for entry in reversed(entries)]


@pytest.fixture
def wallet(clocked: ClockedLedger, user_id: uuid.UUID) -> Wallet:
    return Wallet(clocked, user_id)


async def test_promotional_credits_are_spent_first_and_the_soonest_to_expire_first_of_all(wallet: Wallet):
    await wallet.grant(100)
    await wallet.grant(30, LATER)
    await wallet.grant(20, SOON)
    assert await wallet.balance() == (150, 0, 50)
    assert await wallet.next_expire_time() == SOON
    await wallet.hold(25)
    assert await wallet.promotions() == [Promotion(0, 20, SOON), Promotion(25, 5, LATER)]
    assert await wallet.next_expire_time() == LATER
    await wallet.hold(50)
    assert await wallet.promotions() == [Promotion(0, 20, SOON), Promotion(0, 30, LATER)]
    assert await wallet.balance() == (75, 75, 0)
    assert await wallet.next_expire_time() is None


async def test_of_credits_that_expire_together_the_older_are_spent_first(wallet: Wallet):
    for amount in (11, 12, 13):
        await wallet.grant(amount, SOON)
    await wallet.hold(20)
    assert await wallet.promotions() == [Promotion(0, 11, SOON), Promotion(3, 9, SOON), Promotion(13, 0, SOON)]


async def test_entries_say_which_credits_they_move_in_the_order_in_which_they_are_spent(wallet: Wallet):
    await wallet.grant(100)
    await wallet.grant(30, LATER)
    await wallet.grant(20, SOON)
    reservation_id = await wallet.hold(60)
    await wallet.capture(reservation_id, 35)
    available, reserved = Account.AVAILABLE, Account.RESERVED
    assert await wallet.moves() == [
        (Kind.GRANT, available, 100, None),
        (Kind.GRANT, available, 30, LATER),
        (Kind.GRANT, available, 20, SOON),
        (Kind.RESERVE, available, -20, SOON),
        (Kind.RESERVE, available, -30, LATER),
        (Kind.RESERVE, available, -10, None),
        (Kind.RESERVE, reserved, 20, SOON),
        (Kind.RESERVE, reserved, 30, LATER),
        (Kind.RESERVE, reserved, 10, None),
        (Kind.CAPTURE, available, 15, LATER),
        (Kind.CAPTURE, available, 10, None),
        (Kind.CAPTURE, reserved, -20, SOON),
        (Kind.CAPTURE, reserved, -30, LATER),
        (Kind.CAPTURE, reserved, -10, None),
    ]


@pytest.mark.parametrize(
    ("captured", "left"),
    [
        (1, [Promotion(19, 0, SOON), Promotion(30, 0, LATER)]),
        (20, [Promotion(30, 0, LATER)]),
        (21, [Promotion(29, 0, LATER)]),
        (50, []),
        (59, []),
        (60, []),
    ],
)
async def test_a_partial_capture_pays_with_the_credits_that_expire_soonest(wallet: Wallet, captured: int, left: list[Promotion]):
    await wallet.grant(10)
    await wallet.grant(20, SOON)
    await wallet.grant(30, LATER)
    assert await wallet.capture(await wallet.hold(60), captured) is Outcome.OK
    assert await wallet.promotions() == left
    assert await wallet.balance() == (60 - captured, 0, sum(promotion.available_millicredits for promotion in left))


async def test_what_is_released_goes_back_to_the_credits_it_came_from(wallet: Wallet):
    await wallet.grant(10)
    await wallet.grant(20, LATER)
    reservation_id = await wallet.hold(25)
    # Credits that come meanwhile and would have been spent first are not what comes back.
    await wallet.grant(40, SOON)
    assert await wallet.release(reservation_id) is Outcome.OK
    assert await wallet.promotions() == [Promotion(40, 0, SOON), Promotion(20, 0, LATER)]
    assert await wallet.balance() == (70, 0, 60)


@pytest.mark.parametrize("end", ["release", "capture", "expire", "sweep"])
async def test_credits_that_come_back_after_their_time_lapse(clocked: ClockedLedger, wallet: Wallet, end: str):
    await wallet.grant(10)
    await wallet.grant(20, SOON)
    await wallet.grant(30, LATER)
    reservation_id = await wallet.hold(55, ttl=36 * HOUR)
    await clocked.set_time(SOON)
    # What is held is not lost: it can be paid with.
    assert await wallet.balance() == (5, 55, 0)
    await wallet.sweep()
    assert await wallet.balance() == (5, 55, 0)
    captured = 0
    match end:
        case "release":
            await wallet.release(reservation_id)
        case "capture":
            captured = 8
            await wallet.capture(reservation_id, captured)
        case "expire":
            await clocked.set_time(START + 36 * HOUR)
            assert await wallet.release(reservation_id) is Outcome.EXPIRED
        case _:
            await clocked.set_time(START + 36 * HOUR)
            await wallet.sweep()
    assert await wallet.balance() == (40, 0, 30)
    assert await wallet.moves(Kind.LAPSE) == [(Kind.LAPSE, Account.AVAILABLE, captured - 20, SOON)]
    await wallet.sweep()
    assert len(await wallet.moves(Kind.LAPSE)) == 1


async def test_an_overdue_capture_in_full_pays_with_credits_whose_time_is_over(clocked: ClockedLedger, wallet: Wallet):
    await wallet.grant(20, SOON)
    reservation_id = await wallet.hold(20)
    await clocked.set_time(LATER)
    assert await wallet.capture(reservation_id, 20) is Outcome.OK
    assert await wallet.balance() == (0, 0, 0)
    assert await wallet.moves(Kind.LAPSE) == []


async def test_credits_that_are_over_are_not_shown_nor_spent_in_the_moment_before_the_sweep(clocked: ClockedLedger, wallet: Wallet):
    await wallet.grant(10)
    await wallet.grant(20, SOON)
    await wallet.grant(30, LATER)
    await clocked.set_time(SOON - timedelta(microseconds=1))
    assert await wallet.balance() == (60, 0, 50)
    await clocked.set_time(SOON)
    assert await wallet.balance() == (40, 0, 30)
    assert await wallet.next_expire_time() == LATER
    assert await wallet.promotions() == [Promotion(30, 0, LATER)]
    assert await wallet.moves(Kind.LAPSE) == []
    async with clocked.engine.connect() as connection:
        reservation_id = uuid.uuid4()
        answer = await store.reserve(
            connection, reservation_id=reservation_id, job_id=reservation_id, user_id=wallet.user_id, amount_millicredits=41, ttl=DAY
        )
    assert (answer.outcome, answer.available_millicredits) == (Outcome.INSUFFICIENT, 40)
    # Who touches the account makes it so, also where the answer is no.
    assert await wallet.moves(Kind.LAPSE) == [(Kind.LAPSE, Account.AVAILABLE, -20, SOON)]
    assert await wallet.clawback(41) is Outcome.INSUFFICIENT
    assert await wallet.clawback(40) is Outcome.OK


async def test_the_sweep_lets_all_that_is_over_lapse_at_once_and_says_whose_it_was(clocked: ClockedLedger, wallet: Wallet):
    other = Wallet(clocked, uuid.uuid4())
    for amount, expire_time in ((1, SOON), (2, SOON), (4, LATER), (8, LATER + DAY)):
        await wallet.grant(amount, expire_time)
        await other.grant(amount, expire_time + DAY)
    await clocked.set_time(LATER)
    async with clocked.engine.connect() as connection:
        # The one that has waited longest first; a limit leaves the rest to the next round.
        assert await store.lapse_due(connection, limit=1) == [Swept(wallet.user_id, None)]
        assert await store.lapse_due(connection, limit=1) == [Swept(other.user_id, None)]
        assert await store.lapse_due(connection, limit=1) == []
    assert await wallet.moves(Kind.LAPSE) == [
        (Kind.LAPSE, Account.AVAILABLE, -amount, time) for amount, time in ((1, SOON), (2, SOON), (4, LATER))
    ]
    assert (await wallet.balance(), await other.balance()) == ((8, 0, 8), (12, 0, 12))


async def test_a_clawback_takes_what_would_be_spent_first(wallet: Wallet):
    await wallet.grant(10)
    await wallet.grant(20, SOON)
    await wallet.grant(30, LATER)
    assert await wallet.clawback(25) is Outcome.OK
    assert await wallet.promotions() == [Promotion(25, 0, LATER)]
    assert await wallet.moves(Kind.CLAWBACK) == [
        (Kind.CLAWBACK, Account.AVAILABLE, -20, SOON),
        (Kind.CLAWBACK, Account.AVAILABLE, -5, LATER),
    ]


@pytest.mark.parametrize("expire_time", [START, START - timedelta(microseconds=1), START - 1000 * DAY])
async def test_credits_that_would_be_over_at_once_are_not_granted(wallet: Wallet, expire_time: datetime):
    assert await wallet.grant(10, expire_time) is Outcome.EXPIRE_TIME_PASSED
    assert await wallet.grant(10, START + timedelta(microseconds=1)) is Outcome.OK
    assert await wallet.moves() == [(Kind.GRANT, Account.AVAILABLE, 10, START + timedelta(microseconds=1))]


async def test_a_grant_repeated_after_its_credits_are_over_is_answered_as_the_first_time(clocked: ClockedLedger, wallet: Wallet):
    request: dict[str, Any] = {
        "actor_id": uuid.uuid4(),
        "request_id": uuid.uuid4(),
        "user_id": wallet.user_id,
        "amount_millicredits": 5,
        "reason": "test",
        "expire_time": SOON,
    }
    first = await clocked.do(lambda connection: store.grant(connection, **request))
    await clocked.set_time(LATER)
    assert await clocked.do(lambda connection: store.grant(connection, **request)) == first
    assert await wallet.balance() == (0, 0, 0)
    for other in (None, LATER):
        changed: dict[str, Any] = {**request, "expire_time": other}
        again = await clocked.do(lambda connection, changed=changed: store.grant(connection, **changed))
        assert again.outcome is Outcome.REUSED


async def test_many_small_lots_are_spent_and_given_back_to_the_last(wallet: Wallet):
    for day in range(1, 31):
        await wallet.grant(day, START + day * DAY)
    total = sum(range(1, 31))
    first, second = await wallet.hold(total // 2), await wallet.hold(total - total // 2)
    assert await wallet.balance() == (0, total, 0)
    await wallet.release(first)
    await wallet.release(second)
    assert await wallet.promotions() == [Promotion(day, 0, START + day * DAY) for day in range(1, 31)]


async def test_the_month_of_a_plan_lasts_until_the_next_and_is_given_once(clocked: ClockedLedger, wallet: Wallet):
    async def give(start: int, end: int, plan: str = "PLAN_PRO") -> str:
        async with clocked.engine.connect() as connection:
            return await store.grant_plan(
                connection,
                user_id=wallet.user_id,
                plan=plan,
                start_time=START + start * DAY,
                end_time=START + end * DAY,
                expire_time=START + (end + 2) * DAY,
                amount_millicredits=100,
            )

    assert [await give(0, 30), await give(0, 30), await give(29, 59)] == ["ok", "known", "known"]
    assert await give(0, 30, "PLAN_FREE") == "ok"
    assert await wallet.balance() == (200, 0, 200)
    await wallet.hold(150)
    await clocked.set_time(START + 31 * DAY)
    assert await wallet.balance() == (50, 150, 50), "the next month is late"
    assert [await give(30, 60), await give(30, 60)] == ["ok", "known"]
    assert await wallet.balance() == (150, 150, 150), "what is left of the other plan stays"
    assert await give(30, 60, "PLAN_FREE") == "ok"
    assert await wallet.balance() == (200, 150, 200)
    # Of a month that no other follows: two days later.
    await clocked.set_time(START + 62 * DAY)
    assert await wallet.balance() == (0, 150, 0)
    assert [amount for _, _, amount, _ in await wallet.moves(Kind.LAPSE)] == [-50]


# Over the wire, where PostgreSQL's own clock is the time.


def grant_request(user_id: uuid.UUID, amount: int, expire_time: timestamp_pb2.Timestamp) -> pb.GrantCreditsRequest:
    return pb.GrantCreditsRequest(
        request_id=str(uuid.uuid4()), user_id=str(user_id), amount_millicredits=amount, reason="test", expire_time=expire_time
    )


def a_day_from_now(days: int) -> timestamp_pb2.Timestamp:
    moment = timestamp_pb2.Timestamp()
    moment.GetCurrentTime()
    moment.FromSeconds(moment.seconds + days * 86_400)
    return moment


async def test_users_and_administrators_see_what_of_a_balance_expires_and_when(
    admin_stub: "LedgerAdminServiceAsyncStub", credits_stub: "CreditsServiceAsyncStub", signer: Signer, user_id: uuid.UUID
):
    admin, user = signer.metadata(uuid.uuid4(), "admin"), signer.metadata(user_id)
    soon, later = a_day_from_now(1), a_day_from_now(2)
    await admin_stub.GrantCredits(grant_request(user_id, 30, later), metadata=admin)
    await admin_stub.GrantCredits(grant_request(user_id, 20, soon), metadata=admin)
    balance = await credits_stub.GetBalance(pb.GetBalanceRequest(), metadata=user)
    assert (balance.available_millicredits, balance.promotional_millicredits) == (50, 50)
    assert balance.next_expire_time == soon
    account = await admin_stub.GetAccount(pb.GetAccountRequest(user_id=str(user_id)), metadata=admin)
    assert account.promotional_millicredits == 50
    assert [(one.available_millicredits, one.reserved_millicredits, one.expire_time) for one in account.promotions] == [
        (20, 0, soon),
        (30, 0, later),
    ]
    entries = (await credits_stub.ListEntries(pb.ListEntriesRequest(), metadata=user)).entries
    assert [(entry.amount_millicredits, entry.expire_time) for entry in entries] == [(20, soon), (30, later)]


async def test_a_promotional_grant_in_the_past_is_refused_by_its_field(
    admin_stub: "LedgerAdminServiceAsyncStub", signer: Signer, user_id: uuid.UUID
):
    request = grant_request(user_id, 30, a_day_from_now(-1))
    refusal = await refused(admin_stub.GrantCredits(request, metadata=signer.metadata(uuid.uuid4(), "admin")))
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ("expire_time",))
