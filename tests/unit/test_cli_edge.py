"""The command line against a real gRPC server in this process: logins, retries, watches, downloads, exit codes."""

# RPC methods are named by the proto

import hashlib
import json
import os
import signal
import stat
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import Result

from cli.client import Edge
from cli.failures import CommandError, ExitCode
from cli.session import Session, SessionFile, SessionMemory
from genmesh.jobs.v1 import jobs_pb2
from servicekit.errors import MeshError, invalid, not_found, permission_denied, precondition, unauthenticated, unavailable
from tests.unit.fake_edge import EMAIL, FINGERPRINT, JOB_ID, PASSWORD, USER_ID, WAIT_S, FakeEdge, Reason, event, spawned

PICTURE = b"\x89PNG not really, but bytes are bytes" * 1000


def progress(sequence: int, step: int) -> jobs_pb2.WatchJobsResponse:
    return event(sequence, progress=jobs_pb2.Progress(percent=step * 5, step=step, step_count=20, stage=jobs_pb2.STAGE_DENOISING))


def ended(sequence: int, state: "jobs_pb2.State.ValueType", *assets: jobs_pb2.Asset, cost: int = 20) -> jobs_pb2.WatchJobsResponse:
    job = jobs_pb2.Job(job_id=JOB_ID, state=state, assets=assets, cost_millicredits=cost)
    job.spec.image.prompt = "a tiger face"
    return event(sequence, state_change=jobs_pb2.StateChange(state=state, job=job))


class Store(BaseHTTPRequestHandler):
    """Serves PICTURE at /whole, half of it at /half."""

    def do_GET(self) -> None:
        body = PICTURE if self.path == "/whole" else PICTURE[: len(PICTURE) // 2]
        self.send_response(200 if self.path in {"/whole", "/half"} else 403)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def store_url() -> Generator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Store)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def asset(url: str, content: bytes = PICTURE) -> jobs_pb2.Asset:
    return jobs_pb2.Asset(
        kind=jobs_pb2.Asset.KIND_IMAGE,
        url=url,
        content_type="image/png",
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


# Login


def test_login_is_stored_for_its_owner_only_and_used(signed_in: Callable[..., Result], session_path: Path) -> None:
    assert stat.S_IMODE(session_path.stat().st_mode) == 0o600
    assert PASSWORD not in session_path.read_text()
    assert json.loads(signed_in("whoami", "--json").stdout)["email"] == EMAIL


def test_wrong_password_stores_nothing(genmesh: Callable[..., Result], session_path: Path) -> None:
    result = genmesh("login", "--email", EMAIL, "--password-stdin", stdin="wrong\n")
    assert result.exit_code == ExitCode.DENIED
    assert "genmesh register" in result.stderr
    assert not session_path.exists()


def test_logout_ends_the_session(signed_in: Callable[..., Result], fake: FakeEdge, session_path: Path) -> None:
    assert signed_in("logout").exit_code == 0
    assert fake.refresh_token == ""
    assert not session_path.exists()
    result = signed_in("whoami")
    assert (result.exit_code, "genmesh login" in result.stderr) == (ExitCode.DENIED, True)


def test_environment_signs_in_without_storing(genmesh: Callable[..., Result], session_path: Path) -> None:
    result = genmesh("whoami", "--json", GENMESH_EMAIL=EMAIL, GENMESH_PASSWORD=PASSWORD)
    assert result.exit_code == 0, result.output
    assert not session_path.exists()


def test_tokens_never_go_to_another_edge(signed_in: Callable[..., Result], session_path: Path) -> None:
    stored = SessionFile(session_path)
    session = stored.load()
    assert session is not None
    elsewhere = Session("http://127.0.0.1:1", session.user_id, session.email, "secret", "secret", session.expire_time)
    stored.save(elsewhere)
    result = signed_in("whoami")
    assert result.exit_code == ExitCode.DENIED
    assert "signed in at http://127.0.0.1:1" in result.stderr
    assert stored.load() == elsewhere


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"edge": 1}', "\x00"])
def test_a_damaged_session_file_means_signed_out(genmesh: Callable[..., Result], session_path: Path, content: str) -> None:
    session_path.parent.mkdir()
    session_path.write_text(content)
    assert genmesh("whoami").exit_code == ExitCode.DENIED


