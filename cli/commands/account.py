"""Who you are: register, login, logout, whoami."""

import sys
from typing import Annotated

import grpc
import typer

from cli.amounts import time_text
from cli.client import Edge
from cli.commands import EdgeOption, JsonOption, open_edge
from cli.commands.identities import NoBrowserOption, google_code
from cli.failures import failure_of, reason_of, usage
from cli.output import note, plan_word, write_fields, write_json
from cli.settings import ClientSettings
from genmesh.identity.v1 import identity_pb2
from servicekit.settings import load

app = typer.Typer()

EmailOption = Annotated[str | None, typer.Option("--email", metavar="ADDRESS", help="Default: GENMESH_EMAIL, else asked for.")]
PasswordStdinOption = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from standard input. Default: GENMESH_PASSWORD, else asked for.")
]


def _credentials(email: str | None, *, password_stdin: bool, confirm: bool = False) -> tuple[str, str]:
    settings = load(ClientSettings)
    email = email or settings.email
    if not email:
        if not sys.stdin.isatty():
            raise usage("no e-mail address given", "use --email or set GENMESH_EMAIL")
        email = str(typer.prompt("E-mail", err=True))
    if password_stdin:
        return email, sys.stdin.readline().rstrip("\r\n")
    if settings.password is not None:
        return email, settings.password.get_secret_value()
    if not sys.stdin.isatty():
        raise usage("no password given", "use --password-stdin or set GENMESH_PASSWORD")
    return email, str(typer.prompt("Password", hide_input=True, confirmation_prompt=confirm, err=True))


@app.command()
def register(
    email: EmailOption = None,
    name: Annotated[str, typer.Option("--name", help="Name to show.")] = "",
    password_stdin: PasswordStdinOption = False,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make an account and sign in."""
    address, password = _credentials(email, password_stdin=password_stdin, confirm=True)
    with open_edge(edge, stored_login=True) as client:
        request = identity_pb2.RegisterUserRequest(email=address, password=password, display_name=name)
        # Not repeated: after a lost answer the second try would say that the address is taken.
        user = client.call(client.identity.RegisterUser, request, signed_in=False, repeatable=False).user
        client.sign_in(address, password)
        _welcome(client, user, json_output=json_output)


@app.command()
def login(
    email: EmailOption = None,
    password_stdin: PasswordStdinOption = False,
    google: Annotated[bool, typer.Option("--google", help="Sign in with Google, in your browser.")] = False,
    no_browser: NoBrowserOption = False,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Sign in; the login is kept for the commands that follow.

    For example: genmesh login --email ann@example.com; or genmesh login --google
    """
    if google and (email is not None or password_stdin):
        raise usage("--google goes without --email and --password-stdin")
    if no_browser and not google:
        raise usage("--no-browser goes with --google")
    with open_edge(edge, stored_login=True) as client:
        if google:
            _sign_in_with_google(client, no_browser=no_browser)
        else:
            client.sign_in(*_credentials(email, password_stdin=password_stdin))
        _welcome(client, client.call(client.identity.GetMe, identity_pb2.GetMeRequest()).user, json_output=json_output)


def _sign_in_with_google(client: Edge, *, no_browser: bool) -> None:
    try:
        client.sign_in_with_google(google_code(client, no_browser=no_browser))
    except grpc.RpcError as error:
        if reason_of(error) != "ERROR_REASON_EMAIL_TAKEN":
            raise
        advice = "sign in to that account with `genmesh login --email`, then `genmesh link google`"
        raise failure_of(error).told(advice=advice) from error


def _welcome(client: Edge, user: identity_pb2.User, *, json_output: bool) -> None:
    if json_output:
        write_json(user)
    else:
        note(f"signed in at {client.url} as {user.email}")


@app.command()
def logout(edge: EdgeOption = None) -> None:
    """End the session and forget the login."""
    with open_edge(edge, stored_login=True) as client:
        note("signed out" if client.sign_out() else "nobody was signed in")


@app.command()
def whoami(edge: EdgeOption = None, json_output: JsonOption = False) -> None:
    """Show the account you are signed in with."""
    with open_edge(edge) as client:
        user = client.call(client.identity.GetMe, identity_pb2.GetMeRequest()).user
        if json_output:
            write_json(user)
            return
        write_fields(
            [
                ("e-mail", user.email),
                ("name", user.display_name),
                ("user id", user.user_id),
                ("plan", plan_word(user.plan)),
                ("roles", ", ".join(user.roles)),
                ("since", time_text(user.create_time)),
                ("edge", client.url),
            ]
        )
