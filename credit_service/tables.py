"""Tables of schema `credits` as its readers see them. Constraints, triggers and functions: `migrations/versions/`.

Nothing here is written to directly: the stored functions are the only way to move credits.
"""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

SCHEMA = "credits"

metadata = sa.MetaData(schema=SCHEMA)

_timestamp = sa.TIMESTAMP(timezone=True)


def _amount(name: str, *, nullable: bool = False) -> "sa.Column[int]":
    return sa.Column(name, sa.BigInteger, nullable=nullable)


accounts = sa.Table(
    "accounts",
    metadata,
    sa.Column("user_id", sa.Uuid, primary_key=True),
    _amount("available_millicredits"),
    _amount("reserved_millicredits"),
    sa.Column("create_time", _timestamp, nullable=False),
)

reservations = sa.Table(
    "reservations",
    metadata,
    sa.Column("reservation_id", sa.Uuid, primary_key=True),
    sa.Column("user_id", sa.Uuid, sa.ForeignKey(accounts.c.user_id), nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    _amount("amount_millicredits"),
    _amount("captured_millicredits"),
    sa.Column("ttl", pg.INTERVAL, nullable=False),
    sa.Column("expire_time", _timestamp, nullable=False),
    sa.Column("create_time", _timestamp, nullable=False),
    sa.Column("settle_time", _timestamp),
    sa.Column("job_id", sa.Uuid, nullable=False),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("event_id", sa.BigInteger, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("reservation_id", sa.Uuid, sa.ForeignKey(reservations.c.reservation_id)),
    sa.Column("create_time", _timestamp, nullable=False),
)

entries = sa.Table(
    "entries",
    metadata,
    sa.Column("entry_id", sa.BigInteger, primary_key=True),
    sa.Column("event_id", sa.BigInteger, sa.ForeignKey(events.c.event_id), nullable=False),
    sa.Column("account", sa.Text, nullable=False),
    sa.Column("user_id", sa.Uuid, sa.ForeignKey(accounts.c.user_id)),
    _amount("amount_millicredits"),
    _amount("balance_after_millicredits", nullable=True),
)

grants = sa.Table(
    "grants",
    metadata,
    sa.Column("actor_id", sa.Uuid, primary_key=True),
    sa.Column("request_id", sa.Uuid, primary_key=True),
    sa.Column("user_id", sa.Uuid, sa.ForeignKey(accounts.c.user_id), nullable=False),
    _amount("amount_millicredits"),
    sa.Column("reason", sa.Text, nullable=False),
    _amount("available_after_millicredits"),
    _amount("reserved_after_millicredits"),
    sa.Column("event_id", sa.BigInteger, sa.ForeignKey(events.c.event_id), nullable=False, unique=True),
)
