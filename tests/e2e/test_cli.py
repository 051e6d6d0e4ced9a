"""The `genmesh` command as people and scripts run it: a process of its own against the edge, judged by output and exit code."""

import asyncio
import csv
import hashlib
import io
import json
import os
import signal
import sys
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from PIL import Image

from cli.stack import Stack
from tests.e2e.caller import DEADLINE_S, PASSWORD, User, eventually, image
from tests.e2e.conftest import Occupied

GENMESH = Path(sys.executable).with_name("genmesh")
OK, FAILED, USAGE, UNAVAILABLE, DENIED, NOT_FOUND, CREDITS, CANCELLED = range(8)
INTERRUPTED = 130


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
    account: dict[str, str] = field(default_factory=dict[str, str])
    """Who signs in by environment; empty: who has signed in here."""

    async def started(self, *arguments: str, **environment: str) -> asyncio.subprocess.Process:
        """Start the command."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GENMESH_")}
        mine = {"HOME": str(self.home), "GENMESH_SESSION_FILE": str(self.home / "session.json"), "GENMESH_EDGE_URL": self.edge_url}
        return await asyncio.create_subprocess_exec(
            str(GENMESH), *arguments, cwd=self.home, env=clean | mine | self.account | environment,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    async def genmesh(self, *arguments: str, stdin: str = "", **environment: str) -> Ended:
        """Run the command to its end."""
        process = await self.started(*arguments, **environment)
        async with asyncio.timeout(DEADLINE_S):
            out, err = await process.communicate(stdin.encode())
        assert "Traceback" not in err.decode()
        assert process.returncode is not None
        return Ended(process.returncode, out.decode(), err.decode())

    @property
    def email(self) -> str:
        """Who has signed in here."""
        return json.loads((self.home / "session.json").read_text())["email"]


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory, stack: Stack) -> Shell:
    """The administrator's shell."""
    account = {"GENMESH_EMAIL": stack.admin_email, "GENMESH_PASSWORD": stack.admin_password}
    return Shell(tmp_path_factory.mktemp("admin"), stack.edge_url, account)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory, stack: Stack, operator: Shell) -> Callable[[str], Awaitable[Shell]]:
    """Makes shells of people who have just registered, and were given so many credits by the administrator."""

    async def make(amount: str) -> Shell:
        mine = Shell(tmp_path_factory.mktemp("home"), stack.edge_url)
        email = f"{uuid.uuid4().hex}@example.com"
        registered = await mine.genmesh("register", "--email", email, "--password-stdin", "--json", stdin=PASSWORD + "\n")
        assert registered.code == OK, registered.err
        assert registered.documents[0]["email"] == email
        granted = await operator.genmesh("admin", "grant", email, amount, "--reason", "for a test", "--json")
        assert granted.code == OK, granted.err
        assert granted.documents == [{"availableMillicredits": f"{Decimal(amount) * 1000:.0f}", "reservedMillicredits": "0"}]
        assert not (operator.home / "session.json").exists(), "credentials from the environment are not kept"
        return mine

    return make


@pytest_asyncio.fixture(scope="module")
async def shell(newcomer: Callable[[str], Awaitable[Shell]]) -> Shell:
    """Somebody with 100 credits."""
    return await newcomer("100")


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
    email = shell.email
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


