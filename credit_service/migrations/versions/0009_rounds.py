"""Rounds: see `0009_rounds.sql`."""

from servicekit.database import run_script

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Create the table."""
    run_script(__file__)
