"""What the user commands show: tables, jobs, live progress, pictures in the terminal, JSON.

Results go to stdout; progress goes where its caller says. On a terminal it is drawn, elsewhere it is written line by line.
"""

import io
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from google.rpc import code_pb2, status_pb2
from PIL import Image
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from cli.amounts import credits_text, seconds_text, time_text
from cli.client import TERMINAL
from cli.failures import message_in, printable, reason_in
from genmesh.credits.v1 import credits_pb2, payments_pb2
from genmesh.identity.v1 import identity_pb2
from genmesh.jobs.v1 import jobs_pb2

PREVIEW_COLUMNS = 48
PREVIEW_PIXELS_MAX = 2048 * 2048
PROMPT_COLUMNS = 60
BAR_COLUMNS = 40
PICTURE_PIXELS_MAX = 4096 * 4096
JOBS_DRAWN_MAX = 20

_STATE_STYLE = {
    jobs_pb2.STATE_PENDING: "yellow",
    jobs_pb2.STATE_PROCESSING: "cyan",
    jobs_pb2.STATE_COMPLETED: "green",
    jobs_pb2.STATE_FAILED: "red",
    jobs_pb2.STATE_CANCELLED: "magenta",
}


def write_json(message: Message) -> None:
    """A message as proto JSON on one line of stdout, fields that are zero included: what the REST side answers with."""
    print(json_format.MessageToJson(message, indent=None, always_print_fields_with_no_presence=True), flush=True)


