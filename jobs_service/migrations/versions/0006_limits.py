"""What counts against the limits of an owner: see `0006_limits.sql`."""

from servicekit.database import run_script

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Make the functions."""
    run_script(__file__)
