"""Accounts at other identity providers that you sign in with: link, list, unlink."""

import sys
from collections.abc import Generator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import grpc
import typer

from cli.amounts import time_text
from cli.client import Edge
from cli.commands import EdgeOption, JsonOption, missing_is, open_edge, parse_id
from cli.failures import CommandError, ExitCode, failure_of, printable, reason_of
from cli.output import note, write_json, write_table
from genmesh.identity.v1 import identity_pb2

_IDS = "`genmesh identities list` shows the ids of those you have"

app = typer.Typer()
group = typer.Typer(help="Accounts elsewhere that you can sign in with, too. `genmesh link` adds one.", no_args_is_help=True)
app.add_typer(group, name="identities")

NoBrowserOption = Annotated[bool, typer.Option("--no-browser", help="Only print the address to go to.")]


class Provider(StrEnum):
    """Where else people can sign in."""

    GOOGLE = "google"


@app.command()
def link(
    provider: Annotated[Provider, typer.Argument(metavar="PROVIDER", help="google.", case_sensitive=False)],
    no_browser: NoBrowserOption = False,
    edge: EdgeOption = None,
) -> None:
    """Link an account elsewhere to yours, to sign in with it, too. You have to have signed in a short while ago."""
    with open_edge(edge) as client:
        request = identity_pb2.LinkIdentityRequest(google_code=google_code(client, no_browser=no_browser))
        with _young_session():
            client.call(client.identity.LinkIdentity, request, repeatable=False)
    note(f"from now on `genmesh login --{provider}` works, too; `genmesh identities list` shows it")


@group.command("list")
def list_identities(edge: EdgeOption = None, json_output: JsonOption = False) -> None:
    """List the accounts elsewhere that you can sign in with, oldest link first."""
    with open_edge(edge) as client:
        found = _identities(client)
    if json_output:
        for identity in found:
            write_json(identity)
    elif found:
        write_table(
            ["identity", "provider", "linked"],
            ((identity.identity_id, identity.issuer, time_text(identity.create_time)) for identity in found),
        )
    else:
        note("no account elsewhere is linked to yours; `genmesh link google` adds one")


@group.command("unlink")
def unlink_identity(
    identity: Annotated[str, typer.Argument(metavar="IDENTITY", help="Id of the link, or its provider as the list shows it (https://…).")],
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Take back a link: nobody signs in to your account with it any more. Sessions go on.

    You have to have signed in a short while ago.
    """
    named = None if identity.startswith("https://") else parse_id(identity, "a linked identity", _IDS)
    missing = "no such account is linked to yours"
    with open_edge(edge) as client, missing_is(missing, _IDS):
        found = next((one for one in _identities(client) if named == one.identity_id or (named is None and identity == one.issuer)), None)
        if found is None:
            raise CommandError(missing, _IDS, code=ExitCode.NOT_FOUND)
        with _young_session():
            # Not repeated: after a lost answer the second try would find nothing.
            client.call(client.identity.UnlinkIdentity, identity_pb2.UnlinkIdentityRequest(identity_id=found.identity_id), repeatable=False)
    if json_output:
        write_json(found)
    else:
        print(f"unlinked {found.identity_id} ({found.issuer})")


def google_code(client: Edge, *, no_browser: bool) -> identity_pb2.AuthorizationCode:
    """What Google sends the user's browser back with. Raises CommandError."""
    from cli.browser import open_browser, sign_in_code  # a web server, for this alone

    options = client.call(client.identity.GetSignInOptions, identity_pb2.GetSignInOptionsRequest(), signed_in=False)
    if not options.HasField("google"):
        raise CommandError("this genmesh does not offer sign-in with Google", "use `genmesh login --email`; whoever runs it can set it up")

    def present(url: str) -> None:
        # To stderr and as it is: it is copied from there where no browser opens.
        print(f"go to this address in a browser on this machine:\n\n{printable(url)}\n", file=sys.stderr, flush=True)
        if not no_browser:
            open_browser(url)

    return sign_in_code(options.google, present)


def _identities(client: Edge) -> list[identity_pb2.LinkedIdentity]:
    return list(client.call(client.identity.ListIdentities, identity_pb2.ListIdentitiesRequest()).identities)


@contextmanager
def _young_session() -> Generator[None]:
    """PERMISSION_DENIED inside the block means that the session is too old for this."""
    try:
        yield
    except grpc.RpcError as error:
        if reason_of(error) != "ERROR_REASON_PERMISSION_DENIED":
            raise
        raise failure_of(error).told(advice="sign in again with `genmesh login`, then run this again") from error
