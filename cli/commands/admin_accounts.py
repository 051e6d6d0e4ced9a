"""What administrators do with accounts, and the audit trail: who did what to whom, from where."""

import uuid
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated

import grpc
import typer
from google.protobuf.descriptor import FileDescriptor

from cli.amounts import time_text
from cli.client import Edge, paged
from cli.commands import EdgeOption, JsonOption, LimitOption, missing_is, open_edge
from cli.failures import CommandError, ExitCode, failure_of, reason_of, usage
from cli.inputs import parse_from_now
from cli.output import note, outcome_text, plan_word, write_json, write_table
from genmesh.credits.v1 import credits_pb2, payments_pb2
from genmesh.identity.v1 import identity_pb2
from genmesh.inference.v1 import inference_pb2
from genmesh.jobs.v1 import jobs_pb2

ADMINISTRATORS = "For administrators"
OPERATORS = "For operators, too"
USERS_SHOWN = 50
USERS_SEARCHED_MAX = 10_000
"""The list selects by e-mail address only: for an id it is gone through this far."""

_CONTRACT: tuple[FileDescriptor, ...] = tuple(one.DESCRIPTOR for one in (identity_pb2, jobs_pb2, credits_pb2, payments_pb2, inference_pb2))

app = typer.Typer()
users = typer.Typer()
app.add_typer(users, name="users", rich_help_panel=ADMINISTRATORS)

WhoArgument = Annotated[str, typer.Argument(metavar="EMAIL_OR_USER_ID", help="Whose account. Operators name it by its user id.")]


class PlanName(StrEnum):
    """Plans, as typed."""

    FREE = "free"
    PRO = "pro"


class Role(StrEnum):
    """Roles, as typed."""

    OPERATOR = "operator"
    ADMIN = "admin"


# Accounts


def find_user_id(client: Edge, who: str) -> str:
    """The id of an account given by id or e-mail address. Raises CommandError when there is no such address."""
    return _parse_user_id(who) or _by_email(client, who).user_id


def _parse_user_id(who: str) -> str | None:
    """The id; None for an e-mail address. Raises CommandError (usage)."""
    try:
        return str(uuid.UUID(who))
    except ValueError:
        if "@" not in who:
            raise usage(f"neither an e-mail address nor a user id: {who!r}", "`genmesh admin users` lists accounts") from None
    return None


def _find_user(client: Edge, who: str) -> identity_pb2.User:
    """An account given by id or e-mail address. Raises CommandError when there is none."""
    user_id = _parse_user_id(who)
    if user_id is None:
        return _by_email(client, who)
    for user in _users(client, "", USERS_SEARCHED_MAX):
        if user.user_id == user_id:
            return user
    raise CommandError(
        f"the account {who} is not among the newest {USERS_SEARCHED_MAX}", "name it by its e-mail address", code=ExitCode.NOT_FOUND
    )


def _by_email(client: Edge, email: str) -> identity_pb2.User:
    try:
        for user in _users(client, email, None):
            if user.email == email.lower():
                return user
    except grpc.RpcError as error:
        if reason_of(error) != "ERROR_REASON_PERMISSION_DENIED":
            raise
        # Accounts are an administrator's to look up; much of what is done with one is an operator's.
        advice = "sign in with an account that may do this; an operator names accounts by their user id"
        raise failure_of(error).told(advice=advice) from error
    raise CommandError(*_no_account(email), code=ExitCode.NOT_FOUND)


def _users(client: Edge, email: str, limit: int | None) -> Iterator[identity_pb2.User]:
    def fetch(page_size: int, page_token: str):
        request = identity_pb2.ListUsersRequest(page_size=page_size, page_token=page_token, email=email)
        response = client.call(client.identity_admin.ListUsers, request)
        return response.users, response.next_page_token

    return paged(fetch, limit)


def _no_account(who: str) -> tuple[str, str]:
    return f"there is no account {who}", "`genmesh admin users` lists accounts"


