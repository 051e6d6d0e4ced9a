"""All SQL of credit_service. Functions take the caller's connection.

Each write is one call of a stored function, a transaction in itself: on a connection in autocommit it costs one round trip.
"""

import json
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from credit_service.ledger import (
    KEY_CEILINGS_MAX,
    Account,
    AuditSummary,
    Balance,
    BrokenCeiling,
    Ceiling,
    Discrepancy,
    Entry,
    EntryQuery,
    GrantAnswer,
    Kind,
    Outcome,
    Promotion,
    ReceiptLine,
    Reservation,
    ReservationAnswer,
    State,
    Swept,
)
from credit_service.payments import OPEN_TOP_UPS_MAX, Checkout, EventAnswer, EventOutcome, PaymentEvent, TopUp, TopUpQuery
from credit_service.payments import State as TopUpState
from credit_service.prices import CreditPackage
from credit_service.tables import ceilings, clawbacks, entries, events, grants, lots, reservations, rounds, top_ups
from servicekit.database import fetch_row

WHOLE_ACCOUNT = UUID(int=0)
"""Stands in the table of ceilings where no API key is meant."""
PROMOTIONS_MAX = 100

_GRANT = sa.text("SELECT * FROM credits.grant_credits(:actor_id, :request_id, :user_id, :amount, :reason, :expire_time)").bindparams(
    sa.bindparam("expire_time", type_=sa.TIMESTAMP(timezone=True))
)
_CLAWBACK = sa.text("SELECT * FROM credits.clawback(:actor_id, :request_id, :user_id, :amount, :reason)")
# What every job does: by `fetch_row`, which takes an engine as well as a connection.
_RESERVE = "SELECT * FROM credits.reserve($1, $2, $3, $4, $5, $6, $7)"
_CAPTURE = "SELECT * FROM credits.capture($1, $2, $3)"
_RELEASE = "SELECT * FROM credits.release($1)"
_EXPIRE_HOLDS = sa.text("SELECT owner_id, problem FROM credits.expire_holds(:limit)")
_LAPSE_DUE = sa.text("SELECT owner_id, problem FROM credits.lapse_due(:limit)")
_SET_CEILING = sa.text(
    "SELECT outcome, (ceiling).* FROM credits.set_ceiling(:user_id, :api_key_id, :daily, :monthly, :keys_max)"
).bindparams(sa.bindparam("daily", type_=sa.BigInteger), sa.bindparam("monthly", type_=sa.BigInteger))
_BALANCES = sa.text(
    """
    SELECT account.user_id, account.available_millicredits - coalesce(lot.overdue, 0) AS available_millicredits,
        account.reserved_millicredits, account.promotional_millicredits - coalesce(lot.overdue, 0) AS promotional_millicredits,
        lot.next_expire_time, account.version
    FROM credits.accounts AS account
    LEFT JOIN LATERAL (
        SELECT sum(l.available_millicredits) FILTER (WHERE l.expire_time <= clock_timestamp())::bigint AS overdue,
            min(l.expire_time) FILTER (WHERE l.expire_time > clock_timestamp()) AS next_expire_time
        FROM credits.lots AS l WHERE l.user_id = account.user_id AND l.available_millicredits > 0
    ) AS lot ON account.promotional_millicredits > 0
    WHERE account.user_id = ANY (:user_ids)
    """
)
_DISCREPANCIES = sa.text("SELECT problem, subject, expected::text, actual::text FROM credits.discrepancies")
_AUDIT_COUNTS = sa.text(
    """
    SELECT (SELECT count(*) FROM credits.accounts) AS account_count, (SELECT count(*) FROM credits.events) AS event_count,
        (SELECT count(*) FROM credits.entries) AS entry_count, (SELECT count(*) FROM credits.reservations) AS reservation_count
    """
)
_AUDIT_TOTALS = sa.text("SELECT account, sum(amount_millicredits) AS total FROM credits.entries GROUP BY account ORDER BY account")


