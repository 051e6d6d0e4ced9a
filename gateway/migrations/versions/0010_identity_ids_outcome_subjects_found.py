"""How linked identities and outcomes are found: see `0010_identity_ids_outcome_subjects_found.sql`."""

from servicekit.database import run_script_outside_transaction

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Fill the ids of identities and make the indexes."""
    run_script_outside_transaction(__file__)
