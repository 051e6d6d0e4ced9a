"""Your API keys, for programs: create, list, revoke."""

import time
from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated

import typer

from cli.amounts import time_text
from cli.client import Edge, paged
from cli.commands import EdgeOption, JsonOption, LimitOption, missing_is, open_edge, parse_id
from cli.failures import CommandError, ExitCode, usage
from cli.inputs import parse_credits, parse_from_now
from cli.output import key_scope_word, note, write_json, write_table
from genmesh.identity.v1 import identity_pb2

SECRET_MARK = "gmk_"  # noqa: S105  # what every key begins with

_IDS = "`genmesh keys list` shows the ids of your keys"

app = typer.Typer()
group = typer.Typer(help="Your API keys, for programs.", no_args_is_help=True)
app.add_typer(group, name="keys")


class Scope(StrEnum):
    """What a key may do, as typed."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


_CEILING_HELP = "What its jobs may cost a {} (UTC), in credits; 0: nothing. Default: as much as yours."


@group.command("create")
def create_key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name to know it by, for example the program that gets it.")],
    scope: Annotated[
        list[Scope],
        typer.Option(
            "--scope",
            help="What the key may do; repeat it for several. read: look at jobs, uploads, credits, the account. "
            "submit: make, change and delete jobs, bring uploads, and so spend credits; not look at them. admin: what your roles allow.",
        ),
    ],
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires", metavar="TIME", help="When it stops working: 30d, 12h, a date (midnight UTC) or RFC 3339. Default: never."
        ),
    ] = None,
    daily_ceiling: Annotated[str | None, typer.Option("--daily-ceiling", metavar="CREDITS", help=_CEILING_HELP.format("day"))] = None,
    monthly_ceiling: Annotated[str | None, typer.Option("--monthly-ceiling", metavar="CREDITS", help=_CEILING_HELP.format("month"))] = None,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Make a key. Its secret goes to standard output, this once: nobody can show it again.

    For example: export GENMESH_API_KEY=$(genmesh keys create nightly --scope read --scope submit --expires 30d)
    """
    if not name.strip():
        raise usage("NAME is blank", "name it after the program that gets it")
    request = identity_pb2.CreateApiKeyRequest(
        display_name=name,
        scopes=[identity_pb2.ApiKeyScope.Value(f"API_KEY_SCOPE_{one.name}") for one in dict.fromkeys(scope)],
        expire_time=parse_from_now(expires) if expires is not None else None,
    )
    if daily_ceiling is not None:
        request.daily_ceiling_millicredits = parse_credits(daily_ceiling, zero=True)
    if monthly_ceiling is not None:
        request.monthly_ceiling_millicredits = parse_credits(monthly_ceiling, zero=True)
    with open_edge(edge) as client:
        # Not repeated: after a lost answer there would be a second key, and a secret that nobody has seen.
        response = client.call(client.identity.CreateApiKey, request, repeatable=False)
    if json_output:
        write_json(response)
        return
    key = response.api_key
    until = time_text(key.expire_time)
    note(f"API key {key.api_key_id}, {_scopes_text(key)}, {f'works until {until}' if until else 'never expires'}")
    note("its secret is shown this once; send it as the header x-api-key, or set GENMESH_API_KEY:")
    print(response.secret, flush=True)


@group.command("list")
def list_keys(limit: LimitOption = 50, edge: EdgeOption = None, json_output: JsonOption = False) -> None:
    """List your keys, newest first, revoked and expired ones included."""
    with open_edge(edge) as client:
        found = _keys(client, limit)
        if json_output:
            for key in found:
                write_json(key)
            return
        write_table(
            ["id", "name", "begins with", "scopes", "state", "created", "expires", "last used"],
            (
                (
                    key.api_key_id,
                    key.display_name,
                    key.prefix,
                    _scopes_text(key),
                    _state_word(key),
                    time_text(key.create_time),
                    time_text(key.expire_time) or "never",
                    time_text(key.last_use_time) or "never",
                )
                for key in found
            ),
        )


@group.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Id of the key, or what it begins with (gmk_…).")],
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """End a key for good, everywhere within a minute."""
    api_key_id = "" if key.startswith(SECRET_MARK) else parse_id(key, "an API key", _IDS)
    with open_edge(edge) as client, missing_is("you have no such API key", _IDS):
        request = identity_pb2.RevokeApiKeyRequest(api_key_id=api_key_id or _find_by_prefix(client, key))
        revoked = client.call(client.identity.RevokeApiKey, request).api_key
    if json_output:
        write_json(revoked)
    else:
        print(f"revoked {revoked.api_key_id} ({revoked.display_name}); it stops working everywhere within a minute")


def _keys(client: Edge, limit: int | None) -> Iterable[identity_pb2.ApiKey]:
    def fetch(page_size: int, page_token: str):
        response = client.call(client.identity.ListApiKeys, identity_pb2.ListApiKeysRequest(page_size=page_size, page_token=page_token))
        return response.api_keys, response.next_page_token

    return paged(fetch, limit)


def _find_by_prefix(client: Edge, text: str) -> str:
    """The id of the key that `text` is the beginning of, or all of. Raises CommandError, which does not repeat a secret."""
    for key in _keys(client, None):
        if key.prefix and text.startswith(key.prefix):
            return key.api_key_id
    raise CommandError("you have no such API key", _IDS, code=ExitCode.NOT_FOUND)


def _scopes_text(key: identity_pb2.ApiKey) -> str:
    return ", ".join(key_scope_word(scope) for scope in key.scopes)


def _state_word(key: identity_pb2.ApiKey) -> str:
    if key.HasField("revoke_time"):
        return "revoked"
    expired = key.HasField("expire_time") and key.expire_time.ToNanoseconds() <= time.time_ns()
    return "expired" if expired else "works"