def write_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows on stdout: a table on a terminal, tab-separated values elsewhere."""
    console = Console(highlight=False)
    if not console.is_terminal:
        for row in rows:
            print("\t".join(printable(cell) for cell in row))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
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


# Jobs on their way


@dataclass
class JobView:
    """One job as a watch has told it so far."""

    job: jobs_pb2.Job
    eta_seconds: float = 0.0
    preview: bytes = b""
    interrupted: bool = False
    cancelling: bool = False

    def apply(self, response: jobs_pb2.WatchJobsResponse) -> None:
        """Take in a message of the watch that belongs to this job."""
        self.interrupted = False
        if response.HasField("snapshot"):
            self._replace(response.snapshot)
            return
        event = response.event
        match event.WhichOneof("payload"):
            case "state_change":
                self._replace(event.state_change.job)
                self.job.job_id = event.job_id
                self.job.state = event.state_change.state
            case "progress":
                self.job.progress.CopyFrom(event.progress)
                self.job.ClearField("waiting")
                self.job.state = jobs_pb2.STATE_PROCESSING  # nothing else makes progress
                self.job.attempt = event.attempt
                self.eta_seconds = event.progress.eta_seconds
            case "preview":
                self.preview = event.preview.inline_jpeg
            case "queue_update":
                self.job.queue_position = event.queue_update.queue_position
                self.eta_seconds = event.queue_update.eta_seconds
            case "asset":
                self.job.assets.append(event.asset)
            case _:  # a payload of a newer release
                pass

    def _replace(self, job: jobs_pb2.Job) -> None:
        self.job = jobs_pb2.Job()
        self.job.CopyFrom(job)
        self.eta_seconds = job.progress.eta_seconds
        if job.state == jobs_pb2.STATE_PENDING:
            self.preview = b""  # of an attempt that came to nothing

    @property
    def ended(self) -> bool:
        """Whether nothing more can happen."""
        return self.job.state in TERMINAL

    def describe(self) -> str:
        """Where the job stands, in one line without its name."""
        job = self.job
        if job.state == jobs_pb2.STATE_PENDING:
            parts = ["pending"]
            if job.queue_position:
                parts.append("next in the queue" if job.queue_position == 1 else f"{job.queue_position} in the queue")
            if held_up := waiting_text(job):
                parts.append(held_up)
        elif job.state == jobs_pb2.STATE_PROCESSING:
            parts = [_word(jobs_pb2.Stage, job.progress.stage, "STAGE_") if job.progress.stage else "processing"]
            if job.progress.step_count:
                parts.append(f"step {job.progress.step}/{job.progress.step_count}")
            parts.append(f"{job.progress.percent:.0f} %")
            if held_up := waiting_text(job):
                parts.append(held_up)
            if job.attempt > 1:
                parts.append(f"attempt {job.attempt}")
        else:
            parts = [state_word(job.state)]
            if job.state == jobs_pb2.STATE_FAILED:
                parts.append(reason_text(job))
            parts.append(f"charged {credits_text(job.cost_millicredits)}")
        if job.retry_count and not self.ended:
            parts.append(f"retry {job.retry_count}")
        if self.eta_seconds > 0 and not self.ended:
            parts.append(f"{seconds_text(self.eta_seconds)} left")
        if self.cancelling and not self.ended:
            parts.append("cancelling")
        if self.interrupted:
            parts.append("reconnecting")
        return printable(", ".join(parts))


@dataclass
class JobViews:
    """The jobs of a watch, in the order they turned up."""

    by_id: dict[str, JobView] = field(default_factory=dict[str, JobView])

    def apply(self, response: jobs_pb2.WatchJobsResponse) -> JobView | None:
        """Take in a message; the job it changed, or None for a checkpoint."""
        match response.WhichOneof("message"):
            case "snapshot":
                job_id = response.snapshot.job_id
            case "event":
                job_id = response.event.job_id
            case _:
                for view in self.by_id.values():
                    view.interrupted = False
                return None
        view = self.by_id.setdefault(job_id, JobView(jobs_pb2.Job(job_id=job_id)))
        view.apply(response)
        return view

    def interrupt(self) -> None:
        """The connection broke."""
        for view in self.by_id.values():
            view.interrupted = True


class Display(Protocol):
    """Shows jobs on their way."""

    def update(self, view: JobView) -> None:
        """A job has changed."""
        ...


class LineDisplay:
    """One line a job for each state, stage and tenth of the way, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._written: dict[str, tuple[object, ...]] = {}

    def update(self, view: JobView) -> None:
        """Write a line if there is something worth one."""
        job = view.job
        mark = (
            job.state,
            job.attempt,
            job.retry_count,
            job.progress.stage,
            int(job.progress.percent // 10),
            job.queue_position,
            view.interrupted,
            view.cancelling,
            job.waiting.reason,
        )
        if self._written.get(job.job_id) == mark:
            return
        self._written[job.job_id] = mark
        print(f"{job.job_id} {view.describe()}", file=self._console.file, flush=True)


class LiveDisplay:
    """A drawing that changes in place: one job large and with its preview, several as rows."""

    def __init__(self, console: Console, views: JobViews) -> None:
        self._console = console
        self._views = views

    def update(self, view: JobView) -> None:
        """Drawn several times a second anyway."""

    def __rich__(self) -> Group:
        views = list(self._views.by_id.values())
        if len(views) == 1:
            return self._large(views[0])
        # What still moves comes first: a screen shows only so much.
        views.sort(key=lambda view: view.ended)
        rows = Table.grid(padding=(0, 2))
        for view in views[:JOBS_DRAWN_MAX]:
            style = _STATE_STYLE.get(view.job.state, "")
            rows.add_row(
                Text(view.job.job_id, style="dim"),
                ProgressBar(total=100, completed=_percent(view), width=20, complete_style=style or "cyan"),
                Text(view.describe(), style=style),
                Text(_shortened(prompt_of(view.job), 30)),
            )
        if len(views) > JOBS_DRAWN_MAX:
            rows.add_row(Text(f"and {len(views) - JOBS_DRAWN_MAX} more", style="dim"))
        return Group(rows)

    def _large(self, view: JobView) -> Group:
        job = view.job
        style = _STATE_STYLE.get(job.state, "")
        price = "" if view.ended else f"  at most {credits_text(job.estimated_cost_millicredits)}"
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=100, completed=_percent(view), width=BAR_COLUMNS, complete_style=style or "cyan", finished_style=style),
            Text.assemble((view.describe(), style), (price, "dim")),
        )
        lines: list[Text | Table | HalfBlocks] = [
            Text.assemble((_shortened(prompt_of(job), PROMPT_COLUMNS), "bold"), ("  " + job.job_id, "dim")),
            bar,
        ]
        # An ended job leaves no preview behind: the picture itself follows.
        if not view.ended and view.preview and self._console.color_system == "truecolor" and (picture := decode_preview(view.preview)):
            rows = max(4, min(PREVIEW_COLUMNS // 2, self._console.height - len(lines) - 2))
            lines.append(HalfBlocks(picture, columns=PREVIEW_COLUMNS, rows=rows))
        return Group(*lines)


def _percent(view: JobView) -> float:
    return 100.0 if view.job.state == jobs_pb2.STATE_COMPLETED else view.job.progress.percent


def _shortened(text: str, columns: int) -> str:
    return text if len(text) <= columns else text[: columns - 1] + "…"


@contextmanager
def displaying(views: JobViews, console: Console) -> Generator[Display]:
    """Show `views` on `console` while the block runs: drawn on a terminal, written elsewhere."""
    if not console.is_terminal or console.is_dumb_terminal:
        yield LineDisplay(console)
        return
    display = LiveDisplay(console, views)
    with Live(display, console=console, refresh_per_second=8, redirect_stdout=False, redirect_stderr=False):
        yield display


# Pictures in the terminal


class HalfBlocks:
    """A picture as rows of upper half blocks: foreground and background colour make two pixels a character."""

    def __init__(self, picture: Image.Image, *, columns: int, rows: int) -> None:
        scale = min(columns / picture.width, 2 * rows / picture.height)
        width = max(1, round(picture.width * scale))
        height = max(2, round(picture.height * scale / 2) * 2)
        self._pixels = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the rows."""
        width, height = self._pixels.size
        data = self._pixels.tobytes()

        def color(x: int, y: int) -> str:
            offset = (y * width + x) * 3
            return "#" + data[offset : offset + 3].hex()

        for y in range(0, height, 2):
            for x in range(width):
                yield Segment("▀", Style(color=color(x, y), bgcolor=color(x, y + 1)))
            yield Segment.line()


def decode_preview(jpeg: bytes) -> Image.Image | None:
    """The picture of a preview; None when it is not a JPEG of reasonable size: a preview is never worth an error."""
    try:
        picture = Image.open(io.BytesIO(jpeg), formats=["JPEG"])
        if picture.width * picture.height > PREVIEW_PIXELS_MAX:
            return None
        picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    return picture


def show_picture(path: Path) -> None:
    """Draw a saved picture on stderr, where that is a terminal that can."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal or console.color_system != "truecolor":
        return
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height <= PICTURE_PIXELS_MAX:
                rows = max(4, min(PREVIEW_COLUMNS // 2, console.height - 4))
                console.print(HalfBlocks(picture, columns=PREVIEW_COLUMNS, rows=rows))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return  # it is saved and verified; a terminal that does not show it is no failure


def note(text: str) -> None:
    """One line of news on stderr, beside the results."""
    print(printable(text), file=sys.stderr, flush=True)
