"""Who wrote down an entry of the audit trail: see `0008_audit_reporter.sql`."""

from servicekit.database import run_script

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add the column."""
    run_script(__file__)