async def grant(
    connection: AsyncConnection,
    *,
    actor_id: UUID,
    request_id: UUID,
    user_id: UUID,
    amount_millicredits: int,
    reason: str,
    expire_time: datetime | None = None,
) -> GrantAnswer:
    """Give credits to a user; the same request of the same administrator again gets the answer of the first time."""
    parameters = {"actor_id": actor_id, "request_id": request_id, "user_id": user_id, "amount": amount_millicredits, "reason": reason}
    return _grant_answer((await connection.execute(_GRANT, {**parameters, "expire_time": expire_time})).one())


async def clawback(
    connection: AsyncConnection, *, actor_id: UUID, request_id: UUID, user_id: UUID, amount_millicredits: int, reason: str
) -> GrantAnswer:
    """Take available credits back; the same request of the same administrator again gets the answer of the first time."""
    parameters = {"actor_id": actor_id, "request_id": request_id, "user_id": user_id, "amount": amount_millicredits, "reason": reason}
    return _grant_answer((await connection.execute(_CLAWBACK, parameters)).one())


async def reserve(
    source: AsyncEngine | AsyncConnection,
    *,
    reservation_id: UUID,
    job_id: UUID,
    user_id: UUID,
    amount_millicredits: int,
    ttl: timedelta,
    model: str = "",
    api_key_id: UUID | None = None,
) -> ReservationAnswer:
    """Hold credits; the same request again shows the reservation as it stands by then."""
    return _answer(await fetch_row(source, _RESERVE, reservation_id, job_id, user_id, amount_millicredits, ttl, model, api_key_id))


async def capture(
    source: AsyncEngine | AsyncConnection, *, reservation_id: UUID, amount_millicredits: int, lines: Sequence[ReceiptLine] = ()
) -> ReservationAnswer:
    """Take payment from a hold and give the rest back."""
    receipt = json.dumps([asdict(line) for line in lines]) if lines else None
    return _answer(await fetch_row(source, _CAPTURE, reservation_id, amount_millicredits, receipt))


async def release(source: AsyncEngine | AsyncConnection, *, reservation_id: UUID) -> ReservationAnswer:
    """Give a hold back."""
    return _answer(await fetch_row(source, _RELEASE, reservation_id))


async def expire_holds(connection: AsyncConnection, *, limit: int) -> Sequence[Swept]:
    """Give back up to `limit` holds whose time is over by the database's clock."""
    return [Swept(*row) for row in await connection.execute(_EXPIRE_HOLDS, {"limit": limit})]


async def lapse_due(connection: AsyncConnection, *, limit: int) -> Sequence[Swept]:
    """Let promotional credits lapse whose time is over, of up to `limit` users."""
    return [Swept(*row) for row in await connection.execute(_LAPSE_DUE, {"limit": limit})]


async def get_reservation(connection: AsyncConnection, *, reservation_id: UUID) -> ReservationAnswer:
    """Show a reservation. A hold whose time is over is expired for everybody, also in the moment before it is swept."""
    overdue = sa.and_(reservations.c.state == State.HELD, reservations.c.expire_time <= sa.func.clock_timestamp())
    query = sa.select(
        *(column for column in reservations.c if column.name != "state"),
        sa.case((overdue, State.EXPIRED.value), else_=reservations.c.state).label("state"),
    ).where(reservations.c.reservation_id == reservation_id)
    row = (await connection.execute(query)).mappings().one_or_none()
    return ReservationAnswer(Outcome.NOT_FOUND, None) if row is None else ReservationAnswer(Outcome.OK, _reservation(row))


async def balance(connection: AsyncConnection, *, user_id: UUID) -> Balance:
    """What a user has; nothing, for a user who never got anything."""
    return (await balances(connection, [user_id])).get(user_id, Balance(0, 0))


