"""Indexes and checks for what 0004 added: see `0005_ledger_indexes.sql`."""

from servicekit.database import run_script_outside_transaction

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Make them beside running writers."""
    run_script_outside_transaction(__file__)
