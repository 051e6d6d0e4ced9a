"""What administrators and operators do: credits and ceilings of users, the audit of the ledger.

Accounts with the audit trail, and jobs with their queue, have modules of their own.
"""

import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Annotated

import grpc
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cli.amounts import credits_text, time_text
from cli.commands import (
    EdgeOption,
    JsonOption,
    LimitOption,
    RequestIdOption,
    admin_accounts,
    admin_jobs,
    call_once,
    interrupts,
    open_edge,
    parse_request_id,
)
from cli.commands.admin_accounts import ADMINISTRATORS, OPERATORS, WhoArgument, find_user_id
from cli.commands.credits import (
    ENTRIES_SHOWN,
    DailyOption,
    JobOption,
    KindOption,
    MonthlyOption,
    NoneOption,
    SinceOption,
    UntilOption,
    balance_fields,
    ceiling_text,
    completed,
    find_entries,
    parse_bounds,
    parse_selection,
    show_entries,
    write_ceilings,
)
from cli.failures import CommandError, ExitCode, failure_of, printable, reason_of, usage
from cli.inputs import parse_credits, parse_time
from cli.output import note, write_fields, write_json, write_table
from genmesh.credits.v1 import credits_pb2

AUDIT_TIMEOUT_S = 3600.0

app = typer.Typer()
group = typer.Typer(help="For operators and administrators: accounts, credits, the ledger, the queue.", no_args_is_help=True)
ledger = typer.Typer(help="The ledger as a whole.", no_args_is_help=True)
app.add_typer(group, name="admin")
group.add_typer(ledger, name="ledger", rich_help_panel=OPERATORS)
group.add_typer(admin_accounts.app)
group.add_typer(admin_jobs.app)


AmountArgument = Annotated[str, typer.Argument(metavar="AMOUNT", help="How many credits, for example 100 or 2.5.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Why; kept in the ledger with your id, and shown to the user.")]


# Credits of users


@group.command(rich_help_panel=ADMINISTRATORS)
def grant(
    who: WhoArgument,
    amount: AmountArgument,
    reason: ReasonOption,
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires", metavar="TIME", help="When what is left of them expires: a date (midnight UTC) or RFC 3339. Default: never."
        ),
    ] = None,
    request_id: RequestIdOption = None,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Give credits to a user.

    For example: genmesh admin grant ann@example.com 10 --reason "thank you" --expires 2027-01-01
    """
    millicredits = parse_credits(amount)
    check_reason(reason)
    # Whether it is over is for the server to say: a repeat after that has to get the answer of the first time.
    expire_time = parse_time(expires) if expires is not None else None
    request_id = parse_request_id(request_id)
    with open_edge(edge) as client:
        request = credits_pb2.GrantCreditsRequest(
            request_id=request_id,
            user_id=find_user_id(client, who),
            amount_millicredits=millicredits,
            reason=reason,
            expire_time=expire_time,
        )
        response = call_once(client, client.ledger_admin.GrantCredits, request, request_id)
    if json_output:
        write_json(response)
        return
    until = f" until {time_text(expire_time)}" if expire_time is not None else ""
    print(f"granted {credits_text(millicredits)}{until}; {who} now has {credits_text(response.available_millicredits)}")


@group.command(rich_help_panel=ADMINISTRATORS)
def clawback(
    who: WhoArgument,
    amount: AmountArgument,
    reason: ReasonOption,
    request_id: RequestIdOption = None,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Take available credits back from a user, promotional ones first. What is held for jobs stays."""
    millicredits = parse_credits(amount)
    check_reason(reason)
    request_id = parse_request_id(request_id)
    with open_edge(edge) as client:
        request = credits_pb2.ClawbackCreditsRequest(
            request_id=request_id, user_id=find_user_id(client, who), amount_millicredits=millicredits, reason=reason
        )
        try:
            response = call_once(client, client.ledger_admin.ClawbackCredits, request, request_id)
        except grpc.RpcError as error:
            if reason_of(error) != "ERROR_REASON_INSUFFICIENT_CREDITS":
                raise
            raise failure_of(error).told(advice=f"`genmesh admin account {who}` shows what there is") from error
    if json_output:
        write_json(response)
    else:
        print(f"took back {credits_text(millicredits)}; {who} now has {credits_text(response.available_millicredits)}")


def check_reason(reason: str) -> None:
    """Raise CommandError when nothing is said."""
    if not reason.strip():
        raise usage("--reason is blank", "say why: it is kept in the ledger, and shown to the user")


@group.command(rich_help_panel=OPERATORS)
def account(who: WhoArgument, edge: EdgeOption = None, json_output: JsonOption = False) -> None:
    """Show what a user has: balance, promotional credits, ceilings."""
    with open_edge(edge) as client:
        user_id = find_user_id(client, who)
        found = client.call(client.ledger_admin.GetAccount, credits_pb2.GetAccountRequest(user_id=user_id))
    if json_output:
        write_json(found)
        return
    write_fields([("user id", user_id), *balance_fields(found)])
    if found.promotions:
        print()
        write_table(
            ["expire", "left", "held for jobs"],
            (
                (
                    time_text(promotion.expire_time),
                    credits_text(promotion.available_millicredits),
                    credits_text(promotion.reserved_millicredits) if promotion.reserved_millicredits else "",
                )
                for promotion in found.promotions
            ),
        )
    if found.ceilings:
        print()
        write_ceilings(found.ceilings)


