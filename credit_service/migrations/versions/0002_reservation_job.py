"""The job of a reservation: see `0002_reservation_job.sql`."""

from servicekit.database import run_script

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the column, change the functions."""
    run_script(__file__)