@users.callback(invoke_without_command=True)
def list_users(
    context: typer.Context,
    email: Annotated[str, typer.Option("--email", metavar="ADDRESS", help="Only the account with this address.")] = "",
    limit: LimitOption = USERS_SHOWN,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """List accounts, newest first. `update` changes one."""
    if context.invoked_subcommand is not None:
        if email or edge is not None or json_output or limit != USERS_SHOWN:
            raise usage("options of a subcommand go behind its name", f"see `genmesh admin users {context.invoked_subcommand} --help`")
        return
    with open_edge(edge) as client:
        found = _users(client, email, limit)
        if json_output:
            for user in found:
                write_json(user)
            return
        write_table(
            ["e-mail", "name", "user id", "plan", "roles", "created", "state"],
            (
                (
                    user.email,
                    user.display_name,
                    user.user_id,
                    plan_word(user.plan),
                    ", ".join(user.roles),
                    time_text(user.create_time),
                    "disabled" if user.disabled else "enabled",
                )
                for user in found
            ),
        )


@users.command("update")
def update_user(
    who: WhoArgument,
    role: Annotated[list[Role] | None, typer.Option("--role", help="Give this role. May be repeated.")] = None,
    no_role: Annotated[list[Role] | None, typer.Option("--no-role", help="Take this role away. May be repeated.")] = None,
    plan: Annotated[PlanName | None, typer.Option("--plan", help="Put the account on this plan.", case_sensitive=False)] = None,
    disabled: Annotated[
        bool | None, typer.Option("--disable/--enable", help="Let nobody use the account: its sessions end; or let it be used again.")
    ] = None,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Change roles and plan of an account, disable or enable it. It takes effect within a minute, running calls included.

    For example: genmesh admin users update ann@example.com --role operator --plan pro
    """
    given, taken = set(role or ()), set(no_role or ())
    if not given and not taken and plan is None and disabled is None:
        raise usage("nothing to change", "give --role, --no-role, --plan, --disable or --enable")
    if given & taken:
        raise usage(f"--role and --no-role both name {', '.join(sorted(given & taken))}")
    request = identity_pb2.UpdateUserRequest(disabled=disabled)
    if plan is not None:
        request.plan = identity_pb2.Plan.Value(f"PLAN_{plan.name}")
    with open_edge(edge) as client, missing_is(*_no_account(who)):
        if given or taken:
            user = _find_user(client, who)
            request.user_id = user.user_id
            request.roles.CopyFrom(identity_pb2.Roles(roles=sorted((set(user.roles) | given) - taken)))
        else:
            request.user_id = find_user_id(client, who)
        updated = client.call(client.identity_admin.UpdateUser, request).user
    if json_output:
        write_json(updated)
    else:
        _say(updated)
        note("it takes effect within a minute")


@app.command(rich_help_panel=ADMINISTRATORS)
def plan(
    who: WhoArgument,
    wanted: Annotated[PlanName, typer.Argument(metavar="PLAN", help="free or pro.", case_sensitive=False)],
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Put a user on a plan. It takes effect within a minute."""
    with open_edge(edge) as client, missing_is(*_no_account(who)):
        request = identity_pb2.UpdateUserRequest(user_id=find_user_id(client, who), plan=identity_pb2.Plan.Value(f"PLAN_{wanted.name}"))
        user = client.call(client.identity_admin.UpdateUser, request).user
    if json_output:
        write_json(user)
    else:
        print(f"{user.email} is on the plan {plan_word(user.plan)}")


def _say(user: identity_pb2.User) -> None:
    roles = f"roles {', '.join(user.roles)}" if user.roles else "no roles"
    print(f"{user.email}: plan {plan_word(user.plan)}, {roles}{', disabled' if user.disabled else ''}")


# The audit trail


@app.command(rich_help_panel=ADMINISTRATORS)
def audit(
    actor: Annotated[str | None, typer.Option("--actor", metavar="EMAIL_OR_USER_ID", help="Only acts of this account.")] = None,
    subject: Annotated[
        str,
        typer.Option("--subject", metavar="EMAIL_OR_ID", help="Only acts done to this: an account (by e-mail or id), a job, an API key …"),
    ] = "",
    method: Annotated[
        str, typer.Option("--method", metavar="RPC", help="Only this act, for example UpdateUser or LedgerAdminService/GrantCredits.")
    ] = "",
    since: Annotated[
        str | None, typer.Option("--since", metavar="TIME", help="Only acts from this time on: 2d, 12h, a date (midnight UTC) or RFC 3339.")
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Only acts before this time.")] = None,
    limit: LimitOption = 50,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """List acts that matter for security, newest first: who did what to whom, from where, and how it ended.

    For example: genmesh admin audit --since 2d --method UpdateUser
    """
    method_name = _full_method(method) if method else ""
    start_time, end_time = (parse_from_now(text, ago=True) if text is not None else None for text in (since, until))
    if start_time is not None and end_time is not None and start_time.ToNanoseconds() >= end_time.ToNanoseconds():
        raise usage("--since is not before --until")
    with open_edge(edge) as client:
        actor_user_id = find_user_id(client, actor) if actor is not None else ""
        subject_id = find_user_id(client, subject) if "@" in subject else subject

        def fetch(page_size: int, page_token: str):
            request = identity_pb2.ListAuditEntriesRequest(
                page_size=page_size,
                page_token=page_token,
                actor_user_id=actor_user_id,
                subject=subject_id,
                method=method_name,
                start_time=start_time,
                end_time=end_time,
            )
            response = client.call(client.identity_admin.ListAuditEntries, request)
            return response.audit_entries, response.next_page_token

        found = paged(fetch, limit)
        if json_output:
            for entry in found:
                write_json(entry)
            return
        write_table(
            ["when", "who", "with key", "what", "to whom", "from", "outcome", "reported by", "request", "details"],
            (
                (
                    time_text(entry.act_time),
                    entry.actor_user_id or entry.actor_service or "nobody signed in",
                    entry.actor_api_key_id,
                    entry.method.rpartition(".")[2],
                    entry.subject,
                    entry.client_address,
                    outcome_text(entry),
                    entry.reporter,
                    entry.request_id,
                    ", ".join(f"{name}={value}" for name, value in sorted(entry.details.items())),
                )
                for entry in found
            ),
        )


def _full_method(text: str) -> str:
    """`UpdateUser` → `genmesh.identity.v1.IdentityAdminService/UpdateUser`. Raises CommandError when it names none, or several."""
    wanted = text.strip("/")
    known = (
        f"{service.full_name}/{method.name}"
        for file in _CONTRACT
        for service in file.services_by_name.values()
        for method in service.methods
    )
    found = [name for name in known if name == wanted or name.endswith((f"/{wanted}", f".{wanted}"))]
    if len(found) != 1:
        several = f"there are {', '.join(found)}" if found else "`genmesh admin audit` shows what was called, for example UpdateUser"
        raise usage(f"{'not one method' if found else 'no such method'}: {text!r}", several)
    return found[0]