async def test_what_a_job_did_to_the_balance(newcomer: Callable[[str], Awaitable[Shell]]) -> None:
    shell = await newcomer("10")
    made = await shell.genmesh("generate", "image", "a tiger face", "--steps", "4", "--size", "64x64", "--out", "x.png", "--json")
    assert made.code == OK, made.err
    job = made.documents[-1]["job"]
    await eventually(lambda: shell.genmesh("credits", "--json"), lambda ended: ended.documents[0]["reservedMillicredits"] == "0")
    entries = (await shell.genmesh("credits", "entries", "--job", job["jobId"], "--json")).documents
    assert {entry["kind"] for entry in entries} == {"KIND_RESERVE", "KIND_CAPTURE"}
    assert {entry["model"] for entry in entries} == {job["spec"]["image"]["model"]}
    shown = await shell.genmesh("credits", "entries", "--kind", "capture")
    assert f"{job['jobId']}, {job['spec']['image']['model']}, 4 steps" in shown.out
    assert len((await shell.genmesh("credits", "entries", "--kind", "grant", "--json")).documents) == 1
    nothing = await shell.genmesh("credits", "entries", "--until", "2020-01-01")
    assert (nothing.code, nothing.out) == (OK, "")

    exported = await shell.genmesh("credits", "export", "--out", "entries.csv")
    assert (exported.code, exported.out) == (OK, ""), exported.err
    content = (shell.home / "entries.csv").read_text()
    assert (await shell.genmesh("credits", "export")).out == content
    rows = list(csv.DictReader(io.StringIO(content)))
    balance = (await shell.genmesh("credits", "--json")).documents[0]
    for account, key in (("available", "availableMillicredits"), ("reserved", "reservedMillicredits")):
        assert sum(int(row["amount_millicredits"]) for row in rows if row["account"] == account) == int(balance[key])
    assert [row["reason"] for row in rows if row["kind"] == "grant"] == ["for a test"]


async def test_a_balance_is_followed(newcomer: Callable[[str], Awaitable[Shell]], operator: Shell) -> None:
    shell = await newcomer("1")
    process = await shell.started("credits", "watch", "--json")
    assert process.stdout is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            first = json.loads(await process.stdout.readline())
            assert first["availableMillicredits"] == "1000"
            assert (await operator.genmesh("admin", "grant", shell.email, "2", "--reason", "more")).code == OK
            second = json.loads(await process.stdout.readline())
            assert second["availableMillicredits"] == "3000"
            assert int(second["version"]) > int(first["version"])
            process.send_signal(signal.SIGINT)
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert (process.returncode, out) == (INTERRUPTED, b""), err


async def test_ceilings_bound_what_is_spent(newcomer: Callable[[str], Awaitable[Shell]], operator: Shell) -> None:
    shell = await newcomer("10")
    assert (await shell.genmesh("credits", "ceilings")).out == ""
    key_id = str(uuid.uuid4())
    assert (await shell.genmesh("credits", "ceiling", key_id, "--daily", "5", "--monthly", "50")).code == OK
    one = await shell.genmesh("credits", "ceiling", key_id, "--monthly", "none", "--json")
    assert one.documents[0]["dailyMillicredits"] == "5000"
    assert "monthlyMillicredits" not in one.documents[0]
    bound = await operator.genmesh("admin", "ceiling", shell.email, "--daily", "0.1")
    assert (bound.code, bound.out) == (OK, f"{shell.email}: at most 0.1 credits a day, no bound a month\n"), bound.err
    listed = (await shell.genmesh("credits", "ceilings", "--json")).documents
    assert [ceiling.get("apiKeyId") for ceiling in listed] == ["", key_id]
    refused = await shell.genmesh("generate", "image", "x", "--steps", "4", "--size", "64x64", "--no-wait")
    assert (refused.code, refused.out) == (CREDITS, "")
    assert "the account may spend 0.1 credits a day" in refused.err
    assert "have it raised" in refused.err
    assert (await operator.genmesh("admin", "ceiling", shell.email, "--none")).code == OK
    assert (await shell.genmesh("credits", "ceiling", key_id, "--none")).code == OK
    made = await shell.genmesh("generate", "image", "x", "--steps", "4", "--size", "64x64", "--out", "x.png")
    assert made.code == OK, made.err


