"""Operations on one account at the same moment: real connections, many rounds, and every answer is that of some order of them.

Most run twice: as the operations come, and all behind a lock, so that they go through one right after another. What PostgreSQL itself
refuses (a deadlock, a constraint) fails the test: no answer here is an exception.
"""

import asyncio
import random
import uuid
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from credit_service import store
from credit_service.ledger import Balance, GrantAnswer, Outcome, ReservationAnswer, State
from tests.service.credits.clocked_ledger import START, ClockedLedger
from tests.service.credits.ledger_model import Operation

ROUNDS = 10
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
SOON = START + DAY


def grant(user_id: uuid.UUID, amount: int, **changes: Any) -> Operation:
    request = {
        "actor_id": uuid.uuid4(),
        "request_id": uuid.uuid4(),
        "user_id": user_id,
        "amount_millicredits": amount,
        "reason": "test",
        "expire_time": None,
    }
    return Operation("grant", {**request, **changes})


def clawback(user_id: uuid.UUID, amount: int) -> Operation:
    arguments = grant(user_id, amount).arguments
    return Operation("clawback", {name: value for name, value in arguments.items() if name != "expire_time"})


def reserve(user_id: uuid.UUID, amount: int, **changes: Any) -> Operation:
    reservation_id = uuid.uuid4()
    request = {
        "reservation_id": reservation_id,
        "job_id": reservation_id,
        "user_id": user_id,
        "amount_millicredits": amount,
        "ttl": HOUR,
        "model": "",
        "api_key_id": None,
    }
    return Operation("reserve", {**request, **changes})


def capture(held: Operation, amount: int) -> Operation:
    return Operation("capture", {"reservation_id": held.arguments["reservation_id"], "amount_millicredits": amount})


def release(held: Operation) -> Operation:
    return Operation("release", {"reservation_id": held.arguments["reservation_id"]})


def set_ceiling(user_id: uuid.UUID, daily: int | None, key: uuid.UUID | None = None) -> Operation:
    arguments = {"user_id": user_id, "api_key_id": key, "daily_millicredits": daily, "monthly_millicredits": daily}
    return Operation("set_ceiling", arguments)


EXPIRE_HOLDS = Operation("expire_holds", {"limit": 100})
LAPSE_DUE = Operation("lapse_due", {"limit": 100})


async def balance_of(ledger: ClockedLedger, user_id: uuid.UUID) -> tuple[int, int, int]:
    """(available, reserved, promotional)."""
    balance: Balance = await ledger.do(Operation("balance", {"user_id": user_id}))
    return balance.available_millicredits, balance.reserved_millicredits, balance.promotional_millicredits


async def spent(ledger: ClockedLedger, user_id: uuid.UUID) -> list[int]:
    """What is counted against each ceiling today."""
    async with ledger.engine.connect() as connection:
        return [ceiling.spent_today_millicredits for ceiling in await store.list_ceilings(connection, user_id=user_id)]


def shuffled(*operations: Operation) -> list[Operation]:
    return random.sample(operations, len(operations))


def outcomes(answers: list[Any]) -> Counter[Outcome]:
    return Counter(answer.outcome for answer in answers)


@pytest.fixture(params=["as they come", "one right after another"])
def queued(request: pytest.FixtureRequest) -> bool:
    return request.param == "one right after another"


