"""`python -m gateway ROLE`: `serve` runs the service, `migrate` brings its schema up to date, `rotate-keys` makes a new signing key."""

import argparse


def main() -> None:
    """Run the role named on the command line."""
    parser = argparse.ArgumentParser(prog="gateway", description=__doc__)
    parser.add_argument("role", choices=["serve", "migrate", "rotate-keys"])
    role: str = parser.parse_args().role
    # Imported by role: a migration need not wait for gRPC and the rest of the service to load.
    if role == "migrate":
        from servicekit.database import migrate
        from servicekit.settings import DatabaseSettings, load

        migrate(load(DatabaseSettings), package="gateway", schema="gateway")
        return
    if role == "rotate-keys":
        from gateway.settings import SigningKeySettings
        from gateway.tokens import ACTIVATION_S, SigningKeys
        from servicekit import telemetry
        from servicekit.settings import load

        key_settings = load(SigningKeySettings)
        telemetry.configure(key_settings, service="gateway", role=role)
        key_id = SigningKeys.open(key_settings.signing_keys_dir).rotate()
        print(f"{key_id}: published by every running gateway in a few seconds, signs in {ACTIVATION_S:.0f} s")
        return

    from gateway.app import SERVICE, serve
    from gateway.settings import GatewaySettings
    from servicekit.process import run
    from servicekit.settings import load

    settings = load(GatewaySettings)
    run(settings, service=SERVICE, role=role, main=lambda stop: serve(settings, stop))


if __name__ == "__main__":
    main()
