"""What the command line shows, and what it makes of what people type. No server."""

import io
from collections.abc import Callable
from functools import partial

import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from cli.amounts import credits_text, money_text, seconds_text, time_text, utc_text
from cli.connection import EdgeAddress
from cli.download import slug, target_paths
from cli.failures import CommandError, ExitCode, printable
from cli.inputs import parse_bound, parse_credits, parse_size, parse_time
from cli.output import (
    reason_text,
    write_table,
)
from cli.pictures import PREVIEW_COLUMNS, HalfBlocks, decode_preview
from cli.progress import JobView, JobViews, LineDisplay, LiveDisplay
from genmesh.jobs.v1 import jobs_pb2

JOB_ID = "01890a5d-ac96-774b-bcce-b302099a8057"


def make_job(**fields: object) -> jobs_pb2.Job:
    job = jobs_pb2.Job(job_id=JOB_ID, state=jobs_pb2.STATE_PENDING, estimated_cost_millicredits=20)
    job.spec.image.prompt = "a tiger face"
    job.MergeFrom(jobs_pb2.Job(**fields))  # pyright: ignore[reportArgumentType]
    return job


def event(sequence: int, **payload: object) -> jobs_pb2.WatchJobsResponse:
    return jobs_pb2.WatchJobsResponse(event=jobs_pb2.JobEvent(job_id=JOB_ID, sequence=sequence, attempt=1, **payload))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("text", "size"), [("64x48", (64, 48)), ("64", (64, 64)), ("64X64", (64, 64)), (" 8x4096 ", (8, 4096))])
def test_size_is_parsed(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "0x64", "64x0", "-64x64", "64x64x64", "4097x64", "64 x 64", "sixty", "1e3", "9" * 40])
def test_what_is_no_size_is_bad_usage(text: str) -> None:
    with pytest.raises(CommandError) as raised:
        parse_size(text)
    assert raised.value.code == ExitCode.USAGE


@given(st.integers(min_value=1, max_value=10**15))
def test_credits_read_back_what_they_show(millicredits: int) -> None:
    assert parse_credits(credits_text(millicredits).split()[0]) == millicredits


@pytest.mark.parametrize(
    "text", ["0", "-1", "0.0001", "NaN", "Infinity", "ten", "", "1,5", "1e99999999", "1e999999999999", "9223372036854775.808", "9" * 5000]
)
def test_what_is_no_amount_is_bad_usage(text: str) -> None:
    with pytest.raises(CommandError) as raised:
        parse_credits(text)
    assert raised.value.code == ExitCode.USAGE


def test_bounds_may_be_zero_or_none() -> None:
    assert [parse_bound(text) for text in ("0", "2.5", "none", "NONE")] == [0, 2500, None, None]
    for text in ("-1", "", "nothing"):
        with pytest.raises(CommandError):
            parse_bound(text)


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2026-07-01", "2026-07-01T00:00:00.000000Z"),
        ("2026-07-01T08:30:00+02:00", "2026-07-01T06:30:00.000000Z"),
        (" 2026-07-01t08:30:00.123456789z ", "2026-07-01T08:30:00.123456Z"),
        ("2026-07-01 23:30:00-01:00", "2026-07-02T00:30:00.000000Z"),
        ("0001-01-02", "0001-01-02T00:00:00.000000Z"),
    ],
)
def test_times_are_read(text: str, utc: str) -> None:
    assert utc_text(parse_time(text)) == utc


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "now",
            "2026-7-1",
            "20260701",
            "2026-W01-1",
            "2026-13-01",
            "2026-02-29",
            "2026-07-01T08:30",
            "2026-07-01T08:30:00",
            "1790000000",
        ),
        *("2026-07-01T24:00:01Z", "2026-07-01T08:30:00+25:00", "0001-01-01T00:00:00+02:00", "٢٠٢٦-07-01", "2026-07-01T08:30:00Z extra"),
    ],
)
def test_what_is_no_time_is_bad_usage(text: str) -> None:
    with pytest.raises(CommandError) as raised:
        parse_time(text)
    assert raised.value.code == ExitCode.USAGE


