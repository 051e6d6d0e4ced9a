"""Tables of the schema `gateway`. Connections find the schema by their search path."""

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY

metadata = sa.MetaData()

users = sa.Table(
    "users",
    metadata,
    # UUIDv7: newest last, so the primary key is the order of lists too.
    sa.Column("user_id", sa.Uuid, primary_key=True),
    sa.Column("email", sa.Text, nullable=False, unique=True),
    sa.Column("display_name", sa.Text, nullable=False),
    sa.Column("roles", ARRAY(sa.Text), nullable=False),
    sa.Column("plan", sa.Text, nullable=False),
    sa.Column("disabled_time", sa.TIMESTAMP(timezone=True)),
    sa.Column("create_time", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.Column("plan_start_time", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.CheckConstraint("email = lower(email)", name="users_email_lower"),
    sa.CheckConstraint("plan IN ('PLAN_FREE', 'PLAN_PRO')", name="users_plan"),
)

# Apart from users, so that no query for an account can bring a hash along.
passwords = sa.Table(
    "passwords",
    metadata,
    sa.Column("user_id", sa.Uuid, sa.ForeignKey("users.user_id", ondelete="CASCADE"), primary_key=True),
    sa.Column("hash", sa.Text, nullable=False),
    sa.Column("change_time", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("session_id", sa.Uuid, primary_key=True),
    sa.Column("user_id", sa.Uuid, sa.ForeignKey("users.user_id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("create_time", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.Column("expire_time", sa.TIMESTAMP(timezone=True), nullable=False, index=True),
    sa.Column("end_time", sa.TIMESTAMP(timezone=True)),
    sa.Column("end_reason", sa.Text),
    sa.CheckConstraint("(end_time IS NULL) = (end_reason IS NULL)", name="sessions_end"),
    sa.CheckConstraint("end_reason IN ('signed_out', 'token_reused', 'account_disabled')", name="sessions_end_reason"),
)

refresh_tokens = sa.Table(
    "refresh_tokens",
    metadata,
    sa.Column("token_hash", sa.LargeBinary, primary_key=True),
    sa.Column("session_id", sa.Uuid, sa.ForeignKey("sessions.session_id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("create_time", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.Column("expire_time", sa.TIMESTAMP(timezone=True), nullable=False, index=True),
    sa.Column("use_time", sa.TIMESTAMP(timezone=True)),
    sa.CheckConstraint("octet_length(token_hash) = 32", name="refresh_tokens_hash_length"),
)
