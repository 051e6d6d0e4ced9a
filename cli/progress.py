"""Jobs on their way: what a watch has told of them, drawn on a terminal and written line by line elsewhere."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cli.amounts import credits_text, seconds_text
from cli.client import TERMINAL
from cli.failures import printable
from cli.output import prompt_of, reason_text, stage_word, state_word, waiting_text
from cli.pictures import PREVIEW_COLUMNS, HalfBlocks, decode_preview
from genmesh.jobs.v1 import jobs_pb2

PROMPT_COLUMNS = 60
BAR_COLUMNS = 40
JOBS_DRAWN_MAX = 20

_STATE_STYLE = {
    jobs_pb2.STATE_PENDING: "yellow",
    jobs_pb2.STATE_PROCESSING: "cyan",
    jobs_pb2.STATE_COMPLETED: "green",
    jobs_pb2.STATE_FAILED: "red",
    jobs_pb2.STATE_CANCELLED: "magenta",
}


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
            parts = [stage_word(job.progress.stage) if job.progress.stage else "processing"]
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
