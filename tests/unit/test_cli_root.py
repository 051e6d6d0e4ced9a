"""What all commands share: the version, help, JSON for scripts, how failures are told and which exit code they get."""

import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import grpc
import pytest
import typer
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import code_pb2, status_pb2
from typer.core import TyperGroup
from typer.testing import Result

from cli.commands.admin_accounts import ADMINISTRATORS, OPERATORS
from cli.failures import EXIT_CODES, CommandError, ExitCode
from cli.main import app
from genmesh.credits.v1 import credits_pb2, payments_pb2
from genmesh.identity.v1 import identity_pb2
from genmesh.jobs.v1 import jobs_pb2
from genmesh.options.v1 import options_pb2
from scripts.settings_table import table
from servicekit.errors import MeshError, invalid, precondition, unavailable
from tests.unit.fake_edge import IDENTITY_ID, ISSUER, JOB_ID, UPLOAD_ID, USER_ID, WAIT_S, FakeEdge, Reason, spawned

README = Path(__file__).parents[2] / "README.md"


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command of the tree, by what is typed."""
    group = typer.main.get_command(app) if group is None else group
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, TyperGroup):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands())


def told(result: Result) -> dict[str, Any]:
    """The one line of a failure."""
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return json.loads(line)


def test_the_version_is_one_line(genmesh: Callable[..., Result]) -> None:
    result = genmesh("--version")
    assert (result.exit_code, result.output) == (0, f"genmesh {version('genmesh')}\n")


# Help


def words(text: str) -> str:
    """Help without frames and line breaks."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", text).split())


@pytest.mark.parametrize("path", [(), *COMMANDS], ids=" ".join)
def test_every_command_explains_itself(genmesh: Callable[..., Result], path: tuple[str, ...]) -> None:
    result = genmesh(*path, "--help")
    assert result.exit_code == 0
    shown = words(result.stdout)
    assert shown.startswith(f"Usage: genmesh {' '.join(path)}".rstrip())
    for parameter in COMMANDS[path].params if path else ():
        assert parameter.help, f"{path}: {parameter.name} is not explained"


def test_exit_codes_are_documented_in_help_and_readme(genmesh: Callable[..., Result]) -> None:
    assert words(EXIT_CODES) in words(genmesh("--help").stdout)
    documented = dict(re.findall(r"(\d+) ([^·]+?)(?: ·|\.)", EXIT_CODES))
    assert {str(int(code)) for code in ExitCode} | {"78"} == documented.keys()
    assert re.findall(r"^\| (\d+) \|", README.read_text(), re.MULTILINE) == list(documented)


_LEDGER = credits_pb2.DESCRIPTOR.services_by_name["LedgerAdminService"].methods_by_name
_JOBS = jobs_pb2.DESCRIPTOR.services_by_name["JobsAdminService"].methods_by_name
_IDENTITY = identity_pb2.DESCRIPTOR.services_by_name["IdentityAdminService"].methods_by_name
ACTS = {
    "grant": _LEDGER["GrantCredits"],
    "clawback": _LEDGER["ClawbackCredits"],
    "account": _LEDGER["GetAccount"],
    "entries": _LEDGER["ListAccountEntries"],
    "ceiling": _LEDGER["SetUserCeiling"],
    "ledger": _LEDGER["AuditLedger"],
    "queue": _JOBS["GetQueueStats"],
    "dead-letters": _JOBS["ListDeadLetters"],
    "requeue": _JOBS["RequeueDeadLetter"],
    "users": _IDENTITY["ListUsers"],
    "plan": _IDENTITY["UpdateUser"],
    "audit": _IDENTITY["ListAuditEntries"],
}


def test_help_says_what_operators_may_do_as_the_contract_does() -> None:
    panels = {path[1]: command.rich_help_panel for path, command in COMMANDS.items() if path[0] == "admin" and len(path) == 2}
    access = {name: method.GetOptions().Extensions[options_pb2.access] for name, method in ACTS.items()}
    expected = {options_pb2.ACCESS_OPERATOR: OPERATORS, options_pb2.ACCESS_ADMIN: ADMINISTRATORS}
    assert panels == {name: expected[who] for name, who in access.items()}


def test_a_key_is_an_option_of_every_command_that_calls_with_one() -> None:
    calls = {path for path, command in COMMANDS.items() if any(parameter.name == "edge" for parameter in command.params)}
    keyed = {path for path, command in COMMANDS.items() if any(parameter.name == "key_file" for parameter in command.params)}
    people = {("register",), ("login",), ("logout",), ("link",), ("identities", "list"), ("identities", "unlink")}
    assert calls - keyed == people | {path for path in calls if path[0] == "keys"}
    assert keyed <= calls


# JSON


