"""Accounts, passwords, sessions, refresh tokens."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("user_id", sa.Uuid, primary_key=True),
        sa.Column("email", sa.Text, nullable=False),
        sa.Column("display_name", sa.Text, nullable=False),
        sa.Column("roles", ARRAY(sa.Text), nullable=False),
        sa.Column("plan", sa.Text, nullable=False),
        sa.Column("disabled_time", sa.TIMESTAMP(timezone=True)),
        sa.Column("create_time", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.UniqueConstraint("email", name="users_email_key"),
        sa.CheckConstraint("email = lower(email)", name="users_email_lower"),
        sa.CheckConstraint("plan IN ('PLAN_FREE', 'PLAN_PRO')", name="users_plan"),
    )
    op.create_table(
        "passwords",
        sa.Column("user_id", sa.Uuid, sa.ForeignKey("users.user_id", ondelete="CASCADE"), primary_key=True),
        sa.Column("hash", sa.Text, nullable=False),
        sa.Column("change_time", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
    )
    op.create_table(
        "sessions",
        sa.Column("session_id", sa.Uuid, primary_key=True),
        sa.Column("user_id", sa.Uuid, sa.ForeignKey("users.user_id", ondelete="CASCADE"), nullable=False),
        sa.Column("create_time", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.Column("expire_time", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("end_time", sa.TIMESTAMP(timezone=True)),
        sa.Column("end_reason", sa.Text),
        sa.CheckConstraint("(end_time IS NULL) = (end_reason IS NULL)", name="sessions_end"),
        sa.CheckConstraint("end_reason IN ('signed_out', 'token_reused', 'account_disabled')", name="sessions_end_reason"),
    )
    op.create_index("ix_sessions_user_id", "sessions", ["user_id"])
    op.create_index("ix_sessions_expire_time", "sessions", ["expire_time"])
    op.create_table(
        "refresh_tokens",
        sa.Column("token_hash", sa.LargeBinary, primary_key=True),
        sa.Column("session_id", sa.Uuid, sa.ForeignKey("sessions.session_id", ondelete="CASCADE"), nullable=False),
        sa.Column("create_time", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
        sa.Column("expire_time", sa.TIMESTAMP(timezone=True), nullable=False),
        sa.Column("use_time", sa.TIMESTAMP(timezone=True)),
        sa.CheckConstraint("octet_length(token_hash) = 32", name="refresh_tokens_hash_length"),
    )
    op.create_index("ix_refresh_tokens_session_id", "refresh_tokens", ["session_id"])
    op.create_index("ix_refresh_tokens_expire_time", "refresh_tokens", ["expire_time"])


def downgrade() -> None:
    for table in ("refresh_tokens", "sessions", "passwords", "users"):
        op.drop_table(table)
