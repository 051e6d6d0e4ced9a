"""Ids of linked identities, subjects of outcomes: see `0009_identity_ids_outcome_subjects.sql`."""

from servicekit.database import run_script

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Add the columns."""
    run_script(__file__)
