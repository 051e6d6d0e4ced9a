"""What the ledger promises, in memory: the functions of `store` with the same arguments and answers.

Promotional credits are gone here the moment their time is over; the ledger takes them away when it next looks, which nobody sees.
"""

import copy
import itertools
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from credit_service import store
from credit_service.ledger import (
    INT64_MAX,
    KEY_CEILINGS_MAX,
    Balance,
    BrokenCeiling,
    Ceiling,
    GrantAnswer,
    Kind,
    Outcome,
    ReceiptLine,
    Reservation,
    ReservationAnswer,
    State,
)
from tests.service.credits.clocked_ledger import ClockedLedger

DAY = timedelta(days=1)


@dataclass
class Lot:
    """Credits that expire together."""

    expire_time: datetime
    available: int
    reserved: int = 0
    plan: str = ""


@dataclass
class Account:
    """What a user has. `available` includes what is promotional; `totals` is what each kind of event brought or took in all."""

    available: int = 0
    reserved: int = 0
    lots: list[Lot] = field(default_factory=list[Lot])
    ceilings: dict[uuid.UUID | None, tuple[int | None, int | None]] = field(
        default_factory=dict[uuid.UUID | None, tuple[int | None, int | None]]
    )
    totals: Counter[Kind] = field(default_factory=Counter[Kind])

    def in_spending_order(self) -> list[Lot]:
        """The lots, the first to be spent first: of those that expire together the older."""
        return sorted(self.lots, key=lambda lot: lot.expire_time)


@dataclass
class Hold:
    """A reservation, and what it took from which lots (by their place in `Account.lots`)."""

    shown: Reservation
    ttl: timedelta
    api_key_id: uuid.UUID | None
    taken: list[tuple[int, int]]

    @property
    def spent(self) -> int:
        """What counts against ceilings."""
        return self.shown.amount_millicredits if self.shown.state is State.HELD else self.shown.captured_millicredits


@dataclass(frozen=True)
class Seen:
    """All that can be seen of the accounts of some users."""

    balances: dict[uuid.UUID, Balance]
    lots: dict[uuid.UUID, list[tuple[datetime, int, int]]]
    """Of each user, in spending order: when it expires, what of it is available, what reserved."""
    ceilings: dict[uuid.UUID, list[Ceiling]]
    holds: dict[uuid.UUID, tuple[State, int]]