def test_a_failed_save_leaves_the_login(session_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = SessionFile(session_path)
    session = Session("http://x:1", USER_ID, EMAIL, "a", "r", 1.5)
    file.save(session)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        file.save(Session("http://x:1", USER_ID, EMAIL, "b", "s", 2.5))
    assert file.load() == session
    assert [path.name for path in session_path.parent.iterdir()] == ["session.json"]


def test_commands_at_once_refresh_once(fake: FakeEdge, genmesh: Callable[..., Result], environment: dict[str, str | None]) -> None:
    fake.token_life_s = 1.0  # about to expire: every command wants to refresh
    login = genmesh("login", "--email", EMAIL, "--password-stdin", stdin=PASSWORD)
    assert login.exit_code == 0, login.output
    fake.refreshes = 0
    with ExitStack() as processes:
        running = [processes.enter_context(spawned(environment, "whoami", "--json")) for _ in range(3)]
        outputs = [process.communicate(timeout=WAIT_S) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outputs
    assert fake.refreshes <= 1  # `login` itself may have refreshed already
    assert fake.valid


def test_an_ended_session_says_so_and_is_forgotten(signed_in: Callable[..., Result], fake: FakeEdge, session_path: Path) -> None:
    fake.valid.clear()
    fake.refresh_token = "another"
    result = signed_in("whoami")
    assert result.exit_code == ExitCode.DENIED
    assert "your session has ended" in result.stderr
    assert not session_path.exists()


# Refusals and exit codes


@pytest.mark.parametrize(
    ("refusal", "code", "says"),
    [
        (invalid("spec.image.steps", "must be at most 50"), ExitCode.USAGE, "must be at most 50"),
        (precondition(Reason.ERROR_REASON_INSUFFICIENT_CREDITS, "20 needed, 0 there"), ExitCode.CREDITS, "genmesh credits"),
        (permission_denied("only administrators"), ExitCode.DENIED, "only administrators"),
        (not_found("job"), ExitCode.NOT_FOUND, "genmesh jobs list"),
        (
            MeshError(grpc.StatusCode.INTERNAL, Reason.ERROR_REASON_INTERNAL, "internal error", metadata={"error_id": "e17"}),
            ExitCode.FAILED,
            "e17",
        ),
        (
            MeshError(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED, "too many"),
            ExitCode.LIMITED,
            "try again",
        ),
        (
            MeshError(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_CEILING_REACHED, "no room"),
            ExitCode.CREDITS,
            "genmesh credits ceilings",
        ),
        (
            MeshError(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_REQUEST_TOO_LARGE, "too large"),
            ExitCode.USAGE,
            "send less",
        ),
        (
            MeshError(
                grpc.StatusCode.INVALID_ARGUMENT,
                Reason.ERROR_REASON_INVALID_ARGUMENT,
                "two fields\x1b[2J",
                violations=[("a", "is bad"), ("b", "is worse")],
            ),
            ExitCode.USAGE,
            "b: is worse",
        ),
    ],
)
def test_refusals_have_an_exit_code_and_advice(
    signed_in: Callable[..., Result], fake: FakeEdge, refusal: MeshError, code: ExitCode, says: str
) -> None:
    fake.refusals.append(refusal)
    result = signed_in("jobs", "list")
    assert result.exit_code == code
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert "\x1b" not in result.output
    assert result.stdout == ""


def test_no_edge_is_told_at_once(genmesh: Callable[..., Result]) -> None:
    result = genmesh("login", "--email", EMAIL, "--password-stdin", "--edge", "http://127.0.0.1:1", stdin=PASSWORD)
    assert result.exit_code == ExitCode.UNAVAILABLE
    assert "genmesh up" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "image", "x", "--size", "big"],
        ["generate", "image", "x", "--out", "no/such/directory/x.png"],
        ["generate", "image", "x", "--seed", str(2**70)],
        ["generate", "image", "\udc80"],
        ["generate", "image", "x", "--steps", "0"],
        ["admin", "grant", EMAIL, "minus one", "--reason", "x"],
        ["admin", "grant", "nobody", "1", "--reason", "x"],
        ["whoami", "--edge", "127.0.0.1:8080"],
        ["jobs", "list", "--state", "lost"],
        ["jobs", "delete"],
        ["admin", "dead-letters", "--reason", "bad luck"],
        ["admin", "requeue"],
        ["admin", "requeue", JOB_ID, "--fingerprint", FINGERPRINT],
        ["admin", "requeue", JOB_ID, "--max", "3"],
        ["admin", "requeue", "--fingerprint", FINGERPRINT, "--max", "1001"],
    ],
)
def test_bad_input_is_usage_and_reaches_nobody(signed_in: Callable[..., Result], fake: FakeEdge, arguments: list[str]) -> None:
    assert signed_in(*arguments).exit_code == ExitCode.USAGE
    assert not fake.created
    assert not fake.granted
    assert not fake.requeue_asked
    assert not fake.letters_asked


