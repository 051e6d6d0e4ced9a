"""The API key that a job was submitted or retried with: see `0004_api_keys.sql`."""

from servicekit.database import run_script

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the columns."""
    run_script(__file__)