def test_money_has_the_digits_of_its_currency() -> None:
    assert [money_text(amount, currency) for amount, currency in ((4999, "USD"), (5, "EUR"), (0, "USD"), (500, "JPY"), (1234, "KWD"))] == [
        *("49.99 USD", "0.05 EUR", "0.00 USD", "500 JPY", "1.234 KWD"),
    ]


def test_credits_are_exact_and_plain() -> None:
    assert [credits_text(amount) for amount in (0, 1, 20, 1000, 1500, 10_000, -20)] == [
        "0 credits",
        "0.001 credits",
        "0.02 credits",
        "1 credit",
        "1.5 credits",
        "10 credits",
        "-0.02 credits",
    ]


@pytest.mark.parametrize(
    ("url", "target", "tls"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1:8080", False),
        ("https://genmesh.example/", "genmesh.example:443", True),
        ("http://[::1]:9", "[::1]:9", False),
    ],
)
def test_edge_addresses(url: str, target: str, tls: bool) -> None:
    address = EdgeAddress.parse(url)
    assert (address.target, address.tls) == (target, tls)
    assert EdgeAddress.parse(address.url) == address


@pytest.mark.parametrize("url", ["127.0.0.1:8080", "localhost", "ftp://x", "http://", "http://x:99999", "http://x:0", "http://x/path", ""])
def test_what_is_no_edge_address_is_bad_usage(url: str) -> None:
    with pytest.raises(CommandError) as raised:
        EdgeAddress.parse(url)
    assert raised.value.code == ExitCode.USAGE


@given(st.text())
def test_printable_keeps_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in shown)
    shown.encode()  # no lone surrogates


def test_slug_and_target_names() -> None:
    job = make_job()
    assert slug("A tiger's face!") == "a-tiger-s-face"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("🐯 / \\") == "image"
    job.assets.add(kind=jobs_pb2.Asset.KIND_IMAGE, content_type="image/webp")
    job.assets.add(kind=jobs_pb2.Asset.KIND_THUMBNAIL, content_type="image/webp")
    assert [str(path) for path in target_paths(job, None)] == ["a-tiger-face-099a8057.webp"]
    job.assets.add(kind=jobs_pb2.Asset.KIND_IMAGE, content_type="image/png")
    assert [str(path) for path in target_paths(job, None)] == ["a-tiger-face-099a8057-1.webp", "a-tiger-face-099a8057-2.png"]


def test_views_follow_a_job_from_snapshot_to_end() -> None:
    views = JobViews()
    view = views.apply(jobs_pb2.WatchJobsResponse(snapshot=make_job(queue_position=3)))
    assert view is not None
    assert view.describe() == "pending, 3 in the queue"
    views.apply(event(1, queue_update=jobs_pb2.QueueUpdate(queue_position=1, eta_seconds=75.2)))
    assert view.describe() == "pending, next in the queue, 1 min 15 s left"
    views.apply(event(2, state_change=jobs_pb2.StateChange(state=jobs_pb2.STATE_PROCESSING, job=make_job(state=jobs_pb2.STATE_PROCESSING))))
    progress = jobs_pb2.Progress(percent=45, step=9, step_count=20, stage=jobs_pb2.STAGE_DENOISING, eta_seconds=2)
    views.apply(event(3, progress=progress))
    assert view.describe() == "denoising, step 9/20, 45 %, 2 s left"
    views.interrupt()
    assert view.describe().endswith("reconnecting")
    views.apply(jobs_pb2.WatchJobsResponse(checkpoint=jobs_pb2.Checkpoint()))
    assert not view.interrupted
    done = make_job(state=jobs_pb2.STATE_COMPLETED, cost_millicredits=20)
    views.apply(event(4, state_change=jobs_pb2.StateChange(state=jobs_pb2.STATE_COMPLETED, job=done)))
    assert view.ended
    assert view.describe() == "completed, charged 0.02 credits"


def test_a_second_attempt_and_a_missing_worker_are_told() -> None:
    waiting = jobs_pb2.Waiting(reason=jobs_pb2.Waiting.REASON_NO_WORKER, message="no worker\x1b[2J offers it")
    assert JobView(make_job(waiting=waiting)).describe() == "pending, no worker\ufffd[2J offers it"
    running = make_job(state=jobs_pb2.STATE_PROCESSING, attempt=2)
    assert "attempt 2" in JobView(running).describe()