async def balances(connection: AsyncConnection, user_ids: Collection[UUID]) -> dict[UUID, Balance]:
    """What users have; those who never got anything are missing. What is about to lapse is gone already."""
    return {
        row.user_id: Balance(
            row.available_millicredits, row.reserved_millicredits, row.promotional_millicredits, row.next_expire_time, row.version
        )
        for row in await connection.execute(_BALANCES, {"user_ids": list(user_ids)})
    }


async def promotions(connection: AsyncConnection, *, user_id: UUID) -> list[Promotion]:
    """A user's promotional credits, the soonest to expire first. What is about to lapse is gone already."""
    alive = lots.c.expire_time > sa.func.clock_timestamp()
    available = sa.case((alive, lots.c.available_millicredits), else_=0)
    query = (
        sa.select(available, lots.c.reserved_millicredits, lots.c.expire_time)
        .where(lots.c.user_id == user_id, (available > 0) | (lots.c.reserved_millicredits > 0))
        # What the index knows: it leaves out the lots that are empty, which with time are most of them.
        .where((lots.c.available_millicredits > 0) | (lots.c.reserved_millicredits > 0))
        .order_by(lots.c.expire_time, lots.c.lot_id)
        .limit(PROMOTIONS_MAX)
    )
    return [Promotion(*row) for row in await connection.execute(query)]


async def set_ceiling(
    connection: AsyncConnection, *, user_id: UUID, api_key_id: UUID | None, daily_millicredits: int | None, monthly_millicredits: int | None
) -> tuple[Outcome, Ceiling]:
    """Bound what an account or an API key may spend; without a bound the ceiling goes."""
    parameters = {
        "user_id": user_id,
        "api_key_id": api_key_id or WHOLE_ACCOUNT,
        "daily": daily_millicredits,
        "monthly": monthly_millicredits,
        "keys_max": KEY_CEILINGS_MAX,
    }
    row = (await connection.execute(_SET_CEILING, parameters)).one()
    return Outcome(row.outcome), _ceiling(row)


async def list_ceilings(connection: AsyncConnection, *, user_id: UUID) -> list[Ceiling]:
    """The ceilings of an account and its API keys; what was spent on another day or in another month is not shown as today's."""
    today = sa.cast(sa.func.timezone("UTC", sa.func.clock_timestamp()), sa.Date)
    this_month = sa.cast(sa.func.date_trunc("month", sa.func.timezone("UTC", sa.func.clock_timestamp())), sa.Date)
    query = (
        sa.select(
            ceilings.c.api_key_id,
            ceilings.c.daily_millicredits,
            ceilings.c.monthly_millicredits,
            sa.case((ceilings.c.day == today, ceilings.c.spent_today_millicredits), else_=0).label("spent_today_millicredits"),
            sa.case((ceilings.c.month == this_month, ceilings.c.spent_this_month_millicredits), else_=0).label(
                "spent_this_month_millicredits"
            ),
        )
        .where(ceilings.c.user_id == user_id)
        .order_by(ceilings.c.api_key_id)
    )
    return [_ceiling(row) for row in await connection.execute(query)]


async def discrepancies(connection: AsyncConnection) -> AsyncGenerator[Discrepancy]:
    """Everything in the books that does not add up, as it is found."""
    async with connection.stream(_DISCREPANCIES) as found:
        async for row in found:
            yield Discrepancy(row.problem, row.subject, row.expected or "", row.actual or "")


async def audit_summary(connection: AsyncConnection, *, discrepancy_count: int) -> AuditSummary:
    """How much there is in the books, and the trial balance."""
    counts = (await connection.execute(_AUDIT_COUNTS)).one()
    totals = {row.account: int(row.total) for row in await connection.execute(_AUDIT_TOTALS)}
    return AuditSummary(discrepancy_count, *counts, totals=totals)


