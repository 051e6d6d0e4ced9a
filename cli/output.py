"""What commands print: tables, fields, JSON, and the words for what the contract numbers. Results go to stdout, news to stderr."""

import sys
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cli.amounts import time_text
from cli.failures import message_in, printable, reason_in
from genmesh.credits.v1 import credits_pb2, payments_pb2
from genmesh.identity.v1 import identity_pb2
from genmesh.jobs.v1 import jobs_pb2

COLUMN_GAP = 2
LAST_COLUMN_MIN = 24
"""What the last column of a table needs at least; longer text is folded."""


def write_json(message: Message) -> None:
    """A message as proto JSON on one line of stdout, fields that are zero included: what the REST side answers with."""
    print(json_format.MessageToJson(message, indent=None, always_print_fields_with_no_presence=True), flush=True)


def write_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows on stdout: tab-separated values without headings; on a terminal a table, or what is too wide for one as fields, row by row.

    Only the last column of a table is folded.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        for row in rows:
            print("\t".join(printable(cell) for cell in row))
        return
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(cell_len, cells)) for cells in zip(columns, *shown, strict=True)]
    if sum(widths[:-1]) + COLUMN_GAP * (len(widths) - 1) + min(widths[-1], LAST_COLUMN_MIN) > console.width:
        for number, row in enumerate(shown):
            if number:
                print()
            write_fields(zip(columns, row, strict=True))
        return
    table = Table(box=None, pad_edge=False, padding=(0, COLUMN_GAP, 0, 0), header_style="bold")
    for column in columns[:-1]:
        table.add_column(column, no_wrap=True)
    table.add_column(columns[-1], overflow="fold")
    for row in shown:
        table.add_row(*map(Text, row))
    console.print(table)


def write_fields(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values on stdout, one pair a line; empty values are left out."""
    console = Console(highlight=False, soft_wrap=True)
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        console.print(Text.assemble((f"{name:<{width}}  ", "dim"), printable(value)))


def state_word(state: "jobs_pb2.State.ValueType") -> str:
    """STATE_PENDING → `pending`."""
    return _word(jobs_pb2.State, state, "STATE_")


def stage_word(stage: "jobs_pb2.Stage.ValueType") -> str:
    """STAGE_DENOISING → `denoising`."""
    return _word(jobs_pb2.Stage, stage, "STAGE_")


def entry_word(kind: "credits_pb2.Entry.Kind.ValueType") -> str:
    """KIND_PLAN_GRANT → `plan-grant`."""
    return _word(credits_pb2.Entry.Kind, kind, "KIND_").replace("_", "-")


def account_word(account: "credits_pb2.Entry.Account.ValueType") -> str:
    """ACCOUNT_AVAILABLE → `available`."""
    return _word(credits_pb2.Entry.Account, account, "ACCOUNT_")


def plan_word(plan: "identity_pb2.Plan.ValueType") -> str:
    """PLAN_FREE → `free`."""
    return _word(identity_pb2.Plan, plan, "PLAN_")


def key_scope_word(scope: "identity_pb2.ApiKeyScope.ValueType") -> str:
    """API_KEY_SCOPE_READ → `read`."""
    return _word(identity_pb2.ApiKeyScope, scope, "API_KEY_SCOPE_")


def upload_word(state: "jobs_pb2.UploadState.ValueType") -> str:
    """UPLOAD_STATE_PENDING → `pending`."""
    return _word(jobs_pb2.UploadState, state, "UPLOAD_STATE_")


def outcome_text(entry: identity_pb2.AuditEntry) -> str:
    """How an act of the audit trail ended: `ok`, `scope missing`; what nobody knows is `not known`."""
    if not entry.HasField("code"):
        return "not known"
    return entry.reason.removeprefix("ERROR_REASON_").lower().replace("_", " ") or _word(code_pb2.Code, entry.code, "").replace("_", " ")


def top_up_word(state: "payments_pb2.TopUp.State.ValueType") -> str:
    """STATE_PAID → `paid`."""
    return _word(payments_pb2.TopUp.State, state, "STATE_")


def level_word(priority: "jobs_pb2.Priority.ValueType") -> str:
    """PRIORITY_FREE → `free`."""
    return _word(jobs_pb2.Priority, priority, "PRIORITY_")


def hold_word(hold: "jobs_pb2.DeadLetter.Hold.ValueType") -> str:
    """HOLD_RELEASED → `released`."""
    return _word(jobs_pb2.DeadLetter.Hold, hold, "HOLD_")


Value = TypeVar("Value", contravariant=True)


class _EnumNames(Protocol[Value]):
    def Name(self, number: Value) -> str: ...  # noqa: N802  # as protobuf names it


def _word(enum: _EnumNames[Value], value: Value, prefix: str) -> str:
    try:
        return enum.Name(value).removeprefix(prefix).lower()
    except ValueError:  # a value of a newer release
        return str(value)


def prompt_of(job: jobs_pb2.Job) -> str:
    """What the job makes, in the user's words."""
    return printable(job.spec.image.prompt)


def error_text(error: status_pb2.Status) -> str:
    """Message and reason of an error."""
    reason = reason_in(error)[0].removeprefix("ERROR_REASON_").lower().replace("_", " ")
    return f"{message_in(error) or 'no reason given'}{f' ({reason})' if reason else ''}"


def reason_text(job: jobs_pb2.Job) -> str:
    """Why a failed job failed."""
    return error_text(job.error)


def waiting_text(job: jobs_pb2.Job) -> str:
    """What keeps a job from running, in its owner's words; empty when it just waits its turn."""
    waiting = job.waiting
    match waiting.reason:
        case jobs_pb2.Waiting.REASON_NO_WORKER:
            return waiting.message or "no worker offers its model right now"
        case jobs_pb2.Waiting.REASON_OWNER_LIMIT:
            running = waiting.owner_running
            return f"waits for {'your running job' if running == 1 else f'one of your {running} running jobs'} to end"
        case jobs_pb2.Waiting.REASON_MODEL_LOADING:
            return f"{waiting.model or 'its model'} is being loaded"
        case jobs_pb2.Waiting.REASON_RETRY:
            return f"attempt {job.attempt} failed, the next one begins after {time_text(waiting.retry_time)}"
        case _:
            return ""


def waiting_fields(job: jobs_pb2.Job) -> list[tuple[str, str]]:
    """All that is known of what a job waits for, for `write_fields`."""
    waiting = job.waiting
    if not waiting.reason:
        return []
    running = f"{waiting.owner_running} of {waiting.owner_limit}" if waiting.owner_limit else str(waiting.owner_running)
    return [
        ("waits for", waiting_text(job) or waiting.message),
        ("waiting reason", _word(jobs_pb2.Waiting.Reason, waiting.reason, "REASON_").replace("_", " ")),
        ("place in the queue", str(waiting.queue_position or "")),
        ("your running jobs", running if waiting.owner_running or waiting.owner_limit else ""),
        ("next attempt", time_text(waiting.retry_time)),
    ]


def note(text: str) -> None:
    """One line of news on stderr, beside the results."""
    print(printable(text), file=sys.stderr, flush=True)