def test_an_unknown_job_is_not_found(signed_in: Callable[..., Result]) -> None:
    assert signed_in("jobs", "show", USER_ID).exit_code == ExitCode.NOT_FOUND


# Lists and money


@pytest.mark.parametrize("limit", [1, 200, 201, 450, 1000])
def test_lists_are_paged_up_to_the_limit(signed_in: Callable[..., Result], limit: int) -> None:
    lines = signed_in("jobs", "list", "--json", "--limit", str(limit)).stdout.splitlines()
    assert [json.loads(line)["jobId"] for line in lines] == [str(number) for number in range(min(limit, 450))]


def test_grant_finds_the_account_by_address(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    assert signed_in("admin", "grant", EMAIL.upper(), "2.5", "--reason", "trial").exit_code == 0
    assert [(grant.user_id, grant.amount_millicredits, grant.reason) for grant in fake.granted] == [(USER_ID, 2500, "trial")]
    assert signed_in("admin", "grant", "no@example.com", "1", "--reason", "x").exit_code == ExitCode.NOT_FOUND


# The whole way of a job


def test_a_picture_is_made_followed_and_saved(signed_in: Callable[..., Result], fake: FakeEdge, store_url: str, tmp_path: Path) -> None:
    done = ended(5, jobs_pb2.STATE_COMPLETED, asset(f"{store_url}/whole"))
    snapshot = jobs_pb2.WatchJobsResponse(snapshot=fake.job, resume_token="t0")
    fake.connections.append([snapshot, progress(1, 2), progress(2, 10), progress(3, 20), done])
    result = signed_in("generate", "image", "a tiger face", "--size", "64x64", "--steps", "20", "--seed", "7")
    assert result.exit_code == 0, result.output
    path = tmp_path / "a-tiger-face-099a8057.png"
    assert result.stdout.splitlines() == ["charged 0.02 credits, 0.98 credits left", f"saved {path.name}"]
    assert path.read_bytes() == PICTURE
    assert "step 10/20, 50 %" in result.stderr
    image = fake.created[0].spec.image
    assert (image.width, image.height, image.steps, image.seed) == (64, 64, 20, 7)
    assert [item.name for item in tmp_path.iterdir() if item.suffix in {".png", ".part"}] == [path.name]


def test_submitting_is_repeated_with_the_same_id(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.refusals.extend([unavailable("restarting", 0.01), unavailable("restarting", 0.01)])
    result = signed_in("generate", "image", "x", "--no-wait")
    assert (result.exit_code, result.stdout) == (0, f"{JOB_ID}\n")
    assert len(fake.created) == 3
    assert len({request.request_id for request in fake.created}) == 1


def test_json_is_one_object_a_line_and_ends_with_the_files(
    signed_in: Callable[..., Result], fake: FakeEdge, store_url: str, tmp_path: Path
) -> None:
    fake.connections.append([progress(1, 2), ended(2, jobs_pb2.STATE_COMPLETED, asset(f"{store_url}/whole"), asset(f"{store_url}/whole"))])
    result = signed_in("generate", "image", "x", "--json", "--out", str(tmp_path / "cat.webp"))
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [next(iter(line)) for line in lines] == ["event", "event", "job"]
    assert lines[-1]["files"] == [str(tmp_path / "cat-1.webp"), str(tmp_path / "cat-2.webp")]
    assert lines[-1]["availableMillicredits"] == "980"
    assert fake.created[0].spec.image.format == jobs_pb2.IMAGE_FORMAT_WEBP


def test_a_damaged_download_leaves_no_file(signed_in: Callable[..., Result], fake: FakeEdge, store_url: str, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    out.write_text("what was there")
    for damaged in (
        asset(f"{store_url}/half"),
        asset(f"{store_url}/whole", PICTURE[:-1] + b"?"),
        asset(f"{store_url}/gone"),
        asset("file:///x"),
    ):
        fake.connections.append([ended(1, jobs_pb2.STATE_COMPLETED, damaged)])
        fake.job.state = jobs_pb2.STATE_PENDING
        result = signed_in("generate", "image", "x", "--out", str(out))
        assert result.exit_code == ExitCode.UNAVAILABLE
        assert f"genmesh jobs download {JOB_ID}" in result.stderr
        assert store_url not in result.output
    assert out.read_text() == "what was there"
    assert not list(tmp_path.glob("*.part"))
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize(("state", "code"), [(jobs_pb2.STATE_FAILED, ExitCode.FAILED), (jobs_pb2.STATE_CANCELLED, ExitCode.CANCELLED)])
def test_how_a_job_ends_is_the_exit_code(
    signed_in: Callable[..., Result], fake: FakeEdge, state: "jobs_pb2.State.ValueType", code: ExitCode
) -> None:
    fake.connections.append([ended(1, state, cost=0)])
    result = signed_in("generate", "image", "x")
    assert result.exit_code == code
    assert "nothing was charged" in result.stderr
    fake.connections.append([ended(1, state, cost=0)])
    assert signed_in("watch", JOB_ID).exit_code == code


def test_ctrl_c_cancels_and_says_what_it_cost(signed_in: Callable[..., Result], fake: FakeEdge, environment: dict[str, str | None]) -> None:
    with spawned(environment, "generate", "image", "x") as process:
        assert fake.watching.wait(WAIT_S)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_S)
    assert fake.cancelled.is_set()
    assert process.returncode == ExitCode.CANCELLED, errors
    assert "the job was cancelled, charged 0.007 credits" in errors


def test_ctrl_c_while_watching_leaves_the_job_alone(
    signed_in: Callable[..., Result], fake: FakeEdge, environment: dict[str, str | None]
) -> None:
    with spawned(environment, "watch", JOB_ID) as process:
        assert fake.watching.wait(WAIT_S)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == ExitCode.INTERRUPTED, errors
    assert "the jobs go on" in errors
    assert "Traceback" not in errors
    assert not fake.cancelled.is_set()


def test_a_second_ctrl_c_leaves_a_job_that_does_not_stop(
    signed_in: Callable[..., Result], fake: FakeEdge, environment: dict[str, str | None]
) -> None:
    fake.stubborn = True
    with spawned(environment, "generate", "image", "x") as process:
        assert fake.watching.wait(WAIT_S)
        process.send_signal(signal.SIGINT)
        assert fake.cancel_asked.wait(WAIT_S)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == ExitCode.INTERRUPTED, errors
    assert f"genmesh jobs show {JOB_ID}" in errors


# Failed jobs again, ended jobs gone


def test_a_failed_job_goes_back_and_any_other_does_not(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    refused = signed_in("jobs", "retry", JOB_ID)
    assert refused.exit_code == ExitCode.FAILED
    assert "the job has not failed" in refused.stderr
    assert "genmesh jobs show" in refused.stderr
    fake.job.state = jobs_pb2.STATE_FAILED
    fake.refusals.append(unavailable("restarting", 0.01))
    result = signed_in("jobs", "retry", JOB_ID)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"in the queue again, at most 0.02 credits; follow it with `genmesh watch {JOB_ID}`\n"
    fake.job.state = jobs_pb2.STATE_FAILED
    assert json.loads(signed_in("jobs", "retry", JOB_ID, "--json").stdout)["retryCount"] == 2
    fake.refusals.append(precondition(Reason.ERROR_REASON_INSUFFICIENT_CREDITS, "20 needed, 0 there"))
    assert signed_in("jobs", "retry", JOB_ID).exit_code == ExitCode.CREDITS


def test_show_itemises_what_a_job_waits_for_and_what_it_cost(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    waiting = fake.job.waiting
    waiting.reason, waiting.queue_position, waiting.owner_running, waiting.owner_limit = jobs_pb2.Waiting.REASON_OWNER_LIMIT, 3, 2, 2
    fake.job.retry_count = 1
    shown = dict(line.split("  ", 1) for line in signed_in("jobs", "show", JOB_ID).stdout.splitlines())
    assert {
        name: shown[name].strip() for name in ("waiting reason", "waits for", "place in the queue", "your running jobs", "retried")
    } == {
        "waiting reason": "owner limit",
        "waits for": "waits for one of your 2 running jobs to end",
        "place in the queue": "3",
        "your running jobs": "2 of 2",
        "retried": "1 time",
    }
    fake.job.ClearField("waiting")
    fake.job.state, fake.job.cost_millicredits, fake.job.finish_time.seconds = jobs_pb2.STATE_CANCELLED, 5, 1
    fake.job.receipt.CopyFrom(
        jobs_pb2.Receipt(steps_done=5, steps_agreed=20, step_price_millicredits=1, captured_millicredits=5, released_millicredits=15)
    )
    shown = dict(line.split("  ", 1) for line in signed_in("jobs", "show", JOB_ID).stdout.splitlines())
    assert {name: shown[name].strip() for name in ("charged", "steps done", "price a step", "given back")} == {
        "charged": "0.005 credits",
        "steps done": "5 of 20",
        "price a step": "0.001 credits",
        "given back": "0.015 credits",
    }
    assert "waits for" not in shown


def test_deleting_asks_first(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    for answer in ("n\n", ""):  # the second: nobody is there to answer
        assert signed_in("jobs", "delete", "a", "b", stdin=answer).exit_code == 1
    assert not fake.delete_asked
    result = signed_in("jobs", "delete", "a", "b", "a", stdin="y\n")
    assert result.exit_code == 0, result.output
    assert fake.delete_asked == ["a", "b"]
    assert "Delete these 2 jobs and the media for good?" in result.stderr
    assert result.stdout.splitlines()[1:] == [  # the first line is the runner's echo of the answer
        "deleted a with 2 files, 12345 bytes",
        "deleted b with 2 files, 12345 bytes; files remain while the store is away, and are removed as soon as it is back",
    ]


def test_one_job_that_cannot_be_deleted_does_not_save_the_others(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    result = signed_in("jobs", "delete", "--yes", JOB_ID, "a", "--json")
    assert fake.delete_asked == [JOB_ID, "a"]
    assert result.exit_code == ExitCode.FAILED
    assert [json.loads(line)["jobId"] for line in result.stdout.splitlines()] == ["a"]
    assert "1 of 2 jobs were not deleted" in result.stderr
    assert f"{JOB_ID}: the job has not ended" in result.stderr
    assert "genmesh jobs cancel" in result.stderr
    alone = signed_in("jobs", "delete", "--yes", JOB_ID)
    assert alone.exit_code == ExitCode.FAILED
    assert "error: the job has not ended" in alone.stderr


# The queue and its operators


def test_the_queue_is_a_row_for_each_level(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    pool = jobs_pb2.PoolStats(pool="gpu", running_count=3)
    pool.levels.add(priority=jobs_pb2.PRIORITY_PRO)
    pool.levels.add(priority=jobs_pb2.PRIORITY_FREE, waiting_count=40, delayed_count=2, owner_count=7, oldest_wait_seconds=75)
    pool.workers.add(worker_id="w1", slot_count=2, loaded_models=["sd-tiny", "sd-big"])
    pool.workers.add(worker_id="w2", slot_count=1)
    fake.pools = [pool, jobs_pb2.PoolStats(pool="video")]
    assert [line.split("\t") for line in signed_in("admin", "queue").stdout.splitlines()] == [
        ["gpu", "pro", "0", "0", "0", "", "3", "w1 (2 slots, sd-tiny, sd-big loaded); w2 (1 slot, no model loaded)"],
        ["gpu", "free", "40", "2", "7", "1 min 15 s", "", ""],
        ["video", "", "", "", "", "", "0", "none"],
    ]
    lines = [json.loads(line) for line in signed_in("admin", "queue", "--json").stdout.splitlines()]
    assert [line["pool"] for line in lines] == ["gpu", "video"]


def test_an_empty_queue_says_so(signed_in: Callable[..., Result]) -> None:
    result = signed_in("admin", "queue")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no pool has jobs or workers\n")


def test_dead_letters_are_listed_by_cause(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    result = signed_in("admin", "dead-letters", "--fingerprint", FINGERPRINT, "--reason", "store-failed", "--limit", "201")
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[1] for row in rows] == [str(number) for number in range(201)]
    assert rows[0][2:] == [
        *(USER_ID, "sd-tiny", "store_failed", FINGERPRINT, "3", "1", "w1", "0.02 credits", "released", "the store is\ufffd[2J away"),
    ]
    assert [(asked.fingerprint, asked.reason, asked.page_token) for asked in fake.letters_asked] == [
        (FINGERPRINT, "ERROR_REASON_STORE_FAILED", ""),
        (FINGERPRINT, "ERROR_REASON_STORE_FAILED", "200"),
    ]
    assert json.loads(signed_in("admin", "dead-letters", "--json", "--limit", "1").stdout)["fingerprint"] == FINGERPRINT
    assert (fake.letters_asked[-1].fingerprint, fake.letters_asked[-1].reason) == ("", "")


def refusal_of_requeue(job_id: str) -> jobs_pb2.RequeueDeadLetterResponse.Refusal:
    error = precondition(Reason.ERROR_REASON_INSUFFICIENT_CREDITS, "20 needed, 0 there")
    return jobs_pb2.RequeueDeadLetterResponse.Refusal(job_id=job_id, error=error.to_status())


def test_requeuing_tells_what_went_back_and_what_did_not(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.requeued = jobs_pb2.RequeueDeadLetterResponse(job_ids=["a"], refusals=[refusal_of_requeue("b")])
    result = signed_in("admin", "requeue", "--fingerprint", FINGERPRINT, "--max", "7")
    assert result.exit_code == 0, result.output
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        ["a", "in the queue again", ""],
        ["b", "refused", "20 needed, 0 there (insufficient credits)"],
    ]
    (asked,) = fake.requeue_asked
    assert (asked.WhichOneof("target"), asked.fingerprint, asked.max_count) == ("fingerprint", FINGERPRINT, 7)


@pytest.mark.parametrize("json_output", [False, True])
def test_requeuing_nothing_fails_only_when_something_was_refused(
    signed_in: Callable[..., Result], fake: FakeEdge, json_output: bool
) -> None:
    arguments = ["admin", "requeue", "--fingerprint", FINGERPRINT, *(["--json"] if json_output else [])]
    result = signed_in(*arguments)
    assert (result.exit_code, "no failed job has this fingerprint" in result.stderr) == (0, True)
    fake.requeued = jobs_pb2.RequeueDeadLetterResponse(refusals=[refusal_of_requeue("b")])
    result = signed_in(*arguments)
    assert result.exit_code == ExitCode.FAILED
    assert "20 needed, 0 there" in result.stdout
    assert "no job went back" in result.stderr


def test_requeuing_one_job_is_repeated_and_many_are_not(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.requeued = jobs_pb2.RequeueDeadLetterResponse(job_ids=[JOB_ID])
    fake.refusals.append(unavailable("restarting", 0.01))
    assert signed_in("admin", "requeue", JOB_ID).exit_code == 0
    assert [asked.job_id for asked in fake.requeue_asked] == [JOB_ID, JOB_ID]
    fake.refusals.append(unavailable("restarting", 0.01))
    assert signed_in("admin", "requeue", "--fingerprint", FINGERPRINT).exit_code == ExitCode.UNAVAILABLE
    assert len(fake.requeue_asked) == 3


# Watches that break


@pytest.fixture
def edge(fake: FakeEdge) -> Generator[Edge]:
    with Edge(fake.url, store=SessionMemory(), credentials=(EMAIL, PASSWORD), sleep=lambda _: None) as client:
        yield client


def test_a_watch_resumes_where_it_broke_and_repeats_nothing(fake: FakeEdge, edge: Edge) -> None:
    fake.connections.extend(
        [
            [jobs_pb2.WatchJobsResponse(snapshot=fake.job, resume_token="t0"), progress(1, 1), unavailable("draining", 0.01)],
            [progress(1, 1), progress(2, 2)],  # ends well, but the job has not: the server drains
            [unauthenticated(Reason.ERROR_REASON_TOKEN_EXPIRED, "the access token has expired")],
            [progress(3, 3), ended(4, jobs_pb2.STATE_COMPLETED)],
        ]
    )
    interruptions: list[str] = []
    seen = list(edge.watch([JOB_ID], on_interruption=lambda: interruptions.append("x")))
    assert [response.event.sequence for response in seen] == [0, 1, 2, 3, 4]
    assert [request.resume_token for request in fake.watched] == ["", "t1", "t2", "t2"]
    assert len(interruptions) == 2
    assert fake.refreshes == 1


def test_a_watch_goes_on_with_a_job_that_is_retried_while_another_runs(fake: FakeEdge, edge: Edge) -> None:
    other = jobs_pb2.Job(job_id=USER_ID, state=jobs_pb2.STATE_PROCESSING)
    other_ended = jobs_pb2.Job(job_id=USER_ID, state=jobs_pb2.STATE_COMPLETED)
    again = event(2, state_change=jobs_pb2.StateChange(state=jobs_pb2.STATE_PENDING, job=fake.job))
    steps = [ended(1, jobs_pb2.STATE_FAILED), again, jobs_pb2.WatchJobsResponse(snapshot=other_ended), ended(3, jobs_pb2.STATE_COMPLETED)]
    fake.connections.append([jobs_pb2.WatchJobsResponse(snapshot=other), *steps])
    seen = list(edge.watch([JOB_ID, USER_ID]))
    assert seen[-1].event.sequence == 3


def test_a_watch_that_is_refused_ends(fake: FakeEdge, edge: Edge) -> None:
    fake.connections.append([not_found("job")])
    with pytest.raises(grpc.RpcError) as raised:
        list(edge.watch([JOB_ID]))
    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    assert len(fake.watched) == 1


def test_reconnecting_is_bounded(fake: FakeEdge, edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.client.RECONNECT_WINDOW_S", 5.0)
    fake.connections.extend([[unavailable("down", 2.0)] for _ in range(100)])
    now = [0.0]
    monkeypatch.setattr("cli.client.time.monotonic", lambda: now[0])
    edge._sleep = lambda seconds: now.__setitem__(0, now[0] + seconds)  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(grpc.RpcError):
        list(edge.watch([JOB_ID]))
    assert len(fake.watched) == 3


def test_an_edge_that_was_never_there_is_told_at_once() -> None:
    with Edge("http://127.0.0.1:1", store=SessionMemory(), credentials=(EMAIL, PASSWORD)) as client, pytest.raises(CommandError) as raised:
        list(client.watch())
    assert raised.value.code == ExitCode.UNAVAILABLE
