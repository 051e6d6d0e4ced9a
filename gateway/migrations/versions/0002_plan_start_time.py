"""Since when an account has its plan: see `0002_plan_start_time.sql`."""

from servicekit.database import run_script

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column."""
    run_script(__file__)