async def test_what_administrators_give_and_take(newcomer: Callable[[str], Awaitable[Shell]], operator: Shell) -> None:
    shell = await newcomer("10")
    grant = ("admin", "grant", shell.email, "5", "--reason", "try it", "--expires", "2999-01-01", "--request-id", str(uuid.uuid4()))
    for _ in range(2):  # the second time nothing is given
        granted = await operator.genmesh(*grant)
        assert granted.code == OK, granted.err
    assert "of that promotional  5 credits, the first expire 2999-01-01" in (await shell.genmesh("credits")).out
    taken = await operator.genmesh("admin", "clawback", shell.email, "6", "--reason", "a mistake")
    assert (taken.code, taken.out) == (OK, f"took back 6 credits; {shell.email} now has 9 credits\n"), taken.err
    too_much = await operator.genmesh("admin", "clawback", shell.email, "9.001", "--reason", "a mistake")
    assert (too_much.code, too_much.out) == (CREDITS, "")
    account = await operator.genmesh("admin", "account", shell.email, "--json")
    assert account.documents[0]["availableMillicredits"] == "9000"
    assert account.documents[0]["promotions"] == []
    assert "9 credits" in (await operator.genmesh("admin", "account", shell.email)).out
    shown = await shell.genmesh("credits", "entries", "--kind", "clawback")
    assert "a mistake" in shown.out
    seen = (await operator.genmesh("admin", "entries", shell.email, "--kind", "clawback", "--json")).documents
    mine = (await shell.genmesh("credits", "entries", "--kind", "clawback", "--json")).documents
    assert {entry["actorId"] for entry in seen} - {""}
    assert {entry["actorId"] for entry in mine} == {""}
    assert [entry | {"actorId": ""} for entry in seen] == mine
    assert (await shell.genmesh("admin", "entries", shell.email)).code == DENIED

    assert (await operator.genmesh("admin", "plan", shell.email, "pro")).code == OK
    assert (await shell.genmesh("whoami", "--json")).documents[0]["plan"] == "PLAN_PRO"
    assert (await operator.genmesh("admin", "plan", str(uuid.uuid4()), "pro")).code == NOT_FOUND


async def test_prices_and_what_is_not_sold_here(shell: Shell, tmp_path: Path) -> None:
    nobody = Shell(tmp_path, shell.edge_url)
    [prices] = (await nobody.genmesh("credits", "prices", "--json")).documents
    assert [(plan["monthlyPriceMinor"], plan["currency"]) for plan in prices["plans"] if plan["plan"] == "PLAN_PRO"] == [("4999", "USD")]
    shown = await nobody.genmesh("credits", "prices")
    assert "49.99 USD a month" in shown.out
    assert "cannot be bought here" in shown.err
    refused = await shell.genmesh("credits", "top-up", prices["packages"][0]["packageId"], "--wait")
    assert (refused.code, refused.out) == (FAILED, "")
    assert "no payment provider" in refused.err
    listed = await shell.genmesh("credits", "top-ups")
    assert (listed.code, listed.out) == (OK, "")


async def test_the_ledger_is_audited(shell: Shell, operator: Shell) -> None:
    audited = await operator.genmesh("admin", "ledger", "audit")
    assert (audited.code, audited.err) == (OK, "the ledger adds up\n"), audited.out
    assert audited.out.splitlines()[-1] == "all\t0 credits"
    as_json = await operator.genmesh("admin", "ledger", "audit", "--json")
    summary = as_json.documents[-1]["summary"]
    assert summary["discrepancyCount"] == "0"
    assert sum(int(total["amountMillicredits"]) for total in summary["totals"]) == 0
    assert int(summary["accountCount"]) > 0
    refused = await shell.genmesh("admin", "ledger", "audit")
    assert (refused.code, refused.out) == (DENIED, "")


# Keys, accounts, the audit trail


