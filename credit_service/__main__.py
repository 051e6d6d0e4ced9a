"""`python -m credit_service serve | migrate`."""

import argparse
from functools import partial


def main() -> None:
    """Run the role named on the command line."""
    parser = argparse.ArgumentParser(prog="credit_service", description="Balances, the ledger and two-phase reservations of Genmesh.")
    parser.add_argument("role", choices=("serve", "migrate"), help="serve: the RPCs; migrate: bring the database schema up to date")
    role: str = parser.parse_args().role
    # Imported by role: a migration need not wait for gRPC and the rest of the service to load.
    if role == "migrate":
        from servicekit.database import migrate
        from servicekit.settings import DatabaseSettings, load

        migrate(load(DatabaseSettings), package="credit_service", schema="credits")
        return

    from credit_service import app
    from credit_service.settings import CreditSettings
    from servicekit.process import run
    from servicekit.settings import load

    settings = load(CreditSettings)
    run(settings, service=app.SERVICE, role=role, main=partial(app.serve, settings))


if __name__ == "__main__":
    main()
