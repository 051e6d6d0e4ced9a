"""What administrators do with accounts, and the audit trail as they see it."""

import json
import time
from collections.abc import Callable

import pytest
from typer.testing import Result

from cli.failures import ExitCode
from genmesh.identity.v1 import identity_pb2
from servicekit.errors import permission_denied, precondition
from tests.unit.fake_edge import API_KEY_ID, EMAIL, USER_ID, FakeEdge, Reason

UPDATE_USER = "genmesh.identity.v1.IdentityAdminService/UpdateUser"


def test_roles_are_added_and_taken_away_one_by_one(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.roles = ["admin"]
    result = signed_in("admin", "users", "update", EMAIL, "--role", "operator")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{EMAIL}: plan free, roles admin, operator\n"
    assert signed_in("admin", "users", "update", USER_ID, "--role", "operator", "--no-role", "admin").exit_code == 0
    assert signed_in("admin", "users", "update", EMAIL, "--no-role", "admin").exit_code == 0
    assert [list(request.roles.roles) for request in fake.updated] == [["admin", "operator"], ["operator"], []]
    assert all(request.HasField("roles") and not request.HasField("plan") and not request.HasField("disabled") for request in fake.updated)


def test_what_is_not_named_stays(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    assert signed_in("admin", "users", "update", USER_ID, "--plan", "pro").exit_code == 0
    disabled = signed_in("admin", "users", "update", EMAIL, "--disable")
    assert disabled.stdout == f"{EMAIL}: plan free, no roles, disabled\n"
    assert "within a minute" in disabled.stderr
    assert json.loads(signed_in("admin", "users", "update", EMAIL, "--enable", "--json").stdout)["disabled"] is False
    set_fields = [{field.name for field, _ in request.ListFields()} for request in fake.updated]
    assert set_fields == [{"user_id", "plan"}, {"user_id", "disabled"}, {"user_id", "disabled"}]
    assert [request.disabled for request in fake.updated] == [False, True, False]


@pytest.mark.parametrize(
    "arguments",
    [
        ["users", "update", EMAIL],
        ["users", "update", "ann", "--disable"],
        ["users", "update", EMAIL, "--role", "king"],
        ["users", "update", EMAIL, "--role", "admin", "--no-role", "admin"],
        ["users", "update", EMAIL, "--plan", "gold"],
        ["users", "--json", "update", EMAIL, "--disable"],
        ["audit", "--actor", "ann"],
        ["audit", "--since", "lately"],
        ["audit", "--since", "1d", "--until", "2d"],
        ["audit", "--method", "Nonsense"],
        ["audit", "--method", "GetUser"],
        ["audit", "--limit", "0"],
    ],
)
def test_bad_input_is_usage_and_reaches_nobody(signed_in: Callable[..., Result], fake: FakeEdge, arguments: list[str]) -> None:
    assert signed_in("admin", *arguments).exit_code == ExitCode.USAGE
    assert not fake.updated
    assert not fake.audit_asked


@pytest.mark.parametrize("who", ["no@example.com", API_KEY_ID])
@pytest.mark.parametrize("change", [["--disable"], ["--role", "admin"]])
def test_an_account_that_is_not_there(signed_in: Callable[..., Result], who: str, change: list[str]) -> None:
    result = signed_in("admin", "users", "update", who, *change)
    assert result.exit_code == ExitCode.NOT_FOUND
    assert who in result.stderr


def test_operators_name_accounts_by_id(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.refusals.append(permission_denied("only administrators"))
    result = signed_in("admin", "account", EMAIL)
    assert result.exit_code == ExitCode.DENIED
    assert "by their user id" in result.stderr
    assert signed_in("admin", "account", USER_ID).exit_code == 0


def test_the_last_administrator_stays_one(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.refusals.append(precondition(Reason.ERROR_REASON_LAST_ADMIN, "nobody would be left with the role admin"))
    result = signed_in("admin", "users", "update", USER_ID, "--disable")
    assert result.exit_code == ExitCode.FAILED
    assert "--role admin" in result.stderr


def test_disabled_accounts_are_marked_in_the_list(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.roles = ["admin", "operator"]
    (row,) = [line.split("\t") for line in signed_in("admin", "users").stdout.splitlines()]
    assert (row[0], row[4], row[6]) == (EMAIL, "admin, operator", "enabled")
    assert signed_in("admin", "users", "--email", "no@example.com").stdout == ""


def test_the_audit_trail_is_a_table(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    acted = identity_pb2.AuditEntry(
        actor_user_id=USER_ID,
        actor_api_key_id=API_KEY_ID,
        method=UPDATE_USER,
        subject="somebody\x1b[2J",
        client_address="203.0.113.9",
        request_id="r1",
        reporter="gateway",
        details={"roles": "admin", "disabled": "true"},
        code=0,
    )
    refused = identity_pb2.AuditEntry(method="genmesh.identity.v1.IdentityService/SignIn", code=16, reason="ERROR_REASON_BAD_CREDENTIALS")
    died = identity_pb2.AuditEntry(actor_service="jobs_service", method="x.Y/Z")
    fake.audit_entries = [acted, refused, died, identity_pb2.AuditEntry(code=14), identity_pb2.AuditEntry(code=99)]
    rows = [line.split("\t") for line in signed_in("admin", "audit").stdout.splitlines()]
    assert rows[0][1:] == [
        USER_ID,
        API_KEY_ID,
        "IdentityAdminService/UpdateUser",
        "somebody\ufffd[2J",
        "203.0.113.9",
        "ok",
        "gateway",
        "r1",
        "disabled=true, roles=admin",
    ]
    assert [row[1] for row in rows[1:3]] == ["nobody signed in", "jobs_service"]
    assert [row[6] for row in rows] == ["ok", "bad credentials", "not known", "unavailable", "99"]
    lines = [json.loads(line) for line in signed_in("admin", "audit", "--json", "--limit", "2").stdout.splitlines()]
    assert [line["reason"] for line in lines] == ["", "ERROR_REASON_BAD_CREDENTIALS"]


def test_the_audit_trail_is_selected(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    result = signed_in(
        "admin", "audit", "--actor", EMAIL, "--subject", API_KEY_ID, "--method", "UpdateUser", "--since", "2d", "--limit", "7"
    )
    assert result.exit_code == 0, result.output
    (asked,) = fake.audit_asked
    assert (asked.actor_user_id, asked.subject, asked.method, asked.page_size) == (USER_ID, API_KEY_ID, UPDATE_USER, 7)
    assert asked.start_time.seconds == pytest.approx(time.time() - 2 * 86_400, abs=60)
    assert not asked.HasField("end_time")
    for who in (EMAIL, EMAIL.upper(), USER_ID):
        assert signed_in("admin", "audit", "--subject", who).exit_code == 0
        assert fake.audit_asked[-1].subject == USER_ID
    for method in ("IdentityAdminService/UpdateUser", UPDATE_USER, f"/{UPDATE_USER}"):
        assert signed_in("admin", "audit", "--method", method).exit_code == 0
        assert fake.audit_asked[-1].method == UPDATE_USER


@pytest.mark.parametrize("option", ["--actor", "--subject"])
def test_an_address_without_an_account_has_no_trail(signed_in: Callable[..., Result], fake: FakeEdge, option: str) -> None:
    result = signed_in("admin", "audit", option, "no@example.com")
    assert (result.exit_code, result.stdout) == (ExitCode.NOT_FOUND, "")
    assert "there is no account no@example.com" in result.stderr
    assert not fake.audit_asked
