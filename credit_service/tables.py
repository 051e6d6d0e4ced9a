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
    _amount("promotional_millicredits"),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("event_time", _timestamp),
)

lots = sa.Table(
    "lots",
    metadata,
    sa.Column("lot_id", sa.BigInteger, primary_key=True),
    sa.Column("user_id", sa.Uuid, sa.ForeignKey(accounts.c.user_id), nullable=False),
    _amount("available_millicredits"),
    _amount("reserved_millicredits"),
    sa.Column("expire_time", _timestamp, nullable=False),
    sa.Column("create_time", _timestamp, nullable=False),
)

ceilings = sa.Table(
    "ceilings",
    metadata,
    sa.Column("user_id", sa.Uuid, sa.ForeignKey(accounts.c.user_id), primary_key=True),
    # Nil: the whole account.
    sa.Column("api_key_id", sa.Uuid, primary_key=True),
    _amount("daily_millicredits", nullable=True),
    _amount("monthly_millicredits", nullable=True),
    sa.Column("day", sa.Date, nullable=False),
    sa.Column("spent_today_millicredits", sa.Numeric, nullable=False),
    sa.Column("month", sa.Date, nullable=False),
    sa.Column("spent_this_month_millicredits", sa.Numeric, nullable=False),
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
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("api_key_id", sa.Uuid),
    _amount("promotional_millicredits"),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("event_id", sa.BigInteger, primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("reservation_id", sa.Uuid, sa.ForeignKey(reservations.c.reservation_id)),
    sa.Column("create_time", _timestamp, nullable=False),
    sa.Column("note", sa.Text),
    sa.Column("lines", pg.JSONB),
    sa.Column("top_up_id", sa.Uuid, sa.ForeignKey(f"{SCHEMA}.top_ups.top_up_id")),
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
    sa.Column("lot_id", sa.BigInteger, sa.ForeignKey(lots.c.lot_id)),
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
    sa.Column("expire_time", _timestamp),
)

clawbacks = sa.Table(
    "clawbacks",
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

plan_grants = sa.Table(
    "plan_grants",
    metadata,
    sa.Column("user_id", sa.Uuid, sa.ForeignKey(accounts.c.user_id), primary_key=True),
    sa.Column("plan", sa.Text, primary_key=True),
    sa.Column("start_time", _timestamp, primary_key=True),
    sa.Column("end_time", _timestamp, nullable=False),
    sa.Column("expire_time", _timestamp, nullable=False),
    _amount("amount_millicredits"),
    sa.Column("event_id", sa.BigInteger, sa.ForeignKey(events.c.event_id), nullable=False, unique=True),
)

# Work that one replica at a time does, once in an interval; nobody else begins it before `free_time`. Written to directly: it moves no
# credits.
rounds = sa.Table(
    "rounds",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("holder", sa.Uuid),
    sa.Column("free_time", _timestamp, nullable=False),
)

top_ups = sa.Table(
    "top_ups",
    metadata,
    sa.Column("top_up_id", sa.Uuid, primary_key=True),
    sa.Column("user_id", sa.Uuid, sa.ForeignKey(accounts.c.user_id), nullable=False),
    sa.Column("request_id", sa.Uuid, nullable=False),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("package_id", sa.Text, nullable=False),
    _amount("amount_millicredits"),
    sa.Column("price_minor", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("create_time", _timestamp, nullable=False),
    sa.Column("provider_reference", sa.Text),
    sa.Column("checkout_url", sa.Text),
    sa.Column("expire_time", _timestamp),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("pay_time", _timestamp),
    sa.Column("refunded_minor", sa.BigInteger, nullable=False),
    _amount("refunded_millicredits"),
    _amount("uncollected_millicredits"),
)

payment_events = sa.Table(
    "payment_events",
    metadata,
    sa.Column("provider", sa.Text, primary_key=True),
    sa.Column("provider_event_id", sa.Text, primary_key=True),
    sa.Column("event_type", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("top_up_id", sa.Uuid),
    sa.Column("amount_minor", sa.BigInteger),
    sa.Column("refunded_minor", sa.BigInteger),
    sa.Column("currency", sa.Text),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("event_time", _timestamp, nullable=False),
    sa.Column("create_time", _timestamp, nullable=False),
)
