"""Indexes for what 0006 counts: see `0007_limits_indexes.sql`."""

from servicekit.database import run_script_outside_transaction

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Make the indexes."""
    run_script_outside_transaction(__file__)
