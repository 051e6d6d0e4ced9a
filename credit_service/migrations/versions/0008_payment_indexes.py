"""Indexes and the check that tie ledger events to purchases: see `0008_payment_indexes.sql`."""

from servicekit.database import run_script_outside_transaction

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Make them beside running writers."""
    run_script_outside_transaction(__file__)
