"""Revocations of access tokens: see `0007_revocations.sql`."""

from servicekit.database import run_script

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Create the table."""
    run_script(__file__)
