"""Promotional credits, ceilings, receipts, clawbacks, grants of plans: see `0004_lots_and_ceilings.sql`."""

from servicekit.database import run_script

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add their tables and columns, empty."""
    run_script(__file__)
