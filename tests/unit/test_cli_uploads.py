"""Uploads from the command line: announced, put to a store over real HTTP, checked."""

import json
import threading
from collections.abc import Callable, Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from cli.failures import ExitCode
from cli.upload import UploadError, put
from genmesh.jobs.v1 import jobs_pb2
from servicekit.errors import precondition
from tests.unit.fake_edge import UPLOAD_ID, USER_ID, FakeEdge, Reason

CONTENT = bytes(range(256)) * 2000


class Store(ThreadingHTTPServer):
    """Takes what is put to it; answers with `statuses` in turn, then with 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Bucket)
        self.statuses: list[int] = []
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/bucket/key?signature=secret"


class Bucket(BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        store = self.server
        assert isinstance(store, Store)
        store.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        store.headers.append({name.lower(): value for name, value in self.headers.items()})
        self.send_response(store.statuses.pop(0) if store.statuses else 200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def store(fake: FakeEdge) -> Generator[Store]:
    with Store() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        fake.ticket.url = server.url
        fake.ticket.headers.update({"Content-Type": "image/png", "x-amz-meta-for": "test"})
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "Cat.PNG"
    path.write_bytes(CONTENT)
    return path


def test_a_file_is_announced_put_and_checked(signed_in: Callable[..., Result], fake: FakeEdge, store: Store, picture: Path) -> None:
    fake.upload.content_type, fake.upload.width, fake.upload.height, fake.upload.size_bytes = "image/png", 64, 48, len(CONTENT)
    result = signed_in("uploads", "put", str(picture))
    assert result.exit_code == 0, result.output
    assert (result.stdout, result.stderr) == (f"{UPLOAD_ID}\n", f"image/png, 64x48 pixels, {len(CONTENT)} bytes\n")
    assert [(asked.content_type, asked.size_bytes) for asked in fake.uploads_asked] == [("image/png", len(CONTENT))]
    assert store.bodies == [CONTENT]
    [headers] = store.headers
    assert (headers["content-type"], headers["x-amz-meta-for"], headers["content-length"]) == ("image/png", "test", str(len(CONTENT)))
    assert "transfer-encoding" not in headers
    as_json = json.loads(signed_in("uploads", "put", str(picture), "--json").stdout)
    assert as_json["uploadId"] == UPLOAD_ID


def test_the_type_can_be_named(signed_in: Callable[..., Result], fake: FakeEdge, store: Store, tmp_path: Path) -> None:
    (tmp_path / "sound").write_bytes(b"RIFF")
    fake.upload.content_type, fake.upload.duration_ms, fake.upload.size_bytes = "audio/wav", 1500, 4
    result = signed_in("uploads", "put", "sound", "--type", "audio/wav")
    assert (result.exit_code, result.stderr) == (0, "audio/wav, 1.5 s, 4 bytes\n")
    assert fake.uploads_asked[0].content_type == "audio/wav"
    assert len(store.bodies) == 1


def test_a_put_that_broke_is_done_again_from_the_start(signed_in: Callable[..., Result], store: Store, picture: Path) -> None:
    store.statuses = [503, 500]
    assert signed_in("uploads", "put", str(picture)).exit_code == 0
    assert store.bodies == [CONTENT] * 3


@pytest.mark.parametrize(("statuses", "tries"), [([503] * 9, 3), ([403], 1)])
def test_a_put_that_stays_refused_is_told(
    signed_in: Callable[..., Result], fake: FakeEdge, store: Store, picture: Path, statuses: list[int], tries: int
) -> None:
    store.statuses = statuses
    result = signed_in("uploads", "put", str(picture))
    assert result.exit_code == ExitCode.UNAVAILABLE
    assert (len(store.bodies), len(fake.uploads_asked)) == (tries, 1)
    assert "secret" not in result.output


def test_a_file_that_fails_the_check(signed_in: Callable[..., Result], fake: FakeEdge, store: Store, picture: Path) -> None:
    fake.refusals.append(precondition(Reason.ERROR_REASON_UPLOAD_INVALID, "it is no PNG", {"upload_id": UPLOAD_ID}))
    result = signed_in("uploads", "put", str(picture))
    assert result.exit_code == ExitCode.USAGE
    assert "it is no PNG" in result.stderr
    assert UPLOAD_ID in result.stderr
    assert store.bodies


@pytest.mark.parametrize("name", ["none.png", "empty.png", "directory.png", "/dev/null", "cat.txt"])
def test_what_cannot_be_uploaded_is_not_announced(
    signed_in: Callable[..., Result], fake: FakeEdge, store: Store, tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "cat.txt").write_text("meow")
    (tmp_path / "directory.png").mkdir()
    assert signed_in("uploads", "put", name, *(["--type", "image/png"] if name == "/dev/null" else [])).exit_code == ExitCode.USAGE
    assert not fake.uploads_asked
    assert not store.bodies


def test_no_more_than_was_announced_is_sent_and_no_less(store: Store, picture: Path) -> None:
    put(picture, store.url, {}, 100)
    assert store.bodies == [CONTENT[:100]]
    with pytest.raises(UploadError, match="shorter"):
        put(picture, store.url, {}, len(CONTENT) + 1)


def test_what_is_no_web_address_is_not_opened(picture: Path) -> None:
    with pytest.raises(UploadError, match="no web address"):
        put(picture, "file:///etc/passwd", {}, 1)
    with pytest.raises(UploadError, match="cannot be reached") as raised:
        put(picture, "http://127.0.0.1:1/?signature=secret", {}, 1)
    assert raised.value.repeatable
    assert "secret" not in str(raised.value)


def test_an_upload_is_shown(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.upload.CopyFrom(
        jobs_pb2.Upload(upload_id=UPLOAD_ID, state=jobs_pb2.UPLOAD_STATE_REJECTED, rejection="too many pixels", content_type="image/png")
    )
    shown = dict(line.split("  ", 1) for line in signed_in("uploads", "show", UPLOAD_ID).stdout.splitlines())
    assert (shown["state"].strip(), shown["why"].strip()) == ("rejected", "too many pixels")
    assert json.loads(signed_in("uploads", "show", UPLOAD_ID, "--json").stdout)["state"] == "UPLOAD_STATE_REJECTED"
    missing = signed_in("uploads", "show", USER_ID)
    assert (missing.exit_code, "you have no upload" in missing.stderr) == (ExitCode.NOT_FOUND, True)
    assert signed_in("uploads", "show", "x").exit_code == ExitCode.USAGE