async def list_entries(connection: AsyncConnection, query: EntryQuery, *, before: int | None, limit: int) -> Sequence[Entry]:
    """Up to `limit` entries of a user, newest first, of which the first is older than `before`."""
    statement = (
        sa.select(
            entries.c.entry_id,
            entries.c.event_id,
            events.c.kind,
            entries.c.account,
            entries.c.amount_millicredits,
            entries.c.balance_after_millicredits,
            reservations.c.job_id,
            # Before events had a note, a grant's reason stood with the grant alone.
            sa.func.coalesce(events.c.note, grants.c.reason).label("reason"),
            events.c.create_time,
            reservations.c.model,
            events.c.lines,
            lots.c.expire_time,
            events.c.top_up_id,
            sa.func.coalesce(grants.c.actor_id, clawbacks.c.actor_id).label("actor_id"),
        )
        .join(events, entries.c.event_id == events.c.event_id)
        .outerjoin(reservations, reservations.c.reservation_id == events.c.reservation_id)
        .outerjoin(grants, grants.c.event_id == events.c.event_id)
        .outerjoin(clawbacks, clawbacks.c.event_id == events.c.event_id)
        .outerjoin(lots, lots.c.lot_id == entries.c.lot_id)
        .where(entries.c.user_id == query.user_id)
        .order_by(entries.c.entry_id.desc())
        .limit(limit)
    )
    if query.job_id is not None:
        statement = statement.where(reservations.c.job_id == query.job_id)
    if query.kinds:
        statement = statement.where(events.c.kind.in_(sorted(query.kinds)))
    if query.start_time is not None:
        statement = statement.where(events.c.create_time >= query.start_time)
    if query.end_time is not None:
        statement = statement.where(events.c.create_time < query.end_time)
    if before is not None:
        statement = statement.where(entries.c.entry_id < before)
    return [
        Entry(
            entry_id=row.entry_id,
            event_id=row.event_id,
            kind=Kind(row.kind),
            account=Account(row.account),
            amount_millicredits=row.amount_millicredits,
            balance_after_millicredits=row.balance_after_millicredits,
            job_id=row.job_id,
            reason=row.reason,
            create_time=row.create_time,
            model=row.model or "",
            lines=tuple(ReceiptLine(**line) for line in row.lines or ()),
            expire_time=row.expire_time,
            top_up_id=row.top_up_id,
            actor_id=row.actor_id,
        )
        for row in await connection.execute(statement)
    ]


def _grant_answer(row: "sa.Row[tuple[object, ...]]") -> GrantAnswer:
    outcome = Outcome(row.outcome)
    after = Balance(row.available_millicredits, row.reserved_millicredits) if outcome is Outcome.OK else None
    return GrantAnswer(outcome, after, row.available_millicredits)


def _ceiling(row: Any) -> Ceiling:
    return Ceiling(
        api_key_id=None if row.api_key_id == WHOLE_ACCOUNT else row.api_key_id,
        daily_millicredits=row.daily_millicredits,
        monthly_millicredits=row.monthly_millicredits,
        spent_today_millicredits=int(row.spent_today_millicredits),
        spent_this_month_millicredits=int(row.spent_this_month_millicredits),
    )


def _answer(row: Mapping[str, Any]) -> ReservationAnswer:
    outcome = Outcome(row["outcome"])
    broken = None
    if outcome is Outcome.CEILING:
        broken = BrokenCeiling(
            api_key_id=row["ceiling_api_key_id"],
            period=row["ceiling_period"],
            ceiling_millicredits=row["ceiling_millicredits"],
            spent_millicredits=int(row["ceiling_spent_millicredits"]),
            reset_time=row["ceiling_reset_time"],
        )
    return ReservationAnswer(
        outcome=outcome,
        reservation=None if row["reservation_id"] is None else _reservation(row),
        available_millicredits=row["available_millicredits"],
        broken=broken,
    )