@pytest.mark.parametrize(
    ("waiting", "says"),
    [
        (jobs_pb2.Waiting(reason=jobs_pb2.Waiting.REASON_IN_QUEUE, message="2 jobs are before it"), "pending, 3 in the queue"),
        (
            jobs_pb2.Waiting(reason=jobs_pb2.Waiting.REASON_OWNER_LIMIT, owner_running=1, owner_limit=1),
            "pending, 3 in the queue, waits for your running job to end",
        ),
        (
            jobs_pb2.Waiting(reason=jobs_pb2.Waiting.REASON_OWNER_LIMIT, owner_running=2, owner_limit=2),
            "pending, 3 in the queue, waits for one of your 2 running jobs to end",
        ),
        (jobs_pb2.Waiting(reason=99), "pending, 3 in the queue"),  # pyright: ignore[reportArgumentType]  # of a newer release
    ],
)
def test_a_waiting_job_says_what_it_waits_for(waiting: jobs_pb2.Waiting, says: str) -> None:
    assert JobView(make_job(queue_position=3, waiting=waiting)).describe() == says


def test_a_job_between_attempts_says_when_the_next_one_is_due() -> None:
    waiting = jobs_pb2.Waiting(reason=jobs_pb2.Waiting.REASON_RETRY)
    waiting.retry_time.FromSeconds(1_800_000_000)
    job = make_job(attempt=1, waiting=waiting)
    assert JobView(job).describe() == f"pending, attempt 1 failed, the next one begins after {time_text(waiting.retry_time)}"


def test_a_model_that_is_being_loaded_is_told_until_the_first_progress() -> None:
    waiting = jobs_pb2.Waiting(reason=jobs_pb2.Waiting.REASON_MODEL_LOADING, model="sd-tiny")
    view = JobView(make_job(state=jobs_pb2.STATE_PROCESSING, attempt=1, waiting=waiting))
    assert view.describe() == "processing, 0 %, sd-tiny is being loaded"
    view.apply(event(1, progress=jobs_pb2.Progress(percent=5, stage=jobs_pb2.STAGE_DENOISING)))
    assert view.describe() == "denoising, 5 %"


def test_a_retried_job_starts_over() -> None:
    written = io.StringIO()
    display = LineDisplay(Console(file=written))
    view = JobView(make_job(state=jobs_pb2.STATE_FAILED, attempt=3), preview=jpeg_of((1, 2, 3)))
    pending = make_job(retry_count=1)
    view.apply(event(1, state_change=jobs_pb2.StateChange(state=jobs_pb2.STATE_PENDING, job=pending)))
    display.update(view)
    assert not view.ended
    assert view.preview == b""
    view.apply(event(2, state_change=jobs_pb2.StateChange(state=jobs_pb2.STATE_PENDING, job=make_job(retry_count=2))))
    display.update(view)
    done = make_job(state=jobs_pb2.STATE_COMPLETED, retry_count=2, cost_millicredits=20)
    view.apply(event(3, state_change=jobs_pb2.StateChange(state=jobs_pb2.STATE_COMPLETED, job=done)))
    display.update(view)
    assert written.getvalue().splitlines() == [
        f"{JOB_ID} pending, retry 1",
        f"{JOB_ID} pending, retry 2",
        f"{JOB_ID} completed, charged 0.02 credits",
    ]


def test_a_failed_job_says_why() -> None:
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.ErrorInfo(reason="ERROR_REASON_WORKER_LOST", domain="genmesh"))
    job = make_job(state=jobs_pb2.STATE_FAILED, error=status_pb2.Status(code=10, message="no attempt is left", details=[detail]))
    assert reason_text(job) == "no attempt is left (worker lost)"


def test_lines_are_written_once_a_tenth() -> None:
    written = io.StringIO()
    display = LineDisplay(Console(file=written))
    view = JobView(make_job(state=jobs_pb2.STATE_PROCESSING))
    for percent in range(101):
        view.job.progress.percent = percent
        display.update(view)
    assert [line.split()[-2] for line in written.getvalue().splitlines()] == [str(tenth) for tenth in range(0, 101, 10)]


def jpeg_of(color: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "JPEG", quality=95)
    return file.getvalue()