JSON = [
    ["whoami"],
    ["generate", "image", "x", "--no-wait"],
    ["watch", JOB_ID],
    ["jobs", "list"],
    ["jobs", "show", JOB_ID],
    ["jobs", "cancel", JOB_ID],
    ["jobs", "delete", "a", "b", "--yes"],
    ["uploads", "show", UPLOAD_ID],
    ["keys", "create", "ci", "--scope", "read"],
    ["keys", "list"],
    ["identities", "list"],
    ["identities", "unlink", IDENTITY_ID],
    ["credits"],
    ["credits", "entries"],
    ["credits", "ceilings"],
    ["credits", "ceiling", USER_ID, "--daily", "1"],
    ["credits", "prices"],
    ["credits", "top-ups"],
    ["admin", "account", USER_ID],
    ["admin", "entries", USER_ID],
    ["admin", "grant", USER_ID, "1", "--reason", "x"],
    ["admin", "clawback", USER_ID, "1", "--reason", "x"],
    ["admin", "ceiling", USER_ID, "--none"],
    ["admin", "plan", USER_ID, "pro"],
    ["admin", "users"],
    ["admin", "users", "update", USER_ID, "--disable"],
    ["admin", "audit"],
    ["admin", "queue"],
    ["admin", "dead-letters"],
    ["admin", "requeue", JOB_ID],
    ["admin", "ledger", "audit"],
]


@pytest.mark.parametrize("arguments", JSON, ids=" ".join)
def test_json_is_an_object_a_line(signed_in: Callable[..., Result], fake: FakeEdge, arguments: list[str]) -> None:
    done = jobs_pb2.Job(job_id=JOB_ID, state=jobs_pb2.STATE_COMPLETED)
    fake.connections.append([jobs_pb2.WatchJobsResponse(snapshot=done)])
    fake.identities.append(identity_pb2.LinkedIdentity(identity_id=IDENTITY_ID, issuer=ISSUER))
    fake.entries = [credits_pb2.Entry(reason="two\nlines")] * 2
    fake.ceilings = [credits_pb2.Ceiling()]
    fake.top_ups.append(payments_pb2.TopUp())
    fake.pools = [jobs_pb2.PoolStats(pool="a"), jobs_pb2.PoolStats(pool="b")]
    fake.audit_entries = [identity_pb2.AuditEntry()]
    fake.requeued.job_ids.append(JOB_ID)
    fake.audits.append([credits_pb2.AuditLedgerResponse(summary=credits_pb2.AuditSummary())])
    result = signed_in(*arguments, "--json")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines
    assert all(isinstance(json.loads(line), dict) for line in lines)


def test_every_command_with_json_is_tried() -> None:
    tried = {path for path in COMMANDS for arguments in JSON if tuple(arguments[: len(path)]) == path}
    having = {path for path, command in COMMANDS.items() if any("--json" in parameter.opts for parameter in command.params)}
    elsewhere = {  # by the tests of their topic, or as `watch` and `jobs show` are
        *(("status",), ("register",), ("login",), ("models",), ("estimate", "image"), ("jobs", "retry"), ("uploads", "put")),
        *(("keys", "revoke"), ("credits", "watch"), ("credits", "top-up")),
    }
    assert having - tried == elsewhere


# Failures as JSON


