"""The ledger against a model of it: any sequence of operations, on the real database, gives what the model says."""

import asyncio
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import sqlalchemy as sa
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from sqlalchemy.ext.asyncio import AsyncConnection

from credit_service import app, store
from credit_service.ledger import Balance, Outcome, ReservationAnswer, State
from credit_service.settings import CreditSettings
from tests.service.stateful import run_machine

T = TypeVar("T")

INT64_MAX = 2**63 - 1
EXAMPLES = 40
STEPS = 25
TTLS = {"long": timedelta(hours=1), "over": timedelta(microseconds=1)}


@dataclass
class Hold:
    """What the model knows of a reservation. One that is `overdue` is held until somebody looks."""

    reservation_id: uuid.UUID
    user: int
    amount: int
    ttl: timedelta
    state: State = State.HELD
    captured: int = 0
    job_id: uuid.UUID = field(default_factory=uuid.uuid4)

    @property
    def overdue(self) -> bool:
        return self.state is State.HELD and self.ttl == TTLS["over"]


class LedgerMachine(RuleBasedStateMachine):
    """Users with balances, holds in every state; the operations in any order, repeated and contradicted."""

    run: ClassVar[asyncio.Runner]
    connection: ClassVar[AsyncConnection]

    holds = Bundle("holds")
    grants = Bundle("grants")

    @initialize()
    def begin(self) -> None:
        self.users = [uuid.uuid4() for _ in range(2)]
        self.available = [0, 0]
        self.reserved = [0, 0]
        self.all_holds: list[Hold] = []

    def do(self, operation: Coroutine[Any, Any, T]) -> T:
        return self.run.run(operation)

    def look_at(self, hold: Hold) -> None:
        """Whoever operates on an overdue hold ends it."""
        if hold.overdue:
            self.end(hold, State.EXPIRED, 0)

    def end(self, hold: Hold, state: State, captured: int) -> None:
        hold.state, hold.captured = state, captured
        self.reserved[hold.user] -= hold.amount
        self.available[hold.user] += hold.amount - captured

    def check(self, answer: ReservationAnswer, outcome: Outcome, hold: Hold) -> None:
        assert answer.outcome is outcome
        if answer.reservation is not None:
            shown = answer.reservation
            assert (shown.reservation_id, shown.job_id, shown.user_id) == (hold.reservation_id, hold.job_id, self.users[hold.user])
            assert (shown.state, shown.amount_millicredits, shown.captured_millicredits) == (hold.state, hold.amount, hold.captured)

    @rule(target=grants, user=st.integers(0, 1), amount=st.one_of(st.integers(-1, 1000), st.just(INT64_MAX)))
    def grant(self, user: int, amount: int) -> Any:
        request: dict[str, Any] = {
            "actor_id": uuid.uuid4(),
            "request_id": uuid.uuid4(),
            "user_id": self.users[user],
            "amount_millicredits": amount,
            "reason": "why",
        }
        answer = self.do(store.grant(self.connection, **request))
        if not 1 <= amount <= INT64_MAX - self.available[user] - self.reserved[user]:
            assert answer.outcome is Outcome.AMOUNT_OUT_OF_RANGE
            return multiple()
        self.available[user] += amount
        assert answer.balance == Balance(self.available[user], self.reserved[user])
        return request, answer

    @rule(known=grants, other_reason=st.booleans())
    def grant_again(self, known: Any, other_reason: bool) -> None:
        request, first = known
        again: dict[str, Any] = {**request, "reason": "other" if other_reason else "why"}
        answer = self.do(store.grant(self.connection, **again))
        if other_reason:
            assert answer.outcome is Outcome.REUSED
        else:
            assert answer == first

    @rule(target=holds, user=st.integers(0, 1), amount=st.integers(-1, 600), ttl=st.sampled_from(sorted(TTLS)))
    def reserve(self, user: int, amount: int, ttl: str) -> Any:
        hold = Hold(uuid.uuid4(), user, amount, TTLS[ttl])
        answer = self.do(self.ask_for(hold))
        if amount < 1:
            assert answer.outcome is Outcome.AMOUNT_OUT_OF_RANGE
            return multiple()
        if amount > self.available[user]:
            assert (answer.outcome, answer.available_millicredits) == (Outcome.INSUFFICIENT, self.available[user])
            return multiple()
        self.check(answer, Outcome.OK, hold)
        self.available[user] -= amount
        self.reserved[user] += amount
        self.all_holds.append(hold)
        return hold

    @rule(hold=holds, change=st.sampled_from(["nothing", "amount", "user", "ttl", "job"]))
    def reserve_again(self, hold: Hold, change: str) -> None:
        asked = Hold(hold.reservation_id, hold.user, hold.amount, hold.ttl, job_id=hold.job_id)
        match change:
            case "amount":
                asked.amount += 1
            case "user":
                asked.user = 1 - asked.user
            case "ttl":
                asked.ttl += timedelta(seconds=1)
            case "job":
                asked.job_id = uuid.uuid4()
            case _:
                self.look_at(hold)
        self.check(self.do(self.ask_for(asked)), Outcome.OK if change == "nothing" else Outcome.REUSED, hold)

    def ask_for(self, hold: Hold) -> Coroutine[Any, Any, ReservationAnswer]:
        return store.reserve(
            self.connection,
            reservation_id=hold.reservation_id,
            job_id=hold.job_id,
            user_id=self.users[hold.user],
            amount_millicredits=hold.amount,
            ttl=hold.ttl,
        )

    @rule(hold=holds, amount=st.one_of(st.integers(-1, 700), st.just(INT64_MAX), st.none()))
    def capture(self, hold: Hold, amount: int | None) -> None:
        wanted = hold.amount if amount is None else amount
        self.look_at(hold)
        answer = self.do(store.capture(self.connection, reservation_id=hold.reservation_id, amount_millicredits=wanted))
        if hold.state is State.CAPTURED:
            outcome = Outcome.OK if hold.captured == wanted else Outcome.REUSED
        elif hold.state is not State.HELD:
            outcome = Outcome(hold.state)
        elif not 1 <= wanted <= hold.amount:
            outcome = Outcome.AMOUNT_OUT_OF_RANGE
        else:
            self.end(hold, State.CAPTURED, wanted)
            outcome = Outcome.OK
        self.check(answer, outcome, hold)

    @rule(hold=holds)
    def release(self, hold: Hold) -> None:
        self.look_at(hold)
        answer = self.do(store.release(self.connection, reservation_id=hold.reservation_id))
        if hold.state is State.HELD:
            self.end(hold, State.RELEASED, 0)
        self.check(answer, Outcome.OK if hold.state is State.RELEASED else Outcome(hold.state), hold)

    @rule()
    def expire_due(self) -> None:
        due = [hold for hold in self.all_holds if hold.overdue]
        assert self.do(store.expire_due(self.connection, limit=1000)) == len(due)
        for hold in due:
            self.look_at(hold)

    @invariant()
    def balances_are_what_the_model_says(self) -> None:
        for user, available, reserved in zip(self.users, self.available, self.reserved, strict=True):
            assert self.do(store.balance(self.connection, user_id=user)) == Balance(available, reserved)

    def teardown(self) -> None:
        async def discrepancies() -> int:
            # Holds of this example that are overdue still must not be counted by the next one.
            await store.expire_due(self.connection, limit=1000)
            return (await self.connection.execute(sa.text("SELECT count(*) FROM credits.discrepancies"))).scalar_one()

        assert self.do(discrepancies()) == 0


def test_any_sequence_of_operations_keeps_the_books(credit_settings: CreditSettings):
    with asyncio.Runner() as runner:
        engine = app.create_engine(credit_settings)
        connection = runner.run(engine.connect().__aenter__())
        try:
            runner.run(store.expire_due(connection, limit=1000))
            LedgerMachine.run, LedgerMachine.connection = runner, connection
            run_machine(LedgerMachine, examples=EXAMPLES, steps=STEPS)
        finally:
            runner.run(connection.close())
            runner.run(engine.dispose())