async def test_an_api_key_does_what_its_scopes_allow(newcomer: Callable[[str], Awaitable[Shell]], tmp_path: Path) -> None:
    owner = await newcomer("10")
    ended = await owner.genmesh("keys", "create", "reader", "--scope", "read", "--expires", "1d")
    assert ended.code == OK, ended.err
    (tmp_path / "key").write_text(ended.out)
    program = Shell(tmp_path, owner.edge_url, {"GENMESH_API_KEY": ended.out.strip()})
    assert (await program.genmesh("whoami", "--json")).documents[0]["email"] == owner.email
    assert not (tmp_path / "session.json").exists()
    for command in (("--api-key-file", "key", "jobs", "list"), ("jobs", "list", "--api-key-file", "key")):
        by_file = await Shell(tmp_path, owner.edge_url).genmesh(*command)
        assert (by_file.code, by_file.out) == (OK, ""), by_file.err
    refused = await program.genmesh("generate", "image", "x", "--no-wait")
    assert (refused.code, refused.out) == (DENIED, "")
    assert "--scope submit" in refused.err
    for command in (("keys", "list"), ("keys", "create", "more", "--scope", "admin"), ("logout",)):
        assert (await program.genmesh(*command)).out == "", "what makes and ends keys is for people"
    assert (await program.genmesh("keys", "list")).code == DENIED

    [key] = (await owner.genmesh("keys", "list", "--json")).documents
    assert (key["displayName"], key["scopes"], ended.out.startswith(key["prefix"])) == ("reader", ["API_KEY_SCOPE_READ"], True)
    assert "expireTime" in key
    revoked = await owner.genmesh("keys", "revoke", key["prefix"])
    assert revoked.code == OK, revoked.err
    last = await eventually(lambda: program.genmesh("whoami"), lambda ended: ended.code != OK)
    assert last.code == DENIED
    assert "GENMESH_API_KEY" in last.err
    assert "revoked" in (await owner.genmesh("keys", "list")).out


async def test_a_key_spends_no_more_than_its_ceiling(newcomer: Callable[[str], Awaitable[Shell]], tmp_path: Path) -> None:
    owner = await newcomer("10")
    ended = await owner.genmesh("keys", "create", "nightly", "--scope", "read", "--scope", "submit", "--daily-ceiling", "0.3", "--json")
    assert ended.code == OK, ended.err
    program = Shell(tmp_path, owner.edge_url, {"GENMESH_API_KEY": ended.documents[0]["secret"]})
    drawing = ("generate", "image", "x", "--steps", "4", "--size", "64x64")
    made = await program.genmesh(*drawing, "--out", "x.png")
    assert made.code == OK, made.err
    refused = await program.genmesh(*drawing, "--no-wait")
    assert (refused.code, refused.out) == (CREDITS, "")
    assert "the API key" in refused.err
    assert (await owner.genmesh(*drawing, "--no-wait")).code == OK, "the ceiling is the key's, not the account's"


async def test_what_is_no_working_key_is_refused(shell: Shell, tmp_path: Path) -> None:
    unknown = await Shell(tmp_path, shell.edge_url, {"GENMESH_API_KEY": "gmk_" + "0" * 12 + "_" + "0" * 43}).genmesh("whoami")
    assert (unknown.code, unknown.out) == (DENIED, "")
    assert "genmesh keys create" in unknown.err
    assert (await Shell(tmp_path, shell.edge_url, {"GENMESH_API_KEY": "nonsense"}).genmesh("whoami")).code == USAGE


