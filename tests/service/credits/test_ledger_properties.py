"""The ledger against a model of it: any sequence of operations, on the real database, gives what the model says.

Operations that run at once have to give what the model says of them in some order, one after another.
"""

import asyncio
import uuid
from collections import Counter
from collections.abc import Coroutine, Mapping
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from credit_service import store
from credit_service.ledger import INT64_MAX, EntryQuery, Kind, ReceiptLine
from tests.service.credits.clocked_ledger import END, START, ClockedLedger, clocked_ledger
from tests.service.credits.ledger_model import Model, Operation, orders, see
from tests.service.stateful import run_machine

T = TypeVar("T")

EXAMPLES = 20
STEPS = 25
AT_ONCE_MAX = 6
ENTRIES_MAX = 10_000
HOUR = timedelta(hours=1)
PASSING = [timedelta(microseconds=1), HOUR, timedelta(hours=12), timedelta(days=1), timedelta(days=31)]
"""From one to the next: a hold is over, a lot is over, it is another day, another month."""
LIVES = [HOUR, timedelta(hours=2), timedelta(days=2), timedelta(days=40)]


def bounds() -> st.SearchStrategy[int | None]:
    return st.one_of(st.none(), st.integers(0, 1500))


class LedgerMachine(RuleBasedStateMachine):
    """Users with balances, promotional credits and ceilings; operations in any order, repeated, contradicted, at once."""

    run: ClassVar[asyncio.Runner]
    ledger: ClassVar[ClockedLedger]

    @initialize()
    def begin(self) -> None:
        self.do(self.ledger.start_over())
        self.model = Model(START)
        self.users = [uuid.uuid4() for _ in range(2)]
        self.keys = [None, uuid.uuid4(), uuid.uuid4()]
        self.admin = uuid.uuid4()
        self.asked: list[Operation] = []
        """What has an id, so that it can come again."""

    def do(self, operation: Coroutine[Any, Any, T]) -> T:
        return self.run.run(operation)

    # What can be asked for, as things stand.

    def moments(self) -> st.SearchStrategy[Any]:
        """Few, so that some are the same; seldom one in the past."""
        return st.sampled_from(LIVES + LIVES + [timedelta(0)]).map(lambda life: self.model.now + life)

    def operations(self) -> st.SearchStrategy[Operation]:
        user, key, amount = st.sampled_from(self.users), st.sampled_from(self.keys), st.integers(-1, 600)
        reservation_ids = st.sampled_from([*(asked.arguments["reservation_id"] for asked in self.holds_asked()), uuid.uuid4()])
        gift = {
            "actor_id": st.just(self.admin),
            "request_id": st.builds(uuid.uuid4),
            "user_id": user,
            "reason": st.just("why"),
        }
        kinds: dict[str, dict[str, st.SearchStrategy[Any]]] = {
            "grant": {
                **gift,
                "amount_millicredits": st.one_of(st.integers(-1, 1000), st.just(INT64_MAX)),
                "expire_time": st.one_of(st.none(), self.moments()),
            },
            "clawback": {**gift, "amount_millicredits": amount},
            "grant_plan": {
                "user_id": user,
                "plan": st.sampled_from(["PLAN_FREE", "PLAN_PRO"]),
                "start_time": self.moments().map(lambda moment: moment - max(LIVES) - HOUR),
                "end_time": self.moments(),
                "expire_time": self.moments().map(lambda moment: moment + max(LIVES)),
                "amount_millicredits": st.integers(0, 400),
            },
            "reserve": {
                "reservation_id": st.builds(uuid.uuid4),
                "job_id": st.builds(uuid.uuid4),
                "user_id": user,
                "amount_millicredits": amount,
                "ttl": st.sampled_from([timedelta(microseconds=1), HOUR, timedelta(days=3)]),
                "model": st.sampled_from(["", "fast"]),
                "api_key_id": key,
            },
            "capture": {
                "reservation_id": reservation_ids,
                "amount_millicredits": st.one_of(st.integers(-1, 650), st.just(INT64_MAX)),
            },
            "release": {"reservation_id": reservation_ids},
            "get_reservation": {"reservation_id": reservation_ids},
            "balance": {"user_id": user},
            "expire_holds": {"limit": st.just(100)},
            "lapse_due": {"limit": st.just(100)},
            "set_ceiling": {"user_id": user, "api_key_id": key, "daily_millicredits": bounds(), "monthly_millicredits": bounds()},
        }
        strategies = [st.builds(Operation, st.just(name), st.fixed_dictionaries(arguments)) for name, arguments in kinds.items()]
        strategies += [strategies[0], strategies[3], strategies[3], strategies[4], strategies[4], self.whole_captures()]
        if self.asked:
            strategies.append(st.sampled_from(self.asked).flatmap(self.repeats))
        return st.one_of(strategies)

    def whole_captures(self) -> st.SearchStrategy[Operation]:
        """All of a hold, with a receipt."""
        holds = [asked.arguments for asked in self.holds_asked() if asked.arguments["amount_millicredits"] > 1]
        if not holds:
            return st.just(Operation("lapse_due", {"limit": 100}))

        def whole(hold: Mapping[str, Any]) -> Operation:
            amount = hold["amount_millicredits"]
            lines = (ReceiptLine("first", 1, "image", 1), ReceiptLine("rest", 2, "s", amount - 1))
            return Operation("capture", {"reservation_id": hold["reservation_id"], "amount_millicredits": amount, "lines": lines})

        return st.sampled_from(holds).map(whole)

    def holds_asked(self) -> list[Operation]:
        """Also those that were refused: of operations at once other ones are each time, and what is drawn must not depend on it."""
        return [asked for asked in self.asked if asked.name == "reserve"]

    def repeats(self, known: Operation) -> st.SearchStrategy[Operation]:
        """The same again, or the same id with something else about it."""
        changes: dict[str, Any] = {
            "user_id": next(user for user in self.users if user != known.arguments["user_id"]),
            "amount_millicredits": max(known.arguments["amount_millicredits"] - 1, 1),
            "reason": "other",
            "expire_time": START + timedelta(days=365),
            "job_id": uuid.UUID(int=1),
            "ttl": timedelta(seconds=7),
            "model": "slow",
            "api_key_id": uuid.UUID(int=2),
            "actor_id": uuid.UUID(int=3),
        }
        fields = sorted(changes.keys() & known.arguments.keys())
        return st.sampled_from([None] * len(fields) + fields).map(
            lambda name: known if name is None else Operation(known.name, {**known.arguments, name: changes[name]})
        )

    # What happens.

    def remember(self, operation: Operation) -> None:
        if operation.name in ("grant", "clawback", "reserve"):
            self.asked.append(operation)

    @rule(data=st.data())
    def one_operation(self, data: st.DataObject) -> None:
        operation = data.draw(self.operations())
        answer = self.do(self.ledger.do(operation))
        assert answer == operation.on(self.model)
        self.remember(operation)

    @rule(data=st.data(), behind=st.booleans())
    def operations_at_once(self, data: st.DataObject, behind: bool) -> None:
        operations = data.draw(st.lists(self.operations(), min_size=2, max_size=AT_ONCE_MAX))
        if data.draw(st.booleans()):
            operations[1] = operations[0]
        answers = self.do(self.ledger.at_once(*operations, behind=self.users[0] if behind else None))
        note(f"answers: {answers}")
        seen = self.do(see(self.ledger, self.users))
        explained = next(
            (after for after in orders(self.model, list(zip(operations, answers, strict=True))) if after.seen(self.users) == seen), None
        )
        assert explained is not None, "no order of the operations has these answers and this end"
        self.model = explained
        for operation in operations:
            self.remember(operation)

    @rule(duration=st.sampled_from(PASSING))
    def time_passes(self, duration: timedelta) -> None:
        self.do(self.ledger.advance(duration))
        self.model.set_time(self.ledger.now)

    @rule()
    def everything_due_is_swept(self) -> None:
        sweep = Operation("expire_holds", {"limit": 100})
        assert self.do(self.ledger.do(sweep)) == sweep.on(self.model)
        lapsed = self.do(self.ledger.do(lambda connection: store.lapse_due(connection, limit=100)))
        assert {(swept.user_id, swept.problem) for swept in lapsed} <= {(user_id, None) for user_id in self.users}
        assert self.do(self.ledger.do(lambda connection: store.lapse_due(connection, limit=100))) == []

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        assert self.do(see(self.ledger, self.users)) == self.model.seen(self.users)

    def teardown(self) -> None:
        if not hasattr(self, "model"):
            return
        self.do(self.ledger.set_time(END))
        self.model.set_time(END)
        self.everything_due_is_swept()
        self.everything_is_as_the_model_says()
        self.do(self.ledger.check_books())
        for user in self.users:
            query = EntryQuery(user)
            entries = self.do(
                self.ledger.do(lambda connection, query=query: store.list_entries(connection, query, before=None, limit=ENTRIES_MAX))
            )
            totals: Counter[Kind] = Counter()
            for entry in entries:
                totals[entry.kind] += entry.amount_millicredits
            assert {kind: total for kind, total in totals.items() if total} == {
                kind: total for kind, total in self.model.accounts[user].totals.items() if total
            }


def test_any_sequence_of_operations_alone_and_at_once_keeps_the_books(shared_clocked_ledger: ClockedLedger):
    with asyncio.Runner() as runner:
        opened = clocked_ledger(shared_clocked_ledger.url)
        ledger = runner.run(opened.__aenter__())
        try:
            LedgerMachine.run, LedgerMachine.ledger = runner, ledger
            run_machine(LedgerMachine, examples=EXAMPLES, steps=STEPS)
        finally:
            runner.run(opened.__aexit__(None, None, None))
