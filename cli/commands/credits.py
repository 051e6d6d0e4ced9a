"""Your credits: the balance, the ledger entries behind it, ceilings. Buying more has a module of its own."""

import csv
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import IO, Annotated, TypedDict

import typer
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console

from cli.amounts import change_text, credits_text, time_text, utc_text
from cli.client import Edge, paged
from cli.commands import EdgeOption, JsonOption, LimitOption, interrupts, open_edge, parse_id, payments
from cli.download import check_target
from cli.failures import printable, usage
from cli.files import appending, is_stream, replacing
from cli.inputs import parse_bound, parse_time
from cli.output import account_word, entry_word, note, write_fields, write_json, write_table
from genmesh.credits.v1 import credits_pb2

ENTRIES_SHOWN = 20
WIDE_COLUMNS = 140
"""From this width on a terminal has room for model and receipt beside the job's id."""

CSV_COLUMNS = (
    *("entry_id", "event_id", "time", "kind", "account", "amount_millicredits", "balance_after_millicredits"),
    *("job_id", "model", "lines", "reason", "expire_time", "top_up_id"),
)
# What spreadsheets take for a formula, behind blanks too: some drop those. Full-width signs count as well.
_FORMULA = re.compile(r"[\t\r\n]|\s*[=+\-@＝＋－＠]")  # noqa: RUF001

app = typer.Typer()
group = typer.Typer()
app.add_typer(group, name="credits")
group.add_typer(payments.app)


class EntryKind(StrEnum):
    """What moves credits, as typed and shown."""

    GRANT = "grant"
    RESERVE = "reserve"
    CAPTURE = "capture"
    RELEASE = "release"
    EXPIRE = "expire"
    CLAWBACK = "clawback"
    LAPSE = "lapse"
    PLAN_GRANT = "plan-grant"
    TOP_UP = "top-up"
    REFUND = "refund"


JobOption = Annotated[str, typer.Option("--job", metavar="ID", help="Only entries of this job.")]
KindOption = Annotated[
    list[str] | None,
    typer.Option("--kind", metavar="KIND", help=f"Only entries of this kind: {', '.join(EntryKind)}. May be repeated."),
]
SinceOption = Annotated[
    str | None,
    typer.Option("--since", metavar="TIME", help="Only entries from this time on: a date (midnight UTC) or RFC 3339."),
]
UntilOption = Annotated[str | None, typer.Option("--until", metavar="TIME", help="Only entries before this time.")]
BOUND_HELP = "{} 0: nothing; none: no bound. Left out: stays as it is."
DailyOption = Annotated[str | None, typer.Option("--daily", metavar="CREDITS", help=BOUND_HELP.format("At most this much a day (UTC)."))]
MonthlyOption = Annotated[
    str | None, typer.Option("--monthly", metavar="CREDITS", help=BOUND_HELP.format("At most this much a month (UTC)."))
]
NoneOption = Annotated[bool, typer.Option("--none", help="Lift both bounds.")]


