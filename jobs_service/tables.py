"""Tables of schema `jobs`. The migrations make them; this module is what `store.py` writes queries with."""

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

metadata = sa.MetaData()

_now = sa.text("now()")

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("job_id", pg.UUID(as_uuid=True), primary_key=True),
    sa.Column("owner_id", pg.UUID(as_uuid=True), nullable=False),
    sa.Column("kind", sa.SmallInteger, nullable=False),
    sa.Column("state", sa.SmallInteger, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("priority", sa.SmallInteger, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("pool", sa.Text, nullable=False),
    sa.Column("spec", sa.LargeBinary, nullable=False),
    sa.Column("steps_agreed", sa.Integer, nullable=False),
    sa.Column("estimated_cost", sa.BigInteger, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
    sa.Column("retry_count", sa.Integer, nullable=False, server_default="0"),
    sa.Column("retry_time", sa.DateTime(timezone=True)),
    sa.Column("reservation_id", pg.UUID(as_uuid=True)),
    sa.Column("worker_id", sa.Text, nullable=False, server_default=""),
    sa.Column("queue_entry", sa.Text, nullable=False, server_default=""),
    sa.Column("steps_done", sa.Integer, nullable=False, server_default="0"),
    sa.Column("cost", sa.BigInteger),
    sa.Column("assets", pg.ARRAY(sa.LargeBinary), nullable=False, server_default="{}"),
    sa.Column("error", sa.LargeBinary),
    sa.Column("failure_reason", sa.Text),
    sa.Column("fingerprint", sa.Text),
    sa.Column("estimate_s", sa.Double),
    sa.Column("cancel_requested_time", sa.DateTime(timezone=True)),
    sa.Column("start_deadline", sa.DateTime(timezone=True)),
    sa.Column("create_time", sa.DateTime(timezone=True), nullable=False, server_default=_now),
    sa.Column("start_time", sa.DateTime(timezone=True)),
    sa.Column("finish_time", sa.DateTime(timezone=True)),
    sa.Column("api_key_id", pg.UUID(as_uuid=True)),
)

requests = sa.Table(
    "requests",
    metadata,
    sa.Column("owner_id", pg.UUID(as_uuid=True), primary_key=True),
    sa.Column("request_id", pg.UUID(as_uuid=True), primary_key=True),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("job_id", pg.UUID(as_uuid=True), nullable=False),
    # What the job will be, from the first attempt to submit it: a repeat continues with the same seed and price.
    sa.Column("intent", sa.LargeBinary),
    sa.Column("abandoned", sa.Boolean, nullable=False, server_default="false"),
    sa.Column("create_time", sa.DateTime(timezone=True), nullable=False, server_default=_now),
)

# A retry under way: the new hold may exist already, the job is not pending yet.
retries = sa.Table(
    "retries",
    metadata,
    sa.Column("job_id", pg.UUID(as_uuid=True), primary_key=True),
    sa.Column("reservation_id", pg.UUID(as_uuid=True), nullable=False),
    sa.Column("abandoned", sa.Boolean, nullable=False, server_default="false"),
    sa.Column("create_time", sa.DateTime(timezone=True), nullable=False, server_default=_now),
    sa.Column("api_key_id", pg.UUID(as_uuid=True)),
)

# A job that is gone, whose media may still be there.
deletions = sa.Table(
    "deletions",
    metadata,
    sa.Column("job_id", pg.UUID(as_uuid=True), primary_key=True),
    sa.Column("owner_id", pg.UUID(as_uuid=True), nullable=False),
    sa.Column("delete_time", sa.DateTime(timezone=True), nullable=False, server_default=_now),
)

# A file that a user brings. `arrival_key` is where its URL writes, until that is known to be empty for good; `object_key` is the file
# that was checked, where no URL writes.
uploads = sa.Table(
    "uploads",
    metadata,
    sa.Column("upload_id", pg.UUID(as_uuid=True), primary_key=True),
    sa.Column("owner_id", pg.UUID(as_uuid=True), nullable=False),
    sa.Column("state", sa.SmallInteger, nullable=False),
    sa.Column("content_type", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("arrival_key", sa.Text),
    sa.Column("object_key", sa.Text),
    sa.Column("width", sa.Integer, nullable=False, server_default="0"),
    sa.Column("height", sa.Integer, nullable=False, server_default="0"),
    sa.Column("duration_ms", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("sha256", sa.LargeBinary),
    sa.Column("rejection", sa.Text),
    sa.Column("check_id", pg.UUID(as_uuid=True)),
    sa.Column("check_end_time", sa.DateTime(timezone=True)),
    sa.Column("url_expire_time", sa.DateTime(timezone=True), nullable=False),
    sa.Column("create_time", sa.DateTime(timezone=True), nullable=False, server_default=_now),
    sa.Column("expire_time", sa.DateTime(timezone=True), nullable=False),
)

outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("outbox_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    sa.Column("job_id", pg.UUID(as_uuid=True), nullable=False),
    sa.Column("duty", sa.SmallInteger, nullable=False),
    sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
    sa.Column("due_time", sa.DateTime(timezone=True), nullable=False, server_default=_now),
)

models = sa.Table(
    "models",
    metadata,
    sa.Column("model_id", sa.Text, primary_key=True),
    sa.Column("model", sa.LargeBinary, nullable=False),
    sa.Column("seen_time", sa.DateTime(timezone=True), nullable=False),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("worker_id", sa.Text, primary_key=True),
    sa.Column("pools", pg.ARRAY(sa.Text), nullable=False),
    sa.Column("slot_count", sa.Integer, nullable=False),
    sa.Column("loaded_models", pg.ARRAY(sa.Text), nullable=False),
    sa.Column("seen_time", sa.DateTime(timezone=True), nullable=False),
)

secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.LargeBinary, nullable=False),
)
