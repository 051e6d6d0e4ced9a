"""Who you are and what you have: register, login, logout, whoami, credits."""

import sys
from typing import Annotated

import typer

from cli.client import Edge, paged
from cli.commands import EdgeOption, JsonOption, LimitOption, open_edge
from cli.failures import usage
from cli.output import credits_text, entry_word, note, time_text, write_fields, write_json, write_table
from cli.settings import ClientSettings
from genmesh.credits.v1 import credits_pb2
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
    email: EmailOption = None, password_stdin: PasswordStdinOption = False, edge: EdgeOption = None, json_output: JsonOption = False
) -> None:
    """Sign in; the login is kept for the commands that follow."""
    address, password = _credentials(email, password_stdin=password_stdin)
    with open_edge(edge, stored_login=True) as client:
        client.sign_in(address, password)
        _welcome(client, client.call(client.identity.GetMe, identity_pb2.GetMeRequest()).user, json_output=json_output)


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
                ("plan", plan_word(user)),
                ("roles", ", ".join(user.roles)),
                ("since", time_text(user.create_time)),
                ("edge", client.url),
            ]
        )


def plan_word(user: identity_pb2.User) -> str:
    """PLAN_FREE → `free`."""
    return identity_pb2.Plan.Name(user.plan).removeprefix("PLAN_").lower()


@app.command("credits")
def show_credits(
    entries: Annotated[bool, typer.Option("--entries", help="List what changed the balance, newest first.")] = False,
    limit: LimitOption = 20,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show your balance, or the ledger entries behind it."""
    with open_edge(edge) as client:
        if entries:
            _show_entries(client, limit, json_output=json_output)
            return
        balance = client.call(client.credits.GetBalance, credits_pb2.GetBalanceRequest())
        if json_output:
            write_json(balance)
        else:
            held = credits_text(balance.reserved_millicredits) if balance.reserved_millicredits else ""
            write_fields([("available", credits_text(balance.available_millicredits)), ("held for jobs", held)])


def _show_entries(client: Edge, limit: int, *, json_output: bool) -> None:
    def fetch(page_size: int, page_token: str):
        request = credits_pb2.ListEntriesRequest(page_size=page_size, page_token=page_token)
        response = client.call(client.credits.ListEntries, request)
        return response.entries, response.next_page_token

    found = paged(fetch, limit)
    if json_output:
        for entry in found:
            write_json(entry)
        return
    write_table(
        ["when", "what", "account", "change", "balance", "for"],
        (
            (
                time_text(entry.create_time),
                entry_word(entry.kind),
                credits_pb2.Entry.Account.Name(entry.account).removeprefix("ACCOUNT_").lower(),
                f"{'+' if entry.amount_millicredits > 0 else ''}{credits_text(entry.amount_millicredits)}",
                credits_text(entry.balance_after_millicredits),
                entry.job_id or entry.reason,
            )
            for entry in found
        ),
    )
