"""The `genmesh` command as people and scripts run it: a process of its own against the edge, judged by output and exit code."""

import asyncio
import hashlib
import json
import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image

from cli.stack import Stack
from tests.e2e.caller import DEADLINE_S, PASSWORD, Edge, User, image
from tests.e2e.conftest import Occupied

GENMESH = Path(sys.executable).with_name("genmesh")
OK, FAILED, USAGE, UNAVAILABLE, DENIED, NOT_FOUND, CREDITS, CANCELLED = range(8)


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def documents(self) -> list[Any]:
        """Its output, one JSON document a line."""
        return [json.loads(line) for line in self.out.splitlines()]


@dataclass(frozen=True, slots=True)
class Shell:
    """Somebody's shell: a home of their own, the edge in the environment."""

    home: Path
    edge_url: str

    async def genmesh(self, *arguments: str, stdin: str = "", **environment: str) -> Ended:
        """Run the command to its end."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GENMESH_")}
        mine = {"HOME": str(self.home), "GENMESH_SESSION_FILE": str(self.home / "session.json"), "GENMESH_EDGE_URL": self.edge_url}
        process = await asyncio.create_subprocess_exec(
            str(GENMESH), *arguments, cwd=self.home, env=clean | mine | environment,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(DEADLINE_S):
            out, err = await process.communicate(stdin.encode())
        assert "Traceback" not in err.decode()
        assert process.returncode is not None
        return Ended(process.returncode, out.decode(), err.decode())


@pytest_asyncio.fixture(scope="module")
async def shell(tmp_path_factory: pytest.TempPathFactory, edge: Edge, stack: Stack) -> Shell:
    """Somebody who has just registered, and was given 100 credits by the administrator."""
    mine = Shell(tmp_path_factory.mktemp("home"), stack.edge_url)
    email = f"{uuid.uuid4().hex}@example.com"
    registered = await mine.genmesh("register", "--email", email, "--password-stdin", "--json", stdin=PASSWORD + "\n")
    assert registered.code == OK, registered.err
    assert registered.documents[0]["email"] == email
    theirs = Shell(tmp_path_factory.mktemp("admin"), stack.edge_url)
    as_admin = {"GENMESH_EMAIL": stack.admin_email, "GENMESH_PASSWORD": stack.admin_password}
    granted = await theirs.genmesh("admin", "grant", email, "100", "--reason", "for a test", "--json", **as_admin)
    assert granted.code == OK, granted.err
    assert granted.documents == [{"availableMillicredits": "100000"}]
    assert not (theirs.home / "session.json").exists(), "credentials from the environment are not kept"
    return mine


async def test_a_picture_for_people(shell: Shell) -> None:
    made = await shell.genmesh("generate", "image", "a tiger face", "--steps", "4", "--seed", "7", "--size", "64x64", "--out", "tiger.png")
    assert made.code == OK, made.err
    assert made.out.splitlines()[-1] == "saved tiger.png"
    assert "charged 0.2 credits" in made.out
    assert "completed" in made.err
    with Image.open(shell.home / "tiger.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (64, 64))


async def test_a_picture_for_scripts(shell: Shell) -> None:
    made = await shell.genmesh("generate", "image", "a tiger face", "--steps", "4", "--seed", "7", "--out", "same.png", "--json")
    assert made.code == OK, made.err
    *messages, result = made.documents
    assert {"snapshot", "event", "checkpoint"} >= {key for message in messages for key in message} - {"resumeToken"}
    assert messages
    assert result["job"]["state"] == "STATE_COMPLETED"
    assert result["files"] == ["same.png"]
    [asset] = [asset for asset in result["job"]["assets"] if asset["kind"] == "KIND_IMAGE"]
    assert hashlib.sha256((shell.home / "same.png").read_bytes()).hexdigest() == asset["sha256"]

    listed = (await shell.genmesh("jobs", "list", "--json", "--limit", "1")).documents
    assert [job["jobId"] for job in listed] == [result["job"]["jobId"]]
    shown = await shell.genmesh("jobs", "show", result["job"]["jobId"])
    assert shown.code == OK
    assert "completed" in shown.out
    assert "a tiger face" in shown.out
    assert (await shell.genmesh("jobs", "cancel", result["job"]["jobId"])).code == FAILED

    credits = (await shell.genmesh("credits", "--json")).documents
    entries = (await shell.genmesh("credits", "--entries", "--json")).documents
    available = sum(int(entry["amountMillicredits"]) for entry in entries if entry["account"] == "ACCOUNT_AVAILABLE")
    assert int(credits[0]["availableMillicredits"]) == available == int(result["availableMillicredits"])


async def test_a_job_that_waits_is_cancelled(shell: Shell, occupied: Occupied) -> None:
    async with occupied():
        submitted = await shell.genmesh("generate", "image", "never drawn", "--no-wait")
        assert submitted.code == OK, submitted.err
        job_id = submitted.out.strip()
        listed = await shell.genmesh("jobs", "list", "--state", "pending")
        assert job_id in listed.out
        cancelled = await shell.genmesh("jobs", "cancel", job_id)
        assert (cancelled.code, cancelled.out.strip()) == (OK, "cancelled, charged 0 credits")
    assert (await shell.genmesh("watch", job_id)).code == CANCELLED


async def test_login_and_logout(shell: Shell, tmp_path: Path) -> None:
    email = json.loads((shell.home / "session.json").read_text())["email"]
    other = Shell(tmp_path, shell.edge_url)
    refused = await other.genmesh("login", "--email", email, "--password-stdin", stdin="wrong password\n")
    assert refused.code == DENIED
    assert (await other.genmesh("login", "--email", email, "--password-stdin", stdin=PASSWORD + "\n")).code == OK
    assert (tmp_path / "session.json").stat().st_mode & 0o777 == 0o600
    assert (await other.genmesh("whoami", "--json")).documents[0]["email"] == email
    assert (await other.genmesh("logout")).code == OK
    after = await other.genmesh("whoami")
    assert after.code == DENIED
    assert "genmesh login" in after.err


BAD: dict[str, tuple[int, tuple[str, ...]]] = {
    "no command of that name": (USAGE, ("nonsense",)),
    "zero steps": (USAGE, ("generate", "image", "x", "--steps", "0")),
    "too many steps": (USAGE, ("generate", "image", "x", "--steps", "101", "--no-wait")),
    "blank prompt": (USAGE, ("generate", "image", " ", "--no-wait")),
    "size that is none": (USAGE, ("generate", "image", "x", "--size", "big")),
    "NaN": (USAGE, ("generate", "image", "x", "--guidance", "nan", "--no-wait")),
    "unknown model": (USAGE, ("generate", "image", "x", "--model", "no-such-model", "--no-wait")),
    "path as model": (USAGE, ("generate", "image", "x", "--model", "../../etc/passwd", "--no-wait")),
    "job id that is none": (USAGE, ("jobs", "show", "x")),
    "job that is not there": (NOT_FOUND, ("jobs", "show", str(uuid.uuid4()))),
    "job to cancel that is not there": (NOT_FOUND, ("jobs", "cancel", str(uuid.uuid4()))),
    "not an administrator": (DENIED, ("admin", "grant", str(uuid.uuid4()), "1", "--reason", "why not")),
    "amount that is none": (USAGE, ("admin", "grant", "a@example.com", "much", "--reason", "why not")),
    "more than there is": (CREDITS, ("generate", "image", "x", "--steps", "100", "--size", "128x128", "--count", "8", "--no-wait")),
}


@pytest.mark.parametrize(("code", "arguments"), BAD.values(), ids=BAD.keys())
async def test_what_goes_wrong_has_an_exit_code(shell: Shell, code: int, arguments: tuple[str, ...]) -> None:
    ended = await shell.genmesh(*arguments)
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert ended.err


async def test_jobs_of_others_are_not_found(shell: Shell, alice: User) -> None:
    theirs = await alice.submit(image(steps=1))
    for command in ("show", "cancel"):
        assert (await shell.genmesh("jobs", command, theirs.job_id)).code == NOT_FOUND
    await alice.watch_to_end(theirs.job_id)


async def test_without_a_login(tmp_path: Path, stack: Stack) -> None:
    nobody = Shell(tmp_path, stack.edge_url)
    ended = await nobody.genmesh("credits")
    assert (ended.code, ended.out) == (DENIED, "")
    assert "genmesh login" in ended.err


async def test_where_nothing_listens(tmp_path: Path) -> None:
    login = await Shell(tmp_path, "http://127.0.0.1:1").genmesh(
        "login", "--email", "a@example.com", "--password-stdin", stdin=PASSWORD + "\n"
    )
    assert login.code == UNAVAILABLE
    assert "genmesh up" in login.err
