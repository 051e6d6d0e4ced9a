"""The start of every account's plan: see `0003_plan_start_time_filled.sql`."""

from alembic import op

from servicekit.database import run_script_outside_transaction

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Fill the column and let it be empty no more."""
    run_script_outside_transaction(__file__)
    # In the transaction that records this revision: until it is recorded, it may have to be run again.
    op.execute("DROP PROCEDURE gateway.fill_plan_start_times")