def _reservation(row: Mapping[Any, Any]) -> Reservation:
    return Reservation(
        reservation_id=row["reservation_id"],
        job_id=row["job_id"],
        user_id=row["user_id"],
        state=State(row["state"]),
        amount_millicredits=row["amount_millicredits"],
        captured_millicredits=row["captured_millicredits"],
        expire_time=row["expire_time"],
        create_time=row["create_time"],
        model=row["model"],
    )


# --- grants of plans, and the rounds in which one of the replicas makes them -----------------------------------------------------------

PLAN_GRANTED, PLAN_GRANT_KNOWN = "ok", "known"
_GRANT_PLAN = sa.text("SELECT credits.grant_plan(:user_id, :plan, :start_time, :end_time, :expire_time, :amount)")
# The question with which credits.grant_plan begins, for many at once.
_WITHOUT_PLAN_GRANT = sa.text(
    "SELECT d.user_id FROM unnest(CAST(:user_ids AS uuid[]), CAST(:plans AS text[]), CAST(:start_times AS timestamptz[]))"
    " AS d (user_id, plan, start_time) WHERE NOT EXISTS (SELECT FROM credits.plan_grants AS g"
    " WHERE g.user_id = d.user_id AND g.plan = d.plan AND g.end_time > d.start_time)"
)


async def grant_plan(
    connection: AsyncConnection,
    *,
    user_id: UUID,
    plan: str,
    start_time: datetime,
    end_time: datetime,
    expire_time: datetime,
    amount_millicredits: int,
) -> str:
    """Give the credits of a month of a plan, which lapse when the next ones come, at `expire_time` at the latest.

    PLAN_GRANTED; PLAN_GRANT_KNOWN where a grant of the plan covers the start already; else why not.
    """
    parameters = {"user_id": user_id, "plan": plan, "start_time": start_time, "end_time": end_time, "expire_time": expire_time}
    return (await connection.execute(_GRANT_PLAN, {**parameters, "amount": amount_millicredits})).scalar_one()


async def without_plan_grant(connection: AsyncConnection, months: Sequence[tuple[UUID, str, datetime]]) -> set[UUID]:
    """Of months (user, plan, start), the users for whom no grant of the plan covers the start."""
    user_ids, plans, start_times = map(list, zip(*months, strict=True)) if months else ([], [], [])
    parameters = {"user_ids": user_ids, "plans": plans, "start_times": start_times}
    return set((await connection.execute(_WITHOUT_PLAN_GRANT, parameters)).scalars())


async def claim_round(connection: AsyncConnection, name: str, *, holder: UUID, lease: timedelta) -> datetime | None:
    """Have a round for `lease` from now: one that is due, one whose holder's lease has ended, or again one's own.

    The database's time; None where it is not to be had.
    """
    now = sa.func.clock_timestamp()
    claimed = {"holder": holder, "free_time": now + lease}
    claim = (
        pg.insert(rounds)
        .values(name=name, **claimed)
        .on_conflict_do_update(
            index_elements=[rounds.c.name], set_=claimed, where=sa.or_(rounds.c.holder == holder, rounds.c.free_time <= now)
        )
        .returning(now)
    )
    return (await connection.execute(claim)).scalar_one_or_none()


async def finish_round(connection: AsyncConnection, name: str, *, holder: UUID, interval: timedelta) -> None:
    """End a round that was claimed: the next is due after `interval`. Nothing happens where another holder has it by now."""
    done = {"holder": None, "free_time": sa.func.clock_timestamp() + interval}
    await connection.execute(rounds.update().where(rounds.c.name == name, rounds.c.holder == holder).values(done))


# Purchases: what `payments` means by them.

