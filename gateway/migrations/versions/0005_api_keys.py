"""API keys: see `0005_api_keys.sql`."""

from servicekit.database import run_script

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Create the table."""
    run_script(__file__)
