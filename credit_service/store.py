"""All SQL of credit_service. Functions take the caller's connection.

Each write is one call of a stored function, a transaction in itself: on a connection in autocommit it costs one round trip.
"""

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from credit_service.ledger import (
    Account,
    Balance,
    Entry,
    EntryQuery,
    GrantAnswer,
    Kind,
    Outcome,
    Reservation,
    ReservationAnswer,
    State,
)
from credit_service.tables import accounts, entries, events, grants, reservations

_GRANT = sa.text("SELECT * FROM credits.grant_credits(:actor_id, :request_id, :user_id, :amount, :reason)")
_RESERVE = sa.text("SELECT * FROM credits.reserve(:reservation_id, :job_id, :user_id, :amount, :ttl)")
_CAPTURE = sa.text("SELECT * FROM credits.capture(:reservation_id, :amount)")
_RELEASE = sa.text("SELECT * FROM credits.release(:reservation_id)")
_EXPIRE_DUE = sa.text("SELECT credits.expire_due(:limit)")


async def grant(
    connection: AsyncConnection, *, actor_id: UUID, request_id: UUID, user_id: UUID, amount_millicredits: int, reason: str
) -> GrantAnswer:
    """Give credits to a user; the same request of the same administrator again gets the answer of the first time."""
    parameters = {"actor_id": actor_id, "request_id": request_id, "user_id": user_id, "amount": amount_millicredits, "reason": reason}
    row = (await connection.execute(_GRANT, parameters)).one()
    outcome = Outcome(row.outcome)
    return GrantAnswer(outcome, Balance(row.available_millicredits, row.reserved_millicredits) if outcome is Outcome.OK else None)


async def reserve(
    connection: AsyncConnection, *, reservation_id: UUID, job_id: UUID, user_id: UUID, amount_millicredits: int, ttl: timedelta
) -> ReservationAnswer:
    """Hold credits; the same request again shows the reservation as it stands by then."""
    parameters = {"reservation_id": reservation_id, "job_id": job_id, "user_id": user_id, "amount": amount_millicredits, "ttl": ttl}
    return _answer((await connection.execute(_RESERVE, parameters)).one())


async def capture(connection: AsyncConnection, *, reservation_id: UUID, amount_millicredits: int) -> ReservationAnswer:
    """Take payment from a hold and give the rest back."""
    return _answer((await connection.execute(_CAPTURE, {"reservation_id": reservation_id, "amount": amount_millicredits})).one())


async def release(connection: AsyncConnection, *, reservation_id: UUID) -> ReservationAnswer:
    """Give a hold back."""
    return _answer((await connection.execute(_RELEASE, {"reservation_id": reservation_id})).one())


async def expire_due(connection: AsyncConnection, *, limit: int) -> int:
    """Give back up to `limit` holds whose time is over by the database's clock; returns how many."""
    return int((await connection.execute(_EXPIRE_DUE, {"limit": limit})).scalar_one())


async def get_reservation(connection: AsyncConnection, *, reservation_id: UUID) -> ReservationAnswer:
    """Show a reservation. A hold whose time is over is expired for everybody, also in the moment before it is swept."""
    overdue = sa.and_(reservations.c.state == State.HELD, reservations.c.expire_time <= sa.func.clock_timestamp())
    query = sa.select(
        *(column for column in reservations.c if column.name != "state"),
        sa.case((overdue, State.EXPIRED.value), else_=reservations.c.state).label("state"),
    ).where(reservations.c.reservation_id == reservation_id)
    row = (await connection.execute(query)).one_or_none()
    return ReservationAnswer(Outcome.NOT_FOUND, None) if row is None else ReservationAnswer(Outcome.OK, _reservation(row))


async def balance(connection: AsyncConnection, *, user_id: UUID) -> Balance:
    """What a user has; nothing, for a user who never got anything."""
    query = sa.select(accounts.c.available_millicredits, accounts.c.reserved_millicredits).where(accounts.c.user_id == user_id)
    row = (await connection.execute(query)).one_or_none()
    return Balance(0, 0) if row is None else Balance(row.available_millicredits, row.reserved_millicredits)


async def list_entries(connection: AsyncConnection, query: EntryQuery, *, before: int | None, limit: int) -> Sequence[Entry]:
    """Up to `limit` entries of a user, newest first, of which the first is older than `before`."""
    statement = (
        sa.select(
            entries.c.entry_id,
            events.c.kind,
            entries.c.account,
            entries.c.amount_millicredits,
            entries.c.balance_after_millicredits,
            reservations.c.job_id,
            grants.c.reason,
            events.c.create_time,
        )
        .join(events, entries.c.event_id == events.c.event_id)
        .outerjoin(reservations, reservations.c.reservation_id == events.c.reservation_id)
        .outerjoin(grants, grants.c.event_id == events.c.event_id)
        .where(entries.c.user_id == query.user_id)
        .order_by(entries.c.entry_id.desc())
        .limit(limit)
    )
    if query.job_id is not None:
        statement = statement.where(reservations.c.job_id == query.job_id)
    if before is not None:
        statement = statement.where(entries.c.entry_id < before)
    return [
        Entry(
            entry_id=row.entry_id,
            kind=Kind(row.kind),
            account=Account(row.account),
            amount_millicredits=row.amount_millicredits,
            balance_after_millicredits=row.balance_after_millicredits,
            job_id=row.job_id,
            reason=row.reason,
            create_time=row.create_time,
        )
        for row in await connection.execute(statement)
    ]


def _answer(row: "sa.Row[tuple[object, ...]]") -> ReservationAnswer:
    return ReservationAnswer(
        outcome=Outcome(row.outcome),
        reservation=None if row.reservation_id is None else _reservation(row),
        available_millicredits=row.available_millicredits,
    )


def _reservation(row: "sa.Row[tuple[object, ...]]") -> Reservation:
    return Reservation(
        reservation_id=row.reservation_id,
        job_id=row.job_id,
        user_id=row.user_id,
        state=State(row.state),
        amount_millicredits=row.amount_millicredits,
        captured_millicredits=row.captured_millicredits,
        expire_time=row.expire_time,
        create_time=row.create_time,
    )
