"""The audit trail: see `0006_audit.sql`."""

from servicekit.database import run_script

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Create its tables, which only grow."""
    run_script(__file__)