@group.command(rich_help_panel=OPERATORS)
def entries(
    who: WhoArgument,
    job: JobOption = "",
    kind: KindOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: LimitOption = ENTRIES_SHOWN,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """List what changed a user's balance, newest first, and which administrator gave or took back."""
    selection = parse_selection(job, kind, since, until)
    with open_edge(edge) as client:
        found = find_entries(client, selection, limit, user_id=find_user_id(client, who))
        show_entries(found, json_output=json_output, with_actor=True)


@group.command(rich_help_panel=ADMINISTRATORS)
def ceiling(
    who: WhoArgument,
    daily: DailyOption = None,
    monthly: MonthlyOption = None,
    none: NoneOption = False,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Bound what a user may spend a day and a month."""
    bounds = parse_bounds(daily, monthly, none=none)
    with open_edge(edge) as client:
        user_id = find_user_id(client, who)

        def current() -> Iterable[credits_pb2.Ceiling]:
            return client.call(client.ledger_admin.GetAccount, credits_pb2.GetAccountRequest(user_id=user_id)).ceilings

        daily_millicredits, monthly_millicredits = completed(bounds, "", current)
        request = credits_pb2.SetUserCeilingRequest(
            user_id=user_id,
            daily_millicredits=daily_millicredits,
            monthly_millicredits=monthly_millicredits,
            lift=daily_millicredits is None and monthly_millicredits is None,
        )
        stands = client.call(client.ledger_admin.SetUserCeiling, request).ceiling
    if json_output:
        write_json(stands)
    else:
        print(f"{who}: {ceiling_text(stands)}")


# The ledger


@ledger.command()
def audit(edge: EdgeOption = None, json_output: JsonOption = False) -> None:
    """Recompute every balance from the ledger's entries, and show what does not add up.

    Ends with the trial balance of all accounts. Exit code 0: the ledger adds up; 8: it does not; 3: the audit was cut off.
    """
    count = 0
    why = ""
    summary: credits_pb2.AuditSummary | None = None
    with open_edge(edge) as client, interrupts(client.stop), _progress("auditing the ledger"):
        try:
            for response in client.read(client.ledger_admin.AuditLedger, credits_pb2.AuditLedgerRequest(), timeout_s=AUDIT_TIMEOUT_S):
                finding = response.WhichOneof("finding")
                if finding is not None and json_output:
                    write_json(response)
                if finding == "discrepancy":
                    count += 1
                    if not json_output:
                        print(_discrepancy_text(response.discrepancy), flush=True)
                elif finding == "summary":
                    summary = response.summary
        except grpc.RpcError as error:
            if not count:
                raise
            why = f" ({failure_of(error).message})"  # what was found says more than how the stream ended
    if summary is None:
        found = f" after {_counted(count, 'discrepancy', 'discrepancies')}" if count else ""
        raise CommandError(
            f"the audit was cut off{found}{why}: the rest is not known",
            "run it again",
            code=ExitCode.DISCREPANCY if count else ExitCode.UNAVAILABLE,
        )
    total = sum(int(total.amount_millicredits) for total in summary.totals)
    if not json_output:
        _write_summary(summary, total)
    if total:
        note(f"the accounts add up to {credits_text(total)} and not to zero")
    count = max(count, summary.discrepancy_count, 1 if total else 0)
    if count:
        raise CommandError(
            f"the ledger does not add up: {_counted(count, 'discrepancy', 'discrepancies')}",
            "the entries are the truth; docs/operations.md says what to do: do not let the named accounts spend before",
            code=ExitCode.DISCREPANCY,
        )
    note("the ledger adds up")


@contextmanager
def _progress(what: str) -> Generator[None]:
    """On a terminal: what runs, and for how long, while the block does."""
    console = Console(stderr=True, highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # Lines on stdout go above the progress where both are on the terminal, and where they belong where not.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=redirect) as progress:
        progress.add_task(what, total=None)
        yield


def _discrepancy_text(discrepancy: credits_pb2.Discrepancy) -> str:
    amounts = [f"{amount} millicredits" if amount else "" for amount in (discrepancy.expected, discrepancy.actual)]
    parts = [discrepancy.problem, discrepancy.subject, *amounts]
    if not sys.stdout.isatty():
        return "\t".join(printable(part) for part in parts)
    differ = f": {amounts[0] or 'nothing'} expected, {amounts[1] or 'nothing'} there" if any(amounts) else ""
    return printable(f"{discrepancy.problem}: {discrepancy.subject}{differ}")


def _write_summary(summary: credits_pb2.AuditSummary, total: int) -> None:
    write_fields(
        [
            ("accounts", str(summary.account_count)),
            ("events", str(summary.event_count)),
            ("entries", str(summary.entry_count)),
            ("reservations", str(summary.reservation_count)),
            ("discrepancies", str(summary.discrepancy_count)),
        ]
    )
    print()
    write_table(
        ["account", "sum of its entries"],
        [*((one.account, credits_text(int(one.amount_millicredits))) for one in summary.totals), ("all", credits_text(total))],
    )


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"