@pytest.mark.parametrize("promotional", [False, True])
async def test_of_a_capture_a_release_and_an_expiry_exactly_one_ends_the_hold(clocked: ClockedLedger, queued: bool, promotional: bool):
    user_id = uuid.uuid4()
    await clocked.do(grant(user_id, 100_000))
    if promotional:
        await clocked.do(grant(user_id, 100_000, expire_time=START + 99 * DAY))
    paid = 0
    for _ in range(ROUNDS):
        held = reserve(user_id, 10, ttl=HOUR)
        await clocked.do(held)
        overdue = random.random() < 0.5
        if overdue:
            await clocked.advance(HOUR)
        operations = [capture(held, 7), release(held), EXPIRE_HOLDS, capture(held, 7), release(held), capture(held, 6)]
        captured, released, swept, captured_too, released_too, contradicted = await clocked.at_once(
            *operations, behind=user_id if queued else None
        )
        after = (await clocked.do(Operation("get_reservation", {"reservation_id": held.arguments["reservation_id"]}))).reservation
        assert (captured, released) == (captured_too, released_too) or {captured.outcome, captured_too.outcome} == {Outcome.OK}
        match after.state:
            case State.EXPIRED:
                assert overdue
                assert {one.outcome for one in (captured, released, contradicted)} == {Outcome.EXPIRED}
            case State.RELEASED:
                assert not overdue
                assert (captured.outcome, released.outcome, contradicted.outcome) == (Outcome.RELEASED, Outcome.OK, Outcome.RELEASED)
            case _:
                assert not overdue
                assert released.outcome is Outcome.CAPTURED
                assert (captured.outcome, contradicted.outcome) in [(Outcome.OK, Outcome.REUSED), (Outcome.REUSED, Outcome.OK)]
                paid += after.captured_millicredits
        assert swept in ([], [user_id])
        assert (swept == []) or overdue
        gone = paid if promotional else 0
        total = 200_000 if promotional else 100_000
        assert await balance_of(clocked, user_id) == (total - paid, 0, 100_000 - gone if promotional else 0)


