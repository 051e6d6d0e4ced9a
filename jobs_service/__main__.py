"""`python -m jobs_service serve|dispatch|relay|migrate`."""

import argparse


def main() -> None:
    """Run one process of the service."""
    parser = argparse.ArgumentParser(prog="jobs_service", description=__doc__)
    parser.add_argument("role", choices=["serve", "dispatch", "relay", "migrate"])
    role: str = parser.parse_args().role
    if role == "migrate":
        # Imported by role: a migration need not wait for gRPC, Redis and S3 to load.
        from servicekit.database import migrate
        from servicekit.settings import DatabaseSettings, load

        migrate(load(DatabaseSettings), package="jobs_service", schema="jobs")
        return

    from jobs_service import app
    from jobs_service.settings import DispatchSettings, RelaySettings, ServeSettings
    from servicekit.process import run
    from servicekit.settings import load

    if role == "serve":
        settings = load(ServeSettings)
        run(settings, service=app.SERVICE, role=role, main=lambda stop: app.serve(settings, stop))
    elif role == "dispatch":
        dispatch = load(DispatchSettings)
        run(dispatch, service=app.SERVICE, role=role, main=lambda stop: app.dispatch(dispatch, stop))
    else:
        relay = load(RelaySettings)
        run(relay, service=app.SERVICE, role=role, main=lambda stop: app.relay(relay, stop))


if __name__ == "__main__":
    main()