class Model:
    """The ledger at one moment. Copy it to try what could happen next."""

    def __init__(self, now: datetime) -> None:
        self.now = now
        self.accounts: defaultdict[uuid.UUID, Account] = defaultdict(Account)
        self.holds: dict[uuid.UUID, Hold] = {}
        self.gifts: dict[tuple[str, uuid.UUID, uuid.UUID], tuple[Mapping[str, Any], GrantAnswer]] = {}
        self.plan_ends: defaultdict[tuple[uuid.UUID, str], list[datetime]] = defaultdict(list)

    def copy(self) -> "Model":
        """The same, to be changed on its own."""
        return copy.deepcopy(self)

    def set_time(self, moment: datetime) -> None:
        """Let time pass: promotional credits may be over."""
        self.now = moment
        for account in self.accounts.values():
            self._lapse(account)

    def _lapse(self, account: Account, plan: str = "") -> None:
        """Take away what is over, or what is left of a plan."""
        for lot in account.lots:
            if lot.available and (lot.expire_time <= self.now or (plan and lot.plan == plan)):
                account.available -= lot.available
                account.totals[Kind.LAPSE] -= lot.available
                lot.available = 0

    # The operations.

    def grant(self, *, expire_time: datetime | None = None, **request: Any) -> GrantAnswer:
        amount: int = request["amount_millicredits"]
        if amount < 1:
            return GrantAnswer(Outcome.AMOUNT_OUT_OF_RANGE, None)
        key = ("grant", request["actor_id"], request["request_id"])
        whole = {**request, "expire_time": expire_time}
        if key in self.gifts:
            return self._again(key, whole)
        if not self._fits(request["user_id"], amount):
            return GrantAnswer(Outcome.AMOUNT_OUT_OF_RANGE, None)
        if expire_time is not None and expire_time <= self.now:
            return GrantAnswer(Outcome.EXPIRE_TIME_PASSED, None)
        account = self._give(request["user_id"], Kind.GRANT, amount, expire_time)
        return self._first_time(key, whole, account)

    def clawback(self, **request: Any) -> GrantAnswer:
        amount: int = request["amount_millicredits"]
        if amount < 1:
            return GrantAnswer(Outcome.AMOUNT_OUT_OF_RANGE, None)
        key = ("clawback", request["actor_id"], request["request_id"])
        if key in self.gifts:
            return self._again(key, request)
        account = self.accounts[request["user_id"]]
        if account.available < amount:
            return GrantAnswer(Outcome.INSUFFICIENT, None, account.available)
        for place, taken in self._draw(account, amount):
            account.lots[place].available -= taken
        account.available -= amount
        account.totals[Kind.CLAWBACK] -= amount
        return self._first_time(key, request, account)

    def grant_plan(
        self,
        *,
        user_id: uuid.UUID,
        plan: str,
        start_time: datetime,
        end_time: datetime,
        expire_time: datetime,
        amount_millicredits: int,
    ) -> str:
        if any(end > start_time for end in self.plan_ends[user_id, plan]):
            return store.PLAN_GRANT_KNOWN
        if amount_millicredits < 1 or not self._fits(user_id, amount_millicredits):
            return str(Outcome.AMOUNT_OUT_OF_RANGE)
        self.plan_ends[user_id, plan].append(end_time)
        account = self.accounts[user_id]
        self._lapse(account, plan)
        self._give(user_id, Kind.PLAN_GRANT, amount_millicredits, expire_time)
        account.lots[-1].plan = plan
        return store.PLAN_GRANTED

    def reserve(
        self,
        *,
        reservation_id: uuid.UUID,
        job_id: uuid.UUID,
        user_id: uuid.UUID,
        amount_millicredits: int,
        ttl: timedelta,
        model: str = "",
        api_key_id: uuid.UUID | None = None,
    ) -> ReservationAnswer:
        if amount_millicredits < 1:
            return ReservationAnswer(Outcome.AMOUNT_OUT_OF_RANGE, None)
        known = self.holds.get(reservation_id)
        if known is not None:
            shown = known.shown
            # The model explains the hold, and is no part of it.
            same = (shown.job_id, shown.user_id, shown.amount_millicredits, known.ttl, known.api_key_id)
            if same != (job_id, user_id, amount_millicredits, ttl, api_key_id):
                return ReservationAnswer(Outcome.REUSED, None)
            self._look_at(known)
            return ReservationAnswer(Outcome.OK, known.shown)
        account = self.accounts[user_id]
        if account.available < amount_millicredits:
            return ReservationAnswer(Outcome.INSUFFICIENT, None, account.available)
        broken = self._broken(user_id, api_key_id, amount_millicredits)
        if broken is not None:
            return ReservationAnswer(Outcome.CEILING, None, broken=broken)
        taken = self._draw(account, amount_millicredits)
        for place, amount in taken:
            account.lots[place].available -= amount
            account.lots[place].reserved += amount
        account.available -= amount_millicredits
        account.reserved += amount_millicredits
        shown = Reservation(reservation_id, job_id, user_id, State.HELD, amount_millicredits, 0, self.now + ttl, self.now, model)
        self.holds[reservation_id] = Hold(shown, ttl, api_key_id, taken)
        return ReservationAnswer(Outcome.OK, shown)

    def capture(self, *, reservation_id: uuid.UUID, amount_millicredits: int, lines: Sequence[ReceiptLine] = ()) -> ReservationAnswer:
        hold = self.holds.get(reservation_id)
        if hold is None:
            return ReservationAnswer(Outcome.NOT_FOUND, None)
        self._look_at(hold)
        if hold.shown.state is State.CAPTURED:
            same = hold.shown.captured_millicredits == amount_millicredits
            return ReservationAnswer(Outcome.OK if same else Outcome.REUSED, hold.shown)
        if hold.shown.state is not State.HELD:
            return ReservationAnswer(Outcome(hold.shown.state), hold.shown)
        if not 1 <= amount_millicredits <= hold.shown.amount_millicredits:
            return ReservationAnswer(Outcome.AMOUNT_OUT_OF_RANGE, hold.shown)
        self._end(hold, State.CAPTURED, amount_millicredits)
        return ReservationAnswer(Outcome.OK, hold.shown)

    def release(self, *, reservation_id: uuid.UUID) -> ReservationAnswer:
        hold = self.holds.get(reservation_id)
        if hold is None:
            return ReservationAnswer(Outcome.NOT_FOUND, None)
        self._look_at(hold)
        if hold.shown.state is State.HELD:
            self._end(hold, State.RELEASED, 0)
        return ReservationAnswer(Outcome.OK if hold.shown.state is State.RELEASED else Outcome(hold.shown.state), hold.shown)

    def get_reservation(self, *, reservation_id: uuid.UUID) -> ReservationAnswer:
        hold = self.holds.get(reservation_id)
        if hold is None:
            return ReservationAnswer(Outcome.NOT_FOUND, None)
        return ReservationAnswer(Outcome.OK, replace(hold.shown, state=State.EXPIRED) if self._overdue(hold) else hold.shown)

    def expire_holds(self, *, limit: int) -> list[uuid.UUID]:
        due = [hold for hold in self.holds.values() if self._overdue(hold)]
        assert len(due) <= limit, "which of them are first is not predicted"
        for hold in due:
            self._look_at(hold)
        return sorted(hold.shown.user_id for hold in due)

    def expire(self, reservation_id: uuid.UUID) -> None:
        """End a hold whose time is over."""
        self._look_at(self.holds[reservation_id])

    def lapse_due(self, *, limit: int) -> None:
        """Who is looked at first is the ledger's business; nobody can tell."""

    def set_ceiling(
        self, *, user_id: uuid.UUID, api_key_id: uuid.UUID | None, daily_millicredits: int | None, monthly_millicredits: int | None
    ) -> tuple[Outcome, Ceiling | None]:
        ceilings = self.accounts[user_id].ceilings
        if daily_millicredits is None and monthly_millicredits is None:
            ceilings.pop(api_key_id, None)
        elif api_key_id is not None and len(ceilings.keys() - {None, api_key_id}) >= KEY_CEILINGS_MAX:
            return Outcome.TOO_MANY, None
        else:
            ceilings[api_key_id] = (daily_millicredits, monthly_millicredits)
        spent = self._spent(user_id, api_key_id)
        return Outcome.OK, Ceiling(api_key_id, daily_millicredits, monthly_millicredits, *spent)

    def balance(self, *, user_id: uuid.UUID) -> Balance:
        account = self.accounts[user_id]
        expiries = [lot.expire_time for lot in account.lots if lot.available]
        promotional = sum(lot.available for lot in account.lots)
        return Balance(account.available, account.reserved, promotional, min(expiries, default=None))

    def seen(self, user_ids: Sequence[uuid.UUID]) -> Seen:
        """What is to be seen."""
        return Seen(
            balances={user_id: self.balance(user_id=user_id) for user_id in user_ids},
            lots={
                user_id: [
                    (lot.expire_time, lot.available, lot.reserved)
                    for lot in self.accounts[user_id].in_spending_order()
                    if lot.available or lot.reserved
                ]
                for user_id in user_ids
            },
            ceilings={
                user_id: [
                    Ceiling(api_key_id, *bounds, *self._spent(user_id, api_key_id))
                    for api_key_id, bounds in sorted(self.accounts[user_id].ceilings.items(), key=lambda item: item[0] or uuid.UUID(int=0))
                ]
                for user_id in user_ids
            },
            holds={
                reservation_id: (hold.shown.state, hold.shown.captured_millicredits)
                for reservation_id, hold in self.holds.items()
                if hold.shown.user_id in user_ids
            },
        )

    # Their parts.

    def _again(self, key: tuple[str, uuid.UUID, uuid.UUID], request: Mapping[str, Any]) -> GrantAnswer:
        first, answer = self.gifts[key]
        return answer if request == first else GrantAnswer(Outcome.REUSED, None)

    def _first_time(self, key: tuple[str, uuid.UUID, uuid.UUID], request: Mapping[str, Any], account: Account) -> GrantAnswer:
        answer = GrantAnswer(Outcome.OK, Balance(account.available, account.reserved), account.available)
        self.gifts[key] = (request, answer)
        return answer

    def _fits(self, user_id: uuid.UUID, amount: int) -> bool:
        account = self.accounts[user_id]
        return amount <= INT64_MAX - account.available - account.reserved

    def _give(self, user_id: uuid.UUID, kind: Kind, amount: int, expire_time: datetime | None) -> Account:
        account = self.accounts[user_id]
        account.available += amount
        account.totals[kind] += amount
        if expire_time is not None:
            account.lots.append(Lot(expire_time, amount))
            self._lapse(account)
        return account

    def _draw(self, account: Account, amount: int) -> list[tuple[int, int]]:
        taken: list[tuple[int, int]] = []
        for lot in account.in_spending_order():
            part = min(lot.available, amount)
            if part:
                taken.append((next(place for place, other in enumerate(account.lots) if other is lot), part))
                amount -= part
        return taken

    def _overdue(self, hold: Hold) -> bool:
        return hold.shown.state is State.HELD and hold.shown.expire_time <= self.now

    def _look_at(self, hold: Hold) -> None:
        """Whoever operates on an overdue hold ends it."""
        if self._overdue(hold):
            self._end(hold, State.EXPIRED, 0)

    def _end(self, hold: Hold, state: State, captured: int) -> None:
        amount, account = hold.shown.amount_millicredits, self.accounts[hold.shown.user_id]
        hold.shown = replace(hold.shown, state=state, captured_millicredits=captured)
        account.reserved -= amount
        account.available += amount - captured
        account.totals[Kind.CAPTURE] -= captured
        for place, part in hold.taken:
            paid = min(part, captured)
            captured -= paid
            account.lots[place].reserved -= part
            account.lots[place].available += part - paid
        self._lapse(account)

    def _spent(self, user_id: uuid.UUID, api_key_id: uuid.UUID | None) -> tuple[int, int]:
        """Of an account or an API key, today and this month."""
        counted = [hold for hold in self.holds.values() if hold.shown.user_id == user_id and api_key_id in (None, hold.api_key_id)]
        today = self.now.date()
        this_month = [hold for hold in counted if hold.shown.create_time.date().replace(day=1) == today.replace(day=1)]
        return sum(hold.spent for hold in this_month if hold.shown.create_time.date() == today), sum(hold.spent for hold in this_month)

    def _broken(self, user_id: uuid.UUID, api_key_id: uuid.UUID | None, amount: int) -> BrokenCeiling | None:
        midnight = datetime.combine(self.now.date() + DAY, datetime.min.time(), UTC)
        next_month = datetime.combine((self.now.date().replace(day=1) + 31 * DAY).replace(day=1), datetime.min.time(), UTC)
        for key in (None, api_key_id) if api_key_id else (None,):
            bounds = self.accounts[user_id].ceilings.get(key, (None, None))
            periods = (("day", midnight), ("month", next_month))
            for bound, spent, (period, reset_time) in zip(bounds, self._spent(user_id, key), periods, strict=True):
                if bound is not None and spent + amount > bound:
                    return BrokenCeiling(key, period, bound, spent, reset_time)
        return None


