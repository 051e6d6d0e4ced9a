"""What administrators do: find accounts, give credits."""

import uuid
from typing import Annotated

import typer

from cli.client import Edge, paged
from cli.commands import EdgeOption, JsonOption, LimitOption, open_edge
from cli.commands.account import plan_word
from cli.failures import CommandError, ExitCode, usage
from cli.output import credits_text, parse_credits, time_text, write_json, write_table
from genmesh.credits.v1 import credits_pb2
from genmesh.identity.v1 import identity_pb2

app = typer.Typer()
group = typer.Typer(help="For administrators: accounts and credits.", no_args_is_help=True)
app.add_typer(group, name="admin")


@group.command()
def grant(
    who: Annotated[str, typer.Argument(metavar="EMAIL_OR_USER_ID", help="Who gets the credits.")],
    amount: Annotated[str, typer.Argument(metavar="AMOUNT", help="How many credits, for example 100 or 2.5.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the ledger with your id.")],
    request_id: Annotated[
        str | None, typer.Option("--request-id", metavar="UUID", help="Run it again with the same id and it still grants once.")
    ] = None,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Give credits to a user."""
    millicredits = parse_credits(amount)
    with open_edge(edge) as client:
        user_id = find_user_id(client, who)
        response = client.call(
            client.ledger_admin.GrantCredits,
            credits_pb2.GrantCreditsRequest(
                request_id=request_id or str(uuid.uuid4()), user_id=user_id, amount_millicredits=millicredits, reason=reason
            ),
        )
        if json_output:
            write_json(response)
        else:
            print(f"granted {credits_text(millicredits)}; {who} now has {credits_text(response.available_millicredits)}")


def find_user_id(client: Edge, who: str) -> str:
    """The id of an account given by id or e-mail address. Raises CommandError when there is no such address."""
    try:
        return str(uuid.UUID(who))
    except ValueError:
        if "@" not in who:
            raise usage(f"neither an e-mail address nor a user id: {who!r}", "`genmesh admin users` lists accounts") from None
    users = client.call(client.identity_admin.ListUsers, identity_pb2.ListUsersRequest(email=who)).users
    for user in users:
        if user.email == who.lower():
            return user.user_id
    raise CommandError(f"no account has the address {who}", "`genmesh admin users` lists accounts", code=ExitCode.NOT_FOUND)


@group.command()
def users(
    email: Annotated[str, typer.Option("--email", metavar="ADDRESS", help="Only the account with this address.")] = "",
    limit: LimitOption = 50,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """List accounts, newest first."""
    with open_edge(edge) as client:

        def fetch(page_size: int, page_token: str):
            request = identity_pb2.ListUsersRequest(page_size=page_size, page_token=page_token, email=email)
            response = client.call(client.identity_admin.ListUsers, request)
            return response.users, response.next_page_token

        found = paged(fetch, limit)
        if json_output:
            for user in found:
                write_json(user)
            return
        write_table(
            ["e-mail", "name", "user id", "plan", "roles", "since"],
            (
                (user.email, user.display_name, user.user_id, plan_word(user), ",".join(user.roles), time_text(user.create_time))
                for user in found
            ),
        )