async def test_roles_are_given_and_taken(newcomer: Callable[[str], Awaitable[Shell]], operator: Shell) -> None:
    shell = await newcomer("1")
    assert (await shell.genmesh("admin", "queue")).code == DENIED
    given = await operator.genmesh("admin", "users", "update", shell.email, "--role", "operator", "--plan", "pro")
    assert (given.code, given.out) == (OK, f"{shell.email}: plan pro, roles operator\n"), given.err
    # Sessions stay: the next access token has the role.
    await eventually(lambda: shell.genmesh("admin", "queue"), lambda ended: ended.code == OK)
    user_id = (await shell.genmesh("whoami", "--json")).documents[0]["userId"]
    assert (await shell.genmesh("admin", "account", user_id)).code == OK
    assert (await shell.genmesh("admin", "users")).code == DENIED, "accounts are for administrators"
    taken = await operator.genmesh("admin", "users", "update", user_id, "--no-role", "operator")
    assert (taken.code, taken.out) == (OK, f"{shell.email}: plan pro, no roles\n"), taken.err
    await eventually(lambda: shell.genmesh("admin", "queue"), lambda ended: ended.code == DENIED)

    acts = await operator.genmesh("admin", "audit", "--method", "UpdateUser", "--subject", user_id, "--since", "1h", "--json")
    assert acts.code == OK, acts.err
    assert [act["code"] for act in acts.documents] == [0, 0]
    by_email = await operator.genmesh("admin", "audit", "--method", "UpdateUser", "--subject", shell.email, "--since", "1h", "--json")
    assert by_email.documents == acts.documents
    assert (await operator.genmesh("admin", "audit", "--subject", "nobody@example.com")).code == NOT_FOUND
    assert all(act["actorUserId"] and act["clientAddress"] and act["requestId"] for act in acts.documents)
    assert (await operator.genmesh("admin", "audit", "--subject", user_id, "--until", "2020-01-01")).out == ""
    assert "IdentityAdminService/UpdateUser" in (await operator.genmesh("admin", "audit", "--actor", operator.account["GENMESH_EMAIL"])).out
    assert (await shell.genmesh("admin", "audit")).code == DENIED


async def test_a_disabled_account_is_out_and_its_watch_ends(newcomer: Callable[[str], Awaitable[Shell]], operator: Shell) -> None:
    shell = await newcomer("1")
    email = shell.email
    watch = await shell.started("credits", "watch", "--json")
    assert watch.stdout is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            assert await watch.stdout.readline()
            disabled = await operator.genmesh("admin", "users", "update", email, "--disable")
            assert (disabled.code, disabled.out) == (OK, f"{email}: plan free, no roles, disabled\n"), disabled.err
            _, err = await watch.communicate()
    finally:
        if watch.returncode is None:
            watch.kill()
            await watch.wait()
    assert watch.returncode == DENIED, err
    again = await shell.genmesh("login", "--email", email, "--password-stdin", stdin=PASSWORD + "\n")
    assert again.code == DENIED
    assert "enable" in again.err
    assert (await operator.genmesh("admin", "users", "update", email, "--enable")).code == OK
    assert (await shell.genmesh("login", "--email", email, "--password-stdin", stdin=PASSWORD + "\n")).code == OK


async def test_the_last_administrator_stays(operator: Shell) -> None:
    email = operator.account["GENMESH_EMAIL"]
    for change in (("--disable",), ("--no-role", "admin")):
        refused = await operator.genmesh("admin", "users", "update", email, *change)
        assert (refused.code, refused.out) == (FAILED, "")
        assert "--role admin" in refused.err


async def test_signing_out_ends_the_session_for_all_who_have_it(newcomer: Callable[[str], Awaitable[Shell]], tmp_path: Path) -> None:
    shell = await newcomer("1")
    (tmp_path / "session.json").write_bytes((shell.home / "session.json").read_bytes())
    copy = Shell(tmp_path, shell.edge_url)
    assert (await copy.genmesh("whoami")).code == OK
    assert (await shell.genmesh("logout")).code == OK
    ended = await eventually(lambda: copy.genmesh("credits"), lambda ended: ended.code != OK)
    assert ended.code == DENIED
    assert "genmesh login" in ended.err


async def test_sign_in_with_google_where_it_is_not_set_up(tmp_path: Path, stack: Stack) -> None:
    ended = await Shell(tmp_path, stack.edge_url).genmesh("login", "--google", "--no-browser")
    assert (ended.code, ended.out) == (FAILED, "")
    assert "does not offer" in ended.err


async def test_nothing_is_linked_to_a_new_account(newcomer: Callable[[str], Awaitable[Shell]]) -> None:
    shell = await newcomer("1")
    listed = await shell.genmesh("identities", "list")
    assert (listed.code, listed.out) == (OK, ""), listed.err
    assert (await shell.genmesh("identities", "unlink", str(uuid.uuid4()))).code == NOT_FOUND


# Uploads