@dataclass(frozen=True)
class Operation:
    """One call of a function of `store`, which the model knows as well."""

    name: str
    arguments: Mapping[str, Any]

    async def __call__(self, connection: AsyncConnection) -> Any:
        """What the ledger answers."""
        return comparable(self.name, await getattr(store, self.name)(connection, **self.arguments))

    def on(self, model: Model) -> Any:
        """What the model answers."""
        return getattr(model, self.name)(**self.arguments)


_LOTS = sa.text(
    "SELECT user_id, expire_time, CASE WHEN expire_time > clock_timestamp() THEN available_millicredits ELSE 0 END AS available,"
    " reserved_millicredits AS reserved FROM credits.lots"
    " WHERE user_id = ANY (:user_ids) AND (reserved_millicredits > 0 OR available_millicredits > 0 AND expire_time > clock_timestamp())"
    " ORDER BY expire_time, lot_id"
)
_HOLDS = sa.text("SELECT reservation_id, state, captured_millicredits FROM credits.reservations WHERE user_id = ANY (:user_ids)")


async def see(ledger: ClockedLedger, user_ids: Sequence[uuid.UUID]) -> Seen:
    """What is to be seen in the ledger."""
    async with ledger.engine.connect() as connection:
        balances = await store.balances(connection, user_ids)
        lots: dict[uuid.UUID, list[tuple[datetime, int, int]]] = {user_id: [] for user_id in user_ids}
        for row in await connection.execute(_LOTS, {"user_ids": user_ids}):
            lots[row.user_id].append((row.expire_time, row.available, row.reserved))
        holds = await connection.execute(_HOLDS, {"user_ids": user_ids})
        return Seen(
            balances={user_id: replace(balances.get(user_id, Balance(0, 0)), version=0) for user_id in user_ids},
            lots=lots,
            ceilings={user_id: await store.list_ceilings(connection, user_id=user_id) for user_id in user_ids},
            holds={row.reservation_id: (State(row.state), row.captured_millicredits) for row in holds},
        )


