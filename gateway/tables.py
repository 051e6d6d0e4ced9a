"""Tables of the schema `gateway`. Connections find the schema by their search path."""

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

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

# Who an account is at other identity providers.
identities = sa.Table(
    "identities",
    metadata,
    sa.Column("issuer", sa.Text, primary_key=True),
    sa.Column("subject", sa.Text, primary_key=True),
    sa.Column("user_id", sa.Uuid, sa.ForeignKey("users.user_id", ondelete="CASCADE"), nullable=False),
    sa.Column("create_time", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
    # What owners call the link by; who somebody is elsewhere is theirs and the trail's to know.
    sa.Column("identity_id", sa.Uuid, nullable=False, server_default=sa.func.gen_random_uuid()),
    sa.UniqueConstraint("user_id", "issuer", name="identities_user_id_issuer_key"),
    sa.Index("ix_identities_identity_id", "identity_id", unique=True),
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
    # Where it began; empty: not known.
    sa.Column("client_network", sa.Text, nullable=False, server_default=""),
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

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("api_key_id", sa.Uuid, primary_key=True),
    sa.Column("user_id", sa.Uuid, sa.ForeignKey("users.user_id", ondelete="CASCADE"), nullable=False),
    sa.Column("display_name", sa.Text, nullable=False),
    # What is looked up; the rest of the key is known by its hash only.
    sa.Column("prefix", sa.Text, nullable=False, unique=True),
    sa.Column("key_hash", sa.LargeBinary, nullable=False),
    sa.Column("scopes", ARRAY(sa.Text), nullable=False),
    sa.Column("create_time", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.now()),
    sa.Column("expire_time", sa.TIMESTAMP(timezone=True)),
    sa.Column("last_use_time", sa.TIMESTAMP(timezone=True)),
    sa.Column("revoke_time", sa.TIMESTAMP(timezone=True)),
    sa.CheckConstraint("octet_length(key_hash) = 32", name="api_keys_hash_length"),
    sa.CheckConstraint("scopes <@ ARRAY['read', 'submit', 'admin']", name="api_keys_scopes"),
    sa.Index("ix_api_keys_user_id", "user_id", "api_key_id"),
)

# Append-only, by triggers: no row is ever changed or removed.
audit_entries = sa.Table(
    "audit_entries",
    metadata,
    sa.Column("audit_entry_id", sa.Uuid, primary_key=True),
    sa.Column("act_time", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.clock_timestamp()),
    # No references: an entry outlives what it is about.
    sa.Column("actor_user_id", sa.Uuid),
    sa.Column("actor_api_key_id", sa.Uuid),
    sa.Column("actor_service", sa.Text, nullable=False),
    sa.Column("method", sa.Text, nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("client_address", sa.Text, nullable=False),
    sa.Column("request_id", sa.Text, nullable=False),
    sa.Column("details", JSONB, nullable=False),
    # Which service of the mesh wrote it down, as its certificate says; NULL: written before this was noted.
    sa.Column("reporter", sa.Text),
    sa.Index("ix_audit_entries_act_time", "act_time", "audit_entry_id"),
    sa.Index("ix_audit_entries_actor_user_id", "actor_user_id", "act_time", "audit_entry_id"),
    sa.Index("ix_audit_entries_subject", "subject", "act_time", "audit_entry_id"),
    sa.Index("ix_audit_entries_method", "method", "act_time", "audit_entry_id"),
)

audit_outcomes = sa.Table(
    "audit_outcomes",
    metadata,
    sa.Column("audit_entry_id", sa.Uuid, sa.ForeignKey("audit_entries.audit_entry_id"), primary_key=True),
    sa.Column("finish_time", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.clock_timestamp()),
    sa.Column("code", sa.Integer, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("details", JSONB, nullable=False),
    # Empty where the entry has one, which counts. `act_time` is the entry's; NULL: written by a gateway that knew neither.
    sa.Column("subject", sa.Text, nullable=False, server_default=""),
    sa.Column("act_time", sa.TIMESTAMP(timezone=True)),
    sa.Index("ix_audit_outcomes_subject", "subject", "act_time", "audit_entry_id", postgresql_where=sa.text("subject <> ''")),
)

revocations = sa.Table(
    "revocations",
    metadata,
    # In the order they were written down, which is not quite the order they were committed in.
    sa.Column("revocation_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("subject_id", sa.Uuid, nullable=False),
    sa.Column("revoke_time", sa.TIMESTAMP(timezone=True), nullable=False),
    sa.Column("create_time", sa.TIMESTAMP(timezone=True), nullable=False, server_default=sa.func.clock_timestamp()),
    sa.CheckConstraint("kind IN ('session', 'api_key', 'user')", name="revocations_kind"),
    sa.Index("ix_revocations_create_time", "create_time", "revocation_id"),
    sa.Index("ix_revocations_subject_id", "subject_id", "revoke_time"),
)