async def test_a_file_is_uploaded_and_checked(shell: Shell) -> None:
    Image.new("RGB", (64, 48), "orange").save(shell.home / "cat.png")
    put = await shell.genmesh("uploads", "put", "cat.png")
    assert put.code == OK, put.err
    size_bytes = (shell.home / "cat.png").stat().st_size
    assert put.err == f"image/png, 64x48 pixels, {size_bytes} bytes\n"
    [upload] = (await shell.genmesh("uploads", "show", put.out.strip(), "--json")).documents
    assert (upload["state"], upload["width"], upload["height"]) == ("UPLOAD_STATE_COMPLETE", 64, 48)
    assert upload["sha256"] == hashlib.sha256((shell.home / "cat.png").read_bytes()).hexdigest()
    assert "complete" in (await shell.genmesh("uploads", "show", put.out.strip())).out


async def test_a_file_that_is_not_what_its_name_says(shell: Shell) -> None:
    (shell.home / "fake.png").write_text("not a picture at all, though its name says so")
    put = await shell.genmesh("uploads", "put", "fake.png")
    assert (put.code, put.out) == (USAGE, "")
    assert "upload " in put.err


# New keys and certificates under way


async def test_certificates_and_signing_keys_are_rotated_under_way(shell: Shell, stack: Stack) -> None:
    stack_of = {"GENMESH_STATE_DIR": str(stack.state.path)}
    before = {file.name: file.read_bytes() for file in stack.certificates_dir.glob("*.crt")}
    rotated = await shell.genmesh("certificates", "rotate", **stack_of)
    assert rotated.code == OK, rotated.err
    after = {file.name: file.read_bytes() for file in stack.certificates_dir.glob("*.crt")}
    assert {name for name in before if before[name] == after[name]} == {"ca.crt"}
    made = await shell.genmesh("signing-keys", "rotate", **stack_of)
    assert made.code == OK, made.err
    for _ in range(2):
        ended = await shell.genmesh("credits")
        assert ended.code == OK, ended.err
    assert not [status for status in stack.processes if not status.is_well]


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
    "time that is none": (USAGE, ("credits", "entries", "--since", "soon")),
    "kind that is none": (USAGE, ("credits", "export", "--kind", "bonus")),
    "package that is none": (FAILED, ("credits", "top-up", "no-such-package")),
    "scope that is none": (USAGE, ("keys", "create", "x", "--scope", "write")),
    "key that expired before": (USAGE, ("keys", "create", "x", "--scope", "read", "--expires", "2020-01-01")),
    "key that is not there": (NOT_FOUND, ("keys", "revoke", str(uuid.uuid4()))),
    "not an administrator of accounts": (DENIED, ("admin", "users", "update", str(uuid.uuid4()), "--disable")),
    "upload that is not there": (NOT_FOUND, ("uploads", "show", str(uuid.uuid4()))),
    "file that is not there": (USAGE, ("uploads", "put", "none.png")),
    "bound that is none": (USAGE, ("credits", "ceiling", str(uuid.uuid4()), "--daily", "much")),
    "more than there is": (CREDITS, ("generate", "image", "x", "--steps", "100", "--size", "128x128", "--count", "8", "--no-wait")),
}


@pytest.mark.parametrize(("code", "arguments"), BAD.values(), ids=BAD.keys())
async def test_what_goes_wrong_has_an_exit_code(shell: Shell, code: int, arguments: tuple[str, ...]) -> None:
    ended = await shell.genmesh(*arguments)
    assert ended.code == code, ended.err
    assert ended.out == ""
    assert ended.err


async def test_what_goes_wrong_is_a_status_for_scripts(shell: Shell) -> None:
    ended = await shell.genmesh("jobs", "show", str(uuid.uuid4()), "--json")
    assert (ended.code, ended.out) == (NOT_FOUND, "")
    [line] = ended.err.splitlines()
    status = json.loads(line)
    assert (status["code"], status["details"][0]["reason"]) == (5, "ERROR_REASON_NOT_FOUND")


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