@group.callback(invoke_without_command=True)
def show_credits(
    context: typer.Context,
    entries: Annotated[bool, typer.Option("--entries", help="List what changed the balance, newest first.")] = False,
    limit: LimitOption = ENTRIES_SHOWN,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show your balance. The commands below show what is behind it, follow it, bound it, and add to it."""
    if context.invoked_subcommand is not None:
        if entries or edge is not None or json_output or limit != ENTRIES_SHOWN:
            raise usage("options of a subcommand go behind its name", f"see `genmesh credits {context.invoked_subcommand} --help`")
        return
    with open_edge(edge) as client:
        if entries:
            show_entries(find_entries(client, parse_selection(), limit), json_output=json_output)
            return
        balance = client.call(client.credits.GetBalance, credits_pb2.GetBalanceRequest())
    if json_output:
        write_json(balance)
    else:
        write_fields(balance_fields(balance))


def balance_fields(balance: credits_pb2.GetBalanceResponse | credits_pb2.GetAccountResponse) -> list[tuple[str, str]]:
    """What is available, what of it expires, what is held, for `write_fields`."""
    promotional = ""
    if balance.promotional_millicredits:
        promotional = credits_text(balance.promotional_millicredits)
        if isinstance(balance, credits_pb2.GetBalanceResponse) and (when := time_text(balance.next_expire_time)):
            promotional += f", the first expire {when}"
    return [
        ("available", credits_text(balance.available_millicredits)),
        ("of that promotional", promotional),
        ("held for jobs", credits_text(balance.reserved_millicredits) if balance.reserved_millicredits else ""),
    ]


# Entries


@group.command("entries")
def list_entries(
    job: JobOption = "",
    kind: KindOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: LimitOption = ENTRIES_SHOWN,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """List what changed your balance, newest first. `genmesh credits export` writes all of it as CSV."""
    selection = parse_selection(job, kind, since, until)
    with open_edge(edge) as client:
        show_entries(find_entries(client, selection, limit), json_output=json_output)


@group.command("export")
def export_entries(
    job: JobOption = "",
    kind: KindOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="At most the newest N entries. Default: all.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="File to write, whole or not at all; or a pipe. Default: standard output."),
    ] = None,
    edge: EdgeOption = None,
) -> None:
    """Write ledger entries as CSV, newest first: one a row, below the names of the columns.

    Amounts are whole millicredits, times RFC 3339 in UTC. Text that a spreadsheet would take for a formula begins with an apostrophe.
    """
    selection = parse_selection(job, kind, since, until)
    if out == Path("-"):
        out = None
    direct = out is not None and is_stream(out)
    if out is not None and not direct:
        check_target(out)
        if out.is_dir():
            raise usage(f"not a file: {out}", "give --out the name of a file, or leave it out and use `>`")
    with open_edge(edge) as client:
        found = find_entries(client, selection, limit)
        if out is None:
            write_csv(sys.stdout, found)
            return
        with (appending if direct else replacing)(out) as binary, io.TextIOWrapper(binary, encoding="utf-8", newline="") as file:
            count = write_csv(file, found)
    note(f"saved {out}, {count} {'entry' if count == 1 else 'entries'}")


class Selection(TypedDict):
    """Which entries, as both requests for a page of them say it."""

    job_id: str
    kinds: list[credits_pb2.Entry.Kind.ValueType]
    start_time: Timestamp | None
    end_time: Timestamp | None


def parse_selection(job: str = "", kinds: Iterable[str] | None = None, since: str | None = None, until: str | None = None) -> Selection:
    """What --job, --kind, --since and --until ask for. Raises CommandError."""
    start_time, end_time = (parse_time(text) if text is not None else None for text in (since, until))
    if start_time is not None and end_time is not None and start_time.ToNanoseconds() >= end_time.ToNanoseconds():
        raise usage("--since is not before --until")
    if job:
        job = parse_id(job, "a job", "`genmesh jobs list` shows the ids of your jobs")
    found = dict.fromkeys(_parse_kind(kind) for kind in kinds or ())
    return Selection(
        job_id=job,
        kinds=[credits_pb2.Entry.Kind.Value(f"KIND_{kind.name}") for kind in found],
        start_time=start_time,
        end_time=end_time,
    )


def _parse_kind(text: str) -> EntryKind:
    try:
        return EntryKind(text.strip().lower().replace("_", "-").removeprefix("kind-"))  # as JSON has it, too
    except ValueError:
        raise usage(f"no such kind of entry: {text!r}", f"there are {', '.join(EntryKind)}") from None


def find_entries(client: Edge, selection: Selection, limit: int | None, *, user_id: str | None = None) -> Iterator[credits_pb2.Entry]:
    """The newest `limit` of the selected entries (None: all): the caller's, or as an administrator those of `user_id`."""

    def fetch(page_size: int, page_token: str):
        if user_id is None:
            mine = credits_pb2.ListEntriesRequest(page_size=page_size, page_token=page_token, **selection)
            response = client.call(client.credits.ListEntries, mine)
        else:
            theirs = credits_pb2.ListAccountEntriesRequest(user_id=user_id, page_size=page_size, page_token=page_token, **selection)
            response = client.call(client.ledger_admin.ListAccountEntries, theirs)
        return response.entries, response.next_page_token

    return paged(fetch, limit)


def show_entries(found: Iterable[credits_pb2.Entry], *, json_output: bool, with_actor: bool = False) -> None:
    """Entries on stdout; `with_actor`: a column says which administrator made them."""
    if json_output:
        for entry in found:
            write_json(entry)
        return
    console = Console()
    wide = not console.is_terminal or console.width >= WIDE_COLUMNS
    write_table(
        ["when", "what", "account", "change", "balance", *(["by"] if with_actor else []), "for"],
        (
            (
                time_text(entry.create_time),
                entry_word(entry.kind),
                account_word(entry.account),
                change_text(entry.amount_millicredits),
                credits_text(entry.balance_after_millicredits),
                *([entry.actor_id] if with_actor else []),
                purpose_text(entry) if wide else entry.job_id or entry.reason,
            )
            for entry in found
        ),
    )


def purpose_text(entry: credits_pb2.Entry) -> str:
    """What an entry is for: `JOB, sd-tiny, 20 steps`; an administrator's words; when promotional credits expire."""
    lines = (_quantity_text(line) if line.unit else line.description for line in entry.lines)
    until = time_text(entry.expire_time)
    return ", ".join(
        part for part in (entry.job_id, entry.model, *lines, entry.reason, until and f"from credits that expire {until}") if part
    )


def _quantity_text(line: credits_pb2.ReceiptLine) -> str:
    return f"{line.quantity} {line.unit}{'' if line.quantity == 1 else 's'}"


def write_csv(file: IO[str], entries: Iterable[credits_pb2.Entry]) -> int:
    """The entries as CSV, each as soon as it is there; how many there were."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    count = 0
    for count, entry in enumerate(entries, start=1):  # noqa: B007  # counted for the caller
        writer.writerow(_csv_row(entry))
    return count


def _csv_row(entry: credits_pb2.Entry) -> list[str | int]:
    return [
        entry.entry_id,
        entry.event_id,
        utc_text(entry.create_time),
        entry_word(entry.kind),
        account_word(entry.account),
        entry.amount_millicredits,
        entry.balance_after_millicredits,
        cell_text(entry.job_id),
        cell_text(entry.model),
        cell_text("; ".join(_line_text(line) for line in entry.lines)),
        cell_text(entry.reason),
        utc_text(entry.expire_time),
        cell_text(entry.top_up_id),
    ]


def _line_text(line: credits_pb2.ReceiptLine) -> str:
    quantity = f"{_quantity_text(line)}, " if line.unit else ""
    return f"{line.description}: {quantity}{line.amount_millicredits} millicredits"


def cell_text(text: str) -> str:
    """Text on one line that no spreadsheet takes for a formula."""
    return f"{chr(39) if _FORMULA.match(text) else ''}{printable(text)}"


@group.command("watch")
def watch_balance(edge: EdgeOption = None, json_output: JsonOption = False) -> None:
    """Follow your balance live, a line for each change, until Ctrl-C."""
    before: credits_pb2.WatchBalanceResponse | None = None
    lost = False

    def interrupted() -> None:
        nonlocal lost
        if not lost:
            note("no answer yet, trying again" if before is None else "connection lost, reconnecting")
        lost = True

    with open_edge(edge) as client, interrupts(client.stop):
        for balance in client.stream(client.credits.WatchBalance, credits_pb2.WatchBalanceRequest, on_interruption=interrupted):
            if lost and before is not None:
                note("connected again")
            lost = False
            if before is not None and before.version == balance.version:
                continue  # only time has passed
            if json_output:
                write_json(balance)
            else:
                now = Timestamp()
                now.GetCurrentTime()
                print(f"{time_text(now)}  {change_line(balance, before)}", flush=True)
            before = balance


def change_line(balance: credits_pb2.WatchBalanceResponse, before: credits_pb2.WatchBalanceResponse | None) -> str:
    """`97.5 credits, 2.5 credits held (-2.5 credits, +2.5 credits held)`."""

    def line(text: Callable[[int], str], available: int, held: int) -> str:
        parts = (text(available) if available or text is credits_text else "", f"{text(held)} held" if held else "")
        return ", ".join(part for part in parts if part)

    stands = line(credits_text, balance.available_millicredits, balance.reserved_millicredits)
    if balance.promotional_millicredits:
        when = time_text(balance.next_expire_time)
        stands += f", {credits_text(balance.promotional_millicredits)} promotional{f', the first expire {when}' if when else ''}"
    if before is None:
        return stands
    changed = line(
        change_text,
        balance.available_millicredits - before.available_millicredits,
        balance.reserved_millicredits - before.reserved_millicredits,
    )
    return f"{stands} ({changed})" if changed else stands


# Ceilings


@group.command("ceilings")
def list_ceilings(edge: EdgeOption = None, json_output: JsonOption = False) -> None:
    """Show what your account and your API keys may spend a day and a month, and how much of it is spent."""
    with open_edge(edge) as client:
        found = client.call(client.credits.ListCeilings, credits_pb2.ListCeilingsRequest()).ceilings
    if json_output:
        for ceiling in found:
            write_json(ceiling)
    elif found:
        write_ceilings(found)
    else:
        note("no ceiling is set: only your balance bounds what you spend")


def write_ceilings(ceilings: Iterable[credits_pb2.Ceiling]) -> None:
    """A table of ceilings on stdout."""
    write_table(
        ["of", "at most a day", "spent today", "at most a month", "spent this month"],
        (
            (
                ceiling.api_key_id or "account",
                credits_text(ceiling.daily_millicredits) if ceiling.HasField("daily_millicredits") else "no bound",
                credits_text(ceiling.spent_today_millicredits),
                credits_text(ceiling.monthly_millicredits) if ceiling.HasField("monthly_millicredits") else "no bound",
                credits_text(ceiling.spent_this_month_millicredits),
            )
            for ceiling in ceilings
        ),
    )


@group.command("ceiling")
def set_key_ceiling(
    api_key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="Id of one of your API keys.")],
    daily: DailyOption = None,
    monthly: MonthlyOption = None,
    none: NoneOption = False,
    edge: EdgeOption = None,
    json_output: JsonOption = False,
) -> None:
    """Bound what one of your API keys may spend a day and a month."""
    api_key_id = parse_id(api_key_id, "an API key", "`genmesh credits ceilings` shows the ids of those that have one")
    bounds = parse_bounds(daily, monthly, none=none)
    with open_edge(edge) as client:

        def current() -> Iterable[credits_pb2.Ceiling]:
            return client.call(client.credits.ListCeilings, credits_pb2.ListCeilingsRequest()).ceilings

        daily_millicredits, monthly_millicredits = completed(bounds, api_key_id, current)
        request = credits_pb2.SetKeyCeilingRequest(
            api_key_id=api_key_id,
            daily_millicredits=daily_millicredits,
            monthly_millicredits=monthly_millicredits,
            lift=daily_millicredits is None and monthly_millicredits is None,
        )
        ceiling = client.call(client.credits.SetKeyCeiling, request).ceiling
    if json_output:
        write_json(ceiling)
    else:
        print(f"API key {api_key_id}: {ceiling_text(ceiling)}")


Bounds = dict[str, int | None]
"""Bounds that were named: `daily`, `monthly`; None lifts one."""


def parse_bounds(daily: str | None, monthly: str | None, *, none: bool) -> Bounds:
    """What --daily, --monthly and --none ask for. Raises CommandError when they ask for nothing, or contradict each other."""
    bounds: Bounds = {name: parse_bound(text) for name, text in (("daily", daily), ("monthly", monthly)) if text is not None}
    if none and bounds:
        raise usage("--none lifts both bounds: it goes with neither --daily nor --monthly", "to lift one, say for example `--daily none`")
    if not none and not bounds:
        raise usage("say which bounds: --daily, --monthly or --none", "for example `--daily 5 --monthly 50`")
    return {"daily": None, "monthly": None} if none else bounds


def completed(bounds: Bounds, api_key_id: str, current: Callable[[], Iterable[credits_pb2.Ceiling]]) -> tuple[int | None, int | None]:
    """Daily and monthly bound; what was not named is as in the ceilings of `current()`. Setting a ceiling replaces both."""
    if len(bounds) < 2:
        for ceiling in current():
            if ceiling.api_key_id == api_key_id:
                kept: Bounds = {}
                if ceiling.HasField("daily_millicredits"):
                    kept["daily"] = ceiling.daily_millicredits
                if ceiling.HasField("monthly_millicredits"):
                    kept["monthly"] = ceiling.monthly_millicredits
                bounds = kept | bounds
    return bounds.get("daily"), bounds.get("monthly")


def ceiling_text(ceiling: credits_pb2.Ceiling) -> str:
    """`at most 5 credits a day (1.2 credits spent today), no bound a month`."""
    parts: list[str] = []
    for period, name, spent_name in (
        ("day", "daily_millicredits", "spent_today_millicredits"),
        ("month", "monthly_millicredits", "spent_this_month_millicredits"),
    ):
        spent: int = getattr(ceiling, spent_name)
        when = "today" if period == "day" else "this month"
        bound = f"at most {credits_text(getattr(ceiling, name))} a {period}" if ceiling.HasField(name) else f"no bound a {period}"  # pyright: ignore[reportArgumentType]
        parts.append(f"{bound}{f' ({credits_text(spent)} spent {when})' if spent else ''}")
    return ", ".join(parts)
