"""credit_service: balances, an append-only double-entry ledger, two-phase reservations."""