def terminal(color_system: str, height: int = 40) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=color_system, width=100, height=height)  # pyright: ignore[reportArgumentType]


def rendered(console: Console, thing: object) -> str:
    console.print(thing)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_preview_is_drawn_in_true_colour_only() -> None:
    views = JobViews({JOB_ID: JobView(make_job(state=jobs_pb2.STATE_PROCESSING), preview=jpeg_of((250, 130, 10)))})
    drawn = rendered(console := terminal("truecolor"), LiveDisplay(console, views))
    assert drawn.count("▀") == PREVIEW_COLUMNS * PREVIEW_COLUMNS // 2
    assert "38;2;2" in drawn
    console = terminal("256")
    assert "▀" not in rendered(console, LiveDisplay(console, views))
    broken = JobViews({JOB_ID: JobView(make_job(), preview=b"no jpeg")})
    console = terminal("truecolor")
    assert "▀" not in rendered(console, LiveDisplay(console, broken))


def test_half_blocks_keep_the_shape_and_the_colours() -> None:
    picture = Image.new("RGB", (2, 2))
    picture.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)])
    drawn = rendered(terminal("truecolor"), HalfBlocks(picture, columns=2, rows=4))
    assert "\x1b[38;2;255;0;0;48;2;0;0;255m▀" in drawn
    assert "\x1b[38;2;0;255;0;48;2;255;255;255m▀" in drawn
    wide = rendered(terminal("truecolor"), HalfBlocks(Image.new("RGB", (200, 50)), columns=32, rows=16))
    assert wide.count("▀") == 32 * 4


def test_previews_that_are_no_small_jpeg_are_dropped() -> None:
    assert decode_preview(b"") is None
    assert decode_preview(jpeg_of((1, 2, 3))[:100]) is None
    bomb = bytearray(jpeg_of((1, 2, 3)))
    at = bomb.index(b"\xff\xc0") + 5
    bomb[at : at + 4] = b"\xff\xff\xff\xff"  # 65535 x 65535 by its header
    assert decode_preview(bytes(bomb)) is None


def test_many_jobs_are_rows_and_markup_in_prompts_is_text() -> None:
    views = JobViews()
    for number in range(25):
        job = make_job()
        job.job_id = f"job-{number}"
        job.spec.image.prompt = "[bold]x[/nope]"
        views.apply(jobs_pb2.WatchJobsResponse(snapshot=job))
    drawn = rendered(console := terminal("standard"), LiveDisplay(console, views))
    assert "[bold]x[/nope]" in drawn
    assert "and 5 more" in drawn


def test_seconds() -> None:
    assert [seconds_text(seconds) for seconds in (-1, 0.4, 59.4, 60, 75.2)] == ["0 s", "0 s", "59 s", "1 min 0 s", "1 min 15 s"]
    assert [seconds_text(seconds) for seconds in (3599, 11_000, 86_400, 2_000_000)] == ["59 min 59 s", "3 h 3 min", "1 d 0 h", "23 d 3 h"]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[int], list[str]]:
    """Shows a table on a terminal so many columns wide."""

    def show(width: int) -> list[str]:
        monkeypatch.setattr("cli.output.Console", partial(Console, force_terminal=True, color_system=None, width=width))
        write_table(["id", "name", "details"], [[JOB_ID, "ci", "a=1, " * 20], [JOB_ID, "\x1b[2J", ""]])
        return [line.rstrip() for line in capsys.readouterr().out.splitlines()]

    return show


def test_a_table_folds_its_last_column_alone(screen: Callable[[int], list[str]]) -> None:
    lines = screen(80)
    assert lines[0].split() == ["id", "name", "details"]
    column = lines[0].index("details")
    assert [line[:column].split() for line in lines[1:]] == [[JOB_ID, "ci"], *[[]] * (len(lines) - 3), [JOB_ID, "\ufffd[2J"]]
    assert all(line.startswith("a=1", column) or line[column - 1] == " " for line in lines[2:-1])


def test_what_is_too_wide_for_a_table_is_shown_row_by_row(screen: Callable[[int], list[str]]) -> None:
    lines = screen(60)
    assert lines[:2] == [f"id       {JOB_ID}", "name     ci"]
    assert lines[3:] == ["", f"id    {JOB_ID}", "name  \ufffd[2J"]
