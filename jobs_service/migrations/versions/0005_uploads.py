"""Files that users bring: see `0005_uploads.sql`."""

from servicekit.database import run_script

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Create the table."""
    run_script(__file__)