_BEGIN_TOP_UP = sa.text(
    "SELECT begun.outcome, (begun.top_up).* FROM credits.begin_top_up("
    ":user_id, :request_id, :provider, :package_id, :amount, :price_minor, :currency, :open_max) AS begun"
)
_OPENED_TOP_UP = sa.text("SELECT * FROM credits.opened_top_up(:top_up_id, :reference, :url, :expire_time)").bindparams(
    sa.bindparam("expire_time", type_=sa.TIMESTAMP(timezone=True))
)
_SETTLE_TOP_UP = sa.text(
    "SELECT * FROM credits.settle_top_up(:provider, :event_id, :event_type, :kind, :top_up_id, :amount_minor, :refunded_minor, :currency,"
    " :event_time)"
).bindparams(
    sa.bindparam("top_up_id", type_=sa.Uuid),
    sa.bindparam("amount_minor", type_=sa.BigInteger),
    sa.bindparam("refunded_minor", type_=sa.BigInteger),
    sa.bindparam("currency", type_=sa.Text),
    sa.bindparam("event_time", type_=sa.TIMESTAMP(timezone=True)),
)


async def begin_top_up(
    connection: AsyncConnection, *, user_id: UUID, request_id: UUID, provider: str, package: CreditPackage, currency: str
) -> tuple[Outcome, TopUp | None]:
    """Begin a purchase; the same request again shows it as it stands by then."""
    parameters = {
        "user_id": user_id,
        "request_id": request_id,
        "provider": provider,
        "package_id": package.package_id,
        "amount": package.amount_millicredits,
        "price_minor": package.price_minor,
        "currency": currency,
        "open_max": OPEN_TOP_UPS_MAX,
    }
    row = (await connection.execute(_BEGIN_TOP_UP, parameters)).one()
    outcome = Outcome(row.outcome)
    return outcome, _top_up(row) if outcome is Outcome.OK else None


async def opened_top_up(connection: AsyncConnection, *, top_up_id: UUID, checkout: Checkout) -> TopUp:
    """Note the checkout of a purchase; the first one stays. The purchase as it stands by then."""
    parameters = {
        "top_up_id": top_up_id,
        "reference": checkout.reference,
        "url": checkout.url,
        "expire_time": checkout.expire_time,
    }
    return _top_up((await connection.execute(_OPENED_TOP_UP, parameters)).one())


async def settle_top_up(connection: AsyncConnection, event: PaymentEvent) -> EventAnswer:
    """Record a notice of a payment provider and move what it moves; the same notice again moves nothing."""
    row = (await connection.execute(_SETTLE_TOP_UP, asdict(event))).one()
    return EventAnswer(EventOutcome(row.outcome), row.replayed, row.user_id)


async def get_top_up(connection: AsyncConnection, *, user_id: UUID, top_up_id: UUID) -> TopUp | None:
    """A purchase of a user."""
    query = sa.select(top_ups).where(top_ups.c.user_id == user_id, top_ups.c.top_up_id == top_up_id)
    row = (await connection.execute(query)).one_or_none()
    return None if row is None else _top_up(row)


async def list_top_ups(connection: AsyncConnection, query: TopUpQuery, *, before: UUID | None, limit: int) -> Sequence[TopUp]:
    """Up to `limit` purchases of a user, newest first, of which the first is older than `before`."""
    statement = sa.select(top_ups).where(top_ups.c.user_id == query.user_id).order_by(top_ups.c.top_up_id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(top_ups.c.top_up_id < before)
    return [_top_up(row) for row in await connection.execute(statement)]


def _top_up(row: "sa.Row[tuple[object, ...]]") -> TopUp:
    return TopUp(
        top_up_id=row.top_up_id,
        user_id=row.user_id,
        state=TopUpState(row.state),
        package_id=row.package_id,
        amount_millicredits=row.amount_millicredits,
        price_minor=row.price_minor,
        currency=row.currency,
        checkout_url=row.checkout_url,
        expire_time=row.expire_time,
        create_time=row.create_time,
        pay_time=row.pay_time,
        refunded_millicredits=row.refunded_millicredits,
        uncollected_millicredits=row.uncollected_millicredits,
    )