def test_a_refusal_is_the_status_that_the_server_sent(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.refusals.append(invalid("states", "is\nnone"))
    result = signed_in("jobs", "list", "--json")
    assert result.exit_code == ExitCode.USAGE
    status = told(result)
    assert status["code"] == code_pb2.INVALID_ARGUMENT
    kinds = {detail["@type"].rpartition(".")[2]: detail for detail in status["details"]}
    assert (kinds["ErrorInfo"]["reason"], kinds["ErrorInfo"]["domain"]) == ("ERROR_REASON_INVALID_ARGUMENT", "genmesh")
    assert kinds["BadRequest"]["fieldViolations"] == [{"field": "states", "description": "is\nnone"}]
    assert "--help" in kinds["LocalizedMessage"]["message"]


REFUSED = [
    (precondition(Reason.ERROR_REASON_INSUFFICIENT_CREDITS, "no"), ExitCode.CREDITS, code_pb2.FAILED_PRECONDITION),
    (MeshError(grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED, "no"), ExitCode.LIMITED, code_pb2.RESOURCE_EXHAUSTED),
    (MeshError(grpc.StatusCode.INTERNAL, Reason.ERROR_REASON_INTERNAL, "no"), ExitCode.FAILED, code_pb2.INTERNAL),
]


@pytest.mark.parametrize(("refusal", "exit_code", "code"), REFUSED)
def test_json_leaves_the_exit_code(
    signed_in: Callable[..., Result], fake: FakeEdge, refusal: MeshError, exit_code: ExitCode, code: int
) -> None:
    for arguments in (["jobs", "list"], ["jobs", "list", "--json"]):
        fake.refusals.append(refusal)
        result = signed_in(*arguments)
        assert result.exit_code == exit_code
    assert (told(result)["code"], told(result)["details"][0]["reason"]) == (code, Reason.Name(refusal.reason))


@pytest.mark.parametrize(
    ("arguments", "exit_code", "code"),
    [
        (["whoami", "--json"], ExitCode.DENIED, code_pb2.UNAUTHENTICATED),
        (["whoami", "--json", "--edge", "nonsense"], ExitCode.USAGE, code_pb2.INVALID_ARGUMENT),
        (["credits", "prices", "--json", "--edge", "http://127.0.0.1:1"], ExitCode.UNAVAILABLE, code_pb2.UNAVAILABLE),
        (["jobs", "list", "--json", "--limit", "0"], ExitCode.USAGE, code_pb2.INVALID_ARGUMENT),
        (["jobs", "nonsense", "--json"], ExitCode.USAGE, code_pb2.INVALID_ARGUMENT),
        (["--nonsense", "whoami", "--json"], ExitCode.USAGE, code_pb2.INVALID_ARGUMENT),
        (["jobs", "show", "--json"], ExitCode.USAGE, code_pb2.INVALID_ARGUMENT),
    ],
)
def test_what_no_server_says_is_a_status_too(genmesh: Callable[..., Result], arguments: list[str], exit_code: ExitCode, code: int) -> None:
    result = genmesh(*arguments)
    assert result.exit_code == exit_code
    status = told(result)
    assert status["code"] == code
    assert status["message"]


def test_what_was_not_confirmed_is_a_status(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    result = signed_in("jobs", "delete", "a", "--json", stdin="n\n")
    assert result.exit_code == ExitCode.FAILED
    assert json.loads(result.stderr.splitlines()[-1])["message"] == "not confirmed"
    assert not fake.delete_asked


def test_a_job_that_failed_tells_its_own_reason(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    job = jobs_pb2.Job(job_id=JOB_ID, state=jobs_pb2.STATE_FAILED)
    job.error.CopyFrom(MeshError(grpc.StatusCode.ABORTED, Reason.ERROR_REASON_MODEL_OUT_OF_MEMORY, "out of memory").to_status())
    fake.connections.append([jobs_pb2.WatchJobsResponse(snapshot=job)])
    result = signed_in("watch", JOB_ID, "--json")
    assert result.exit_code == ExitCode.FAILED
    status = json.loads(result.stderr)
    assert (status["code"], status["details"][0]["reason"]) == (code_pb2.ABORTED, "ERROR_REASON_MODEL_OUT_OF_MEMORY")


def test_a_repeat_keeps_the_servers_reason(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.refusals.append(MeshError(grpc.StatusCode.INTERNAL, Reason.ERROR_REASON_INTERNAL, "oh", metadata={"error_id": "e17"}))
    result = signed_in("admin", "grant", USER_ID, "1", "--reason", "x", "--json")
    status = told(result)
    assert status["details"][0]["metadata"] == {"error_id": "e17"}
    assert f"--request-id {fake.granted[0].request_id}" in status["details"][-1]["message"]


def test_a_prompt_that_looks_like_the_option_is_none(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.refusals.append(unavailable("down", 60))
    result = signed_in("generate", "image", "--no-wait", "--", "--json")
    assert result.exit_code == ExitCode.UNAVAILABLE
    assert result.stderr.startswith("error: ")


def test_details_of_an_unknown_type_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    unknown = AnyMessage(type_url="type.googleapis.com/genmesh.next.v9.Detail", value=b"\x08\x01")
    CommandError("no", status=status_pb2.Status(code=5, details=[unknown])).show(as_json=True)
    assert json.loads(capsys.readouterr().err) == {"code": 5, "message": "no"}


def test_an_interruption_is_a_status(signed_in: Callable[..., Result], fake: FakeEdge, environment: dict[str, str | None]) -> None:
    assert signed_in("whoami").exit_code == 0
    with spawned(environment, "credits", "watch", "--json", stdout=subprocess.PIPE) as process:
        assert fake.watching.wait(WAIT_S)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == ExitCode.INTERRUPTED
    assert json.loads(errors.splitlines()[-1]) == {"code": code_pb2.CANCELLED, "message": "interrupted"}


# The table of settings


@pytest.mark.parametrize(
    ("variable", "default"), [("GENMESH_ADMIN_PORT", "`9901`; stack: chosen free"), ("GENMESH_HSTS_MAX_AGE_S", "`31536000`; stack: `0`")]
)
def test_the_table_says_where_the_stack_differs(variable: str, default: str) -> None:
    (row,) = (line.split(" | ") for line in table().splitlines() if line.startswith(f"| `{variable}` "))
    assert row[2] == default
