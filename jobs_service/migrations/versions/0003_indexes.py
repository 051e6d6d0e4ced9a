"""Indexes for what 0002 added: see `0003_indexes.sql`."""

from servicekit.database import run_script_outside_transaction

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the indexes."""
    run_script_outside_transaction(__file__)