def comparable(name: str, answer: Any) -> Any:
    """An answer without what the model does not predict."""
    match name:
        case "balance":
            return replace(answer, version=0)
        case "expire_holds":
            assert all(swept.problem is None for swept in answer)
            return sorted(swept.user_id for swept in answer)
        case "lapse_due":
            return None
        case "set_ceiling" if answer[0] is Outcome.TOO_MANY:
            return Outcome.TOO_MANY, None
        case _:
            return answer


def orders(model: Model, answered: Sequence[tuple[Operation, Any]]) -> Iterator[Model]:
    """Where the model can be after all the operations: one of them for each order in which their answers are right."""
    if not answered:
        yield model
    for place, (operation, answer) in enumerate(answered):
        rest = [*answered[:place], *answered[place + 1 :]]
        for after in explanations(model, operation, answer):
            yield from orders(after, rest)


def explanations(model: Model, operation: Operation, answer: Any) -> Iterator[Model]:
    """Where the model can be after an operation with this answer. A sweep leaves accounts out that are busy."""
    if operation.name != "expire_holds":
        after = model.copy()
        if operation.on(after) == answer:
            yield after
        return
    due: defaultdict[uuid.UUID, list[uuid.UUID]] = defaultdict(list)
    for reservation_id, hold in model.holds.items():
        if hold.shown.state is State.HELD and hold.shown.expire_time <= model.now:
            due[hold.shown.user_id].append(reservation_id)
    swept = Counter(answer)
    for choice in itertools.product(*(itertools.combinations(due[user_id], count) for user_id, count in swept.items())):
        after = model.copy()
        for reservation_id in itertools.chain.from_iterable(choice):
            after.expire(reservation_id)
        yield after