@pytest.mark.parametrize("promotional", [0, 55, 105])
async def test_holds_on_a_small_balance_are_exactly_what_it_covers(clocked: ClockedLedger, queued: bool, promotional: int):
    for _ in range(ROUNDS):
        user_id = uuid.uuid4()
        if promotional < 105:
            await clocked.do(grant(user_id, 105 - promotional))
        for amount in (promotional // 2, promotional - promotional // 2):
            if amount:
                await clocked.do(grant(user_id, amount, expire_time=SOON))
        answers: list[ReservationAnswer] = await clocked.at_once(
            *(reserve(user_id, 10) for _ in range(14)), behind=user_id if queued else None
        )
        assert outcomes(answers) == {Outcome.OK: 10, Outcome.INSUFFICIENT: 4}
        assert {answer.available_millicredits for answer in answers if answer.outcome is Outcome.INSUFFICIENT} == {5}
        assert await balance_of(clocked, user_id) == (5, 100, max(0, promotional - 100))


async def test_the_same_hold_many_times_at_once_is_one_hold(clocked: ClockedLedger, queued: bool):
    for _ in range(ROUNDS):
        user_id = uuid.uuid4()
        await clocked.do(grant(user_id, 30, expire_time=SOON))
        await clocked.do(grant(user_id, 70))
        await clocked.do(set_ceiling(user_id, 80))
        held = reserve(user_id, 70)
        answers: list[ReservationAnswer] = await clocked.at_once(*[held] * 8, behind=user_id if queued else None)
        assert outcomes(answers) == {Outcome.OK: 8}
        assert all(answer == answers[0] for answer in answers)
        assert await balance_of(clocked, user_id) == (30, 70, 0)
        assert await spent(clocked, user_id) == [70]


async def test_one_id_for_the_holds_of_two_users_is_the_hold_of_one(clocked: ClockedLedger):
    for _ in range(2 * ROUNDS):
        users = [uuid.uuid4() for _ in range(4)]
        for user_id in users:
            await clocked.do(grant(user_id, 100))
            await clocked.do(set_ceiling(user_id, 100))
        first = reserve(users[0], 40)
        held = [Operation("reserve", {**first.arguments, "user_id": user_id}) for user_id in users]
        answers: list[ReservationAnswer] = await clocked.at_once(*held)
        assert outcomes(answers) == {Outcome.OK: 1, Outcome.REUSED: 3}
        assert sorted([await balance_of(clocked, user_id) for user_id in users]) == [(60, 40, 0)] + [(100, 0, 0)] * 3
        # What the others were refused is not counted against them.
        assert sorted([await spent(clocked, user_id) for user_id in users]) == [[0]] * 3 + [[40]]


async def test_holds_never_get_above_a_ceiling(clocked: ClockedLedger, queued: bool):
    for _ in range(ROUNDS):
        user_id, key = uuid.uuid4(), uuid.uuid4()
        await clocked.do(grant(user_id, 10_000))
        await clocked.do(set_ceiling(user_id, 75))
        await clocked.do(set_ceiling(user_id, 35, key))
        operations = shuffled(*(reserve(user_id, 10, api_key_id=key) for _ in range(6)), *(reserve(user_id, 10) for _ in range(8)))
        answers: list[ReservationAnswer] = await clocked.at_once(*operations, behind=user_id if queued else None)
        assert outcomes(answers) == {Outcome.OK: 7, Outcome.CEILING: 7}
        account, of_key = await spent(clocked, user_id)
        assert account == 70
        assert of_key <= 30
        assert (await balance_of(clocked, user_id))[1] == 70
        # A ceiling that was said to be reached was.
        for answer in answers:
            if answer.broken is not None:
                assert answer.broken.spent_millicredits + 10 > answer.broken.ceiling_millicredits


async def test_the_same_gift_many_times_at_once_is_given_once(clocked: ClockedLedger, queued: bool):
    for expire_time in [None, SOON] * (ROUNDS // 2):
        user_id = uuid.uuid4()
        if queued:
            await clocked.do(grant(user_id, 1))
        gift = grant(user_id, 50, expire_time=expire_time)
        answers: list[GrantAnswer] = await clocked.at_once(*[gift] * 8, behind=user_id if queued else None)
        assert outcomes(answers) == {Outcome.OK: 8}
        assert all(answer == answers[0] for answer in answers)
        assert (await balance_of(clocked, user_id))[0] == 51 if queued else 50


async def test_one_id_for_the_gifts_to_two_users_gives_to_one(clocked: ClockedLedger):
    for take in [grant, clawback] * ROUNDS:
        users = [uuid.uuid4() for _ in range(4)]
        for user_id in users:
            await clocked.do(grant(user_id, 10, expire_time=SOON))
            await clocked.do(grant(user_id, 90))
        first = take(users[0], 25)
        answers: list[GrantAnswer] = await clocked.at_once(
            *(Operation(first.name, {**first.arguments, "user_id": user_id}) for user_id in users)
        )
        assert outcomes(answers) == {Outcome.OK: 1, Outcome.REUSED: 3}
        changed = (125, 0, 10) if take is grant else (75, 0, 0)
        assert sorted([await balance_of(clocked, user_id) for user_id in users]) == sorted([changed] + [(100, 0, 10)] * 3)


async def test_what_is_taken_back_is_not_held_too(clocked: ClockedLedger, queued: bool):
    for _ in range(ROUNDS):
        user_id = uuid.uuid4()
        await clocked.do(grant(user_id, 60))
        await clocked.do(grant(user_id, 45, expire_time=SOON))
        operations = shuffled(*(clawback(user_id, 20) for _ in range(4)), *(reserve(user_id, 20) for _ in range(4)))
        answers = await clocked.at_once(*operations, behind=user_id if queued else None)
        assert outcomes(answers) == {Outcome.OK: 5, Outcome.INSUFFICIENT: 3}
        held = sum(
            operation.name == "reserve" and answer.outcome is Outcome.OK for operation, answer in zip(operations, answers, strict=True)
        )
        assert await balance_of(clocked, user_id) == (5, 20 * held, 0)


async def test_credits_that_lapse_are_not_held_too(clocked: ClockedLedger, queued: bool):
    for _ in range(ROUNDS):
        user_id = uuid.uuid4()
        await clocked.do(grant(user_id, 25))
        await clocked.do(grant(user_id, 40, expire_time=clocked.now + HOUR))
        before = reserve(user_id, 10, ttl=DAY)
        await clocked.do(before)
        await clocked.advance(HOUR)
        operations = [
            LAPSE_DUE,
            LAPSE_DUE,
            release(before),
            Operation("balance", {"user_id": user_id}),
            *(reserve(user_id, 10, ttl=DAY) for _ in range(4)),
        ]
        _, _, released, seen, *answers = await clocked.at_once(*shuffled_after(operations, 4), behind=user_id if queued else None)
        # Nothing of what was over is to be had, wherever it was: 25 cover two holds of 10.
        assert released.outcome is Outcome.OK
        assert outcomes(answers) == {Outcome.OK: 2, Outcome.INSUFFICIENT: 2}
        assert seen.promotional_millicredits == 0
        assert await balance_of(clocked, user_id) == (5, 20, 0)
        ((lapsed,),) = await clocked.query(
            "SELECT -sum(e.amount_millicredits) FROM credits.entries AS e JOIN credits.events USING (event_id)"
            " WHERE kind = 'lapse' AND user_id = :user_id",
            user_id=user_id,
        )
        assert lapsed == 40


def shuffled_after(operations: list[Operation], count: int) -> list[Operation]:
    return [*operations[:count], *shuffled(*operations[count:])]


async def test_a_hold_is_settled_right_while_credits_lapse_around_it(clocked: ClockedLedger, queued: bool):
    for _ in range(ROUNDS):
        user_id = uuid.uuid4()
        await clocked.do(grant(user_id, 10))
        await clocked.do(grant(user_id, 20, expire_time=clocked.now + HOUR))
        await clocked.do(grant(user_id, 30, expire_time=clocked.now + 2 * DAY))
        held, other = reserve(user_id, 25, ttl=DAY), reserve(user_id, 20, ttl=DAY)
        await clocked.do(held)
        await clocked.do(other)
        await clocked.advance(HOUR)
        captured, released, _, _ = await clocked.at_once(
            capture(held, 15), release(other), LAPSE_DUE, LAPSE_DUE, behind=user_id if queued else None
        )
        assert (captured.outcome, released.outcome) == (Outcome.OK, Outcome.OK)
        # Paid with 15 of the 20 that were over; the other 5 lapse; the rest is as it was.
        assert await balance_of(clocked, user_id) == (40, 0, 30)


async def test_a_month_of_a_plan_is_given_once_also_to_who_has_no_account_yet(clocked: ClockedLedger):
    for _ in range(ROUNDS):
        user_id = uuid.uuid4()
        month = {
            "user_id": user_id,
            "plan": "PLAN_PRO",
            "start_time": START,
            "end_time": START + 30 * DAY,
            "expire_time": START + 60 * DAY,
            "amount_millicredits": 10,
        }
        overlapping = {**month, "start_time": START + 29 * DAY, "end_time": START + 59 * DAY}
        answers = await clocked.at_once(
            *[Operation("grant_plan", month)] * 4, *[Operation("grant_plan", overlapping)] * 3, grant(user_id, 1)
        )
        *given, _ = answers
        assert Counter(given) == {"ok": 1, "known": 6}
        assert (await balance_of(clocked, user_id))[0] == 11


async def test_sweeps_of_many_replicas_leave_nothing_and_do_nothing_twice(clocked: ClockedLedger, queued: bool):
    for _ in range(2):
        users = [uuid.uuid4() for _ in range(20)]
        for place, user_id in enumerate(users):
            # The holds of the first are due first, and the credits of the last: the sweeps meet half-way, where an account is busy.
            earlier, later = timedelta(microseconds=len(users) - place), timedelta(microseconds=place)
            await clocked.do(grant(user_id, 10))
            await clocked.do(grant(user_id, 20, expire_time=clocked.now + HOUR - later))
            await clocked.do(set_ceiling(user_id, 100))
            for amount in (5, 6, 7):
                await clocked.do(reserve(user_id, amount, ttl=HOUR - earlier))
        await clocked.advance(HOUR)
        asked = [reserve(user_id, 3, ttl=DAY) for user_id in random.sample(users, 8)]
        answers = await clocked.at_once(*[EXPIRE_HOLDS] * 4, *[LAPSE_DUE] * 4, *asked, behind=users[len(users) // 2] if queued else None)
        swept = Counter[uuid.UUID]()
        for answer in answers[:4]:
            swept.update(answer)
        swept.update(await clocked.do(EXPIRE_HOLDS))  # who was busy is swept in the next round
        await clocked.do(LAPSE_DUE)
        assert swept == dict.fromkeys(users, 3)
        assert {answer.outcome for answer in answers[8:]} == {Outcome.OK}
        left = [await balance_of(clocked, user_id) for user_id in users]
        assert Counter(left) == {(10, 0, 0): 12, (7, 3, 0): 8}


async def test_the_counters_of_a_ceiling_that_is_set_amid_holds_are_right(clocked: ClockedLedger, queued: bool):
    for _ in range(ROUNDS):
        user_id, key = uuid.uuid4(), uuid.uuid4()
        await clocked.do(grant(user_id, 10_000))
        before = [reserve(user_id, 10, api_key_id=one) for one in (None, key)]
        for held in before:
            await clocked.do(held)
        operations = shuffled(
            set_ceiling(user_id, 1000),
            set_ceiling(user_id, 1000, key),
            set_ceiling(user_id, None),
            set_ceiling(user_id, 900),
            capture(before[0], 4),
            release(before[1]),
            *(reserve(user_id, 10, api_key_id=one) for one in (None, None, key, key)),
        )
        await clocked.at_once(*operations, behind=user_id if queued else None)
        counted = await spent(clocked, user_id)
        assert counted in ([44, 20], [20])  # that of the account may have been lifted last


# Functions that are stopped in the middle.

EARLY_GATE, LATE_GATE = 7, 8


async def test_a_hold_that_comes_to_be_while_it_is_settled_is_not_settled_beside_who_has_the_lock(clocked: ClockedLedger):
    """A capture so early that it finds no hold has no account to lock: it must not see the hold that comes a moment later."""
    user_id = uuid.uuid4()
    await clocked.do(grant(user_id, 10, expire_time=SOON))
    await clocked.do(grant(user_id, 90))
    held = reserve(user_id, 40)

    async def gated(operation: Operation, gate: int) -> Any:
        async with clocked.engine.connect() as connection:
            await connection.execute(sa.text(f"SET test_clock.gate = '{gate}'"))
            try:
                return await operation(connection)
            finally:
                await connection.execute(sa.text("RESET test_clock.gate"))

    async with clocked.locked(f"SELECT pg_advisory_xact_lock({LATE_GATE})"):
        async with clocked.locked(f"SELECT pg_advisory_xact_lock({EARLY_GATE})"):
            early = asyncio.create_task(gated(capture(held, 30), EARLY_GATE))
            await clocked.wait_until(lambda waiting: waiting == 1 or early.done())
            assert (await clocked.do(held)).outcome is Outcome.OK
            # This one has the account's lock, and stands still with it.
            late = asyncio.create_task(gated(release(held), LATE_GATE))
            await clocked.wait_until(lambda waiting: waiting == 2 - early.done())
        await clocked.wait_until(lambda waiting: waiting == 2 or early.done())
    first, second = await asyncio.gather(early, late)
    assert (first.outcome, second.outcome) == (Outcome.NOT_FOUND, Outcome.OK)
    assert await balance_of(clocked, user_id) == (100, 0, 10)
