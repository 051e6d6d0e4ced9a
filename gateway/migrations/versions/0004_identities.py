"""Sign-in through other identity providers: see `0004_identities.sql`."""

from servicekit.database import run_script

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Create the table and the column."""
    run_script(__file__)
