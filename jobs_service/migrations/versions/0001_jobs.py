"""Jobs, submit requests, outbox, offered models: see `0001_jobs.sql`."""

from servicekit.database import run_script

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the schema."""
    run_script(__file__)
