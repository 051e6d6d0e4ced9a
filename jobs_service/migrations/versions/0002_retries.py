"""Retries, dead letters, deletion, workers: see `0002_retries.sql`."""

from servicekit.database import run_script

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add columns and tables."""
    run_script(__file__)
