"""The functions of the ledger with promotional credits, ceilings and receipts: see `0006_ledger_functions.sql`."""

from servicekit.database import run_script

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Replace the functions and the audit."""
    run_script(__file__)
