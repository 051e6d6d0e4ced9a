"""Credits that are bought: see `0007_payments.sql`."""

from servicekit.database import run_script

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Make the tables, the functions and their audit."""
    run_script(__file__)
