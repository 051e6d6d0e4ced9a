"""Who a command calls as: API keys, tokens that were revoked, sign-in with Google in a browser, sign-out."""

import base64
import hashlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from pathlib import Path
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

import grpc
import pytest
from typer.testing import Result

from cli.browser import sign_in_code
from cli.client import Edge
from cli.failures import CommandError, ExitCode, reason_of
from cli.inputs import parse_from_now
from cli.session import Session, SessionFile, SessionMemory
from genmesh.identity.v1 import identity_pb2
from genmesh.jobs.v1 import jobs_pb2
from servicekit.errors import MeshError, permission_denied, precondition, unauthenticated
from tests.unit.fake_edge import (
    API_KEY_ID,
    EMAIL,
    IDENTITY_ID,
    ISSUER,
    JOB_ID,
    PASSWORD,
    PREFIX,
    SECRET,
    USER_ID,
    WAIT_S,
    FakeEdge,
    Reason,
    event,
    spawned,
)

EXPIRED = unauthenticated(Reason.ERROR_REASON_TOKEN_EXPIRED, "the access token has expired")
REVOKED = unauthenticated(Reason.ERROR_REASON_TOKEN_REVOKED, "the access token was revoked")


# Keys


def test_the_secret_of_a_new_key_is_all_of_the_output(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    result = signed_in("keys", "create", "ci", "--scope", "read", "--scope", "submit", "--expires", "30d", "--daily-ceiling", "0.5")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{SECRET}\n"
    assert API_KEY_ID in result.stderr
    assert "read, submit" in result.stderr
    assert "shown this once" in result.stderr
    assert SECRET not in result.stderr
    (asked,) = fake.keys_asked
    assert (asked.display_name, list(asked.scopes)) == ("ci", [identity_pb2.API_KEY_SCOPE_READ, identity_pb2.API_KEY_SCOPE_SUBMIT])
    assert 29 * 86_400 < asked.expire_time.seconds - time.time() < 31 * 86_400
    assert asked.daily_ceiling_millicredits == 500
    assert not asked.HasField("monthly_ceiling_millicredits")
    as_json = json.loads(signed_in("keys", "create", "ci", "--scope", "admin", "--monthly-ceiling", "0", "--json").stdout)
    assert (as_json["secret"], as_json["apiKey"]["scopes"]) == (SECRET, ["API_KEY_SCOPE_ADMIN"])
    assert fake.keys_asked[1].HasField("monthly_ceiling_millicredits")


def test_making_a_key_is_not_repeated(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.refusals.append(MeshError(grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_UNAVAILABLE, "restarting"))
    assert signed_in("keys", "create", "ci", "--scope", "read").exit_code == ExitCode.UNAVAILABLE
    assert len(fake.keys_asked) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["keys", "create", "ci"],
        ["keys", "create", " ", "--scope", "read"],
        ["keys", "create", "ci", "--scope", "write"],
        ["keys", "create", "ci", "--scope", "read", "--expires", "soon"],
        ["keys", "create", "ci", "--scope", "read", "--expires", "999999d"],
        ["keys", "create", "ci", "--scope", "read", "--daily-ceiling", "-1"],
        ["keys", "revoke", "ci"],
        ["login", "--google", "--email", EMAIL],
        ["login", "--no-browser"],
        ["link", "myspace"],
        ["identities", "unlink", "google"],
    ],
)
def test_bad_input_is_usage(signed_in: Callable[..., Result], fake: FakeEdge, arguments: list[str]) -> None:
    assert signed_in(*arguments).exit_code == ExitCode.USAGE
    assert not fake.keys_asked


def test_keys_are_listed_with_their_state(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    for expire_time in (1, int(time.time()) + 1000):
        fake.keys.append(identity_pb2.ApiKey(api_key_id=USER_ID, scopes=[identity_pb2.API_KEY_SCOPE_ADMIN]))
        fake.keys[-1].expire_time.seconds = expire_time
    fake.keys[0].revoke_time.seconds = 1
    rows = [line.split("\t") for line in signed_in("keys", "list").stdout.splitlines()]
    assert rows[0][:5] == [API_KEY_ID, "ci", PREFIX, "read, submit", "revoked"]
    assert [row[4] for row in rows] == ["revoked", "expired", "works"]
    assert rows[0][6:] == ["never", "never"]
    assert len(signed_in("keys", "list", "--json", "--limit", "2").stdout.splitlines()) == 2


@pytest.mark.parametrize("named", [API_KEY_ID, API_KEY_ID.upper(), PREFIX, SECRET])
def test_a_key_is_revoked_by_id_or_by_its_beginning(signed_in: Callable[..., Result], fake: FakeEdge, named: str) -> None:
    result = signed_in("keys", "revoke", named)
    assert result.exit_code == 0, result.output
    assert fake.keys[0].HasField("revoke_time")
    assert SECRET not in result.output


@pytest.mark.parametrize("named", [USER_ID, "gmk_ba9876543210", "gmk_"])
def test_a_key_that_is_not_there_cannot_be_revoked(signed_in: Callable[..., Result], fake: FakeEdge, named: str) -> None:
    result = signed_in("keys", "revoke", named)
    assert result.exit_code == ExitCode.NOT_FOUND
    assert "genmesh keys list" in result.stderr
    assert not fake.keys[0].HasField("revoke_time")


def test_a_key_takes_the_place_of_the_login(genmesh: Callable[..., Result], fake: FakeEdge, tmp_path: Path, session_path: Path) -> None:
    assert genmesh("whoami", GENMESH_API_KEY=f" {SECRET}\n").exit_code == 0
    file = tmp_path / "key"
    file.write_text(f"{SECRET}\n")
    assert genmesh("--api-key-file", str(file), "whoami", GENMESH_API_KEY="gmk_unknown").exit_code == 0
    assert genmesh("--api-key-file", str(file), "whoami", GENMESH_EMAIL=EMAIL, GENMESH_PASSWORD="wrong").exit_code == 0
    assert fake.tokens == 0
    assert not session_path.exists()
    assert genmesh("whoami").exit_code == ExitCode.DENIED, "the key of an earlier command is forgotten"


def test_the_key_file_is_named_in_front_of_the_command_or_behind_it(genmesh: Callable[..., Result], fake: FakeEdge, tmp_path: Path) -> None:
    file, wrong = tmp_path / "key", tmp_path / "wrong"
    file.write_text(SECRET)
    wrong.write_text("gmk_unknown")
    for arguments in (
        ["whoami", "--api-key-file", str(file)],
        ["--api-key-file", str(wrong), "whoami", "--api-key-file", str(file)],
        ["jobs", "list", "--api-key-file", str(file), "--limit", "1"],
        ["credits", "--api-key-file", str(file)],
        ["credits", "--api-key-file", str(file), "entries"],
        ["credits", "entries", "--api-key-file", str(file)],
        ["admin", "users", "--api-key-file", str(file), "update", USER_ID, "--disable"],
    ):
        result = genmesh(*arguments)
        assert result.exit_code == 0, (arguments, result.output)
    assert fake.tokens == 0
    assert genmesh("login", "--api-key-file", str(file)).exit_code == ExitCode.USAGE
    assert genmesh("whoami").exit_code == ExitCode.DENIED, "the key of an earlier command is forgotten"


def test_signing_in_leaves_the_key_out(genmesh: Callable[..., Result], session_path: Path) -> None:
    login = genmesh("login", "--email", EMAIL, "--password-stdin", stdin=PASSWORD, GENMESH_API_KEY="nonsense")
    assert login.exit_code == 0, login.output
    assert session_path.exists()
    assert genmesh("--api-key-file", "none", "logout", GENMESH_API_KEY="nonsense").exit_code == 0
    assert not session_path.exists()


def test_a_key_that_does_not_work_says_so_once(genmesh: Callable[..., Result], fake: FakeEdge) -> None:
    fake.secrets.clear()
    result = genmesh("whoami", GENMESH_API_KEY=SECRET)
    assert result.exit_code == ExitCode.DENIED
    assert "GENMESH_API_KEY" in result.stderr
    assert SECRET not in result.output


@pytest.mark.parametrize(("scope", "says"), [("submit", "genmesh keys create NAME --scope submit"), ("", "genmesh login")])
def test_what_a_key_may_not_do_is_said(genmesh: Callable[..., Result], fake: FakeEdge, scope: str, says: str) -> None:
    refusal = permission_denied("the API key may not do this", Reason.ERROR_REASON_SCOPE_MISSING)
    fake.token_refusals.append(MeshError(refusal.code, refusal.reason, refusal.message, metadata={"scope": scope}))
    result = genmesh("keys", "list", GENMESH_API_KEY=SECRET)
    assert result.exit_code == ExitCode.DENIED
    assert says in result.stderr


@pytest.mark.parametrize("content", ["", "gmk_", "secret", "gmk_a b", f"{SECRET}\n{SECRET}", "gmk_" + "a" * 600, "gmk_\u00e9"])
def test_what_is_no_key_goes_nowhere(genmesh: Callable[..., Result], tmp_path: Path, content: str) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    results = [genmesh("--api-key-file", str(file), "whoami")]
    if content:  # an empty variable is unset
        results.append(genmesh("whoami", GENMESH_API_KEY=content))
    for result in results:
        assert result.exit_code == ExitCode.USAGE
        assert "holds no API key" in result.stderr
        assert content == "" or content not in result.output


def test_a_key_file_that_cannot_be_read(genmesh: Callable[..., Result], tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        result = genmesh("--api-key-file", str(path), "whoami")
        assert result.exit_code == ExitCode.USAGE
        assert str(path) in result.stderr


def test_a_key_and_an_account_in_the_environment_are_ambiguous(genmesh: Callable[..., Result], fake: FakeEdge) -> None:
    result = genmesh("whoami", GENMESH_API_KEY=SECRET, GENMESH_EMAIL=EMAIL, GENMESH_PASSWORD=PASSWORD)
    assert result.exit_code == ExitCode.USAGE
    assert fake.tokens == 0


ADVICE = {
    Reason.ERROR_REASON_TOKEN_REVOKED: "sign in again with `genmesh login`",
    Reason.ERROR_REASON_ID_TOKEN_INVALID: "genmesh login --google",
    Reason.ERROR_REASON_PASSWORD_BREACHED: "another password",
    Reason.ERROR_REASON_IDENTITY_TAKEN: "sign in with that identity",
    Reason.ERROR_REASON_UPLOAD_INVALID: "genmesh uploads put",
}


@pytest.mark.parametrize("reason", ADVICE)
def test_every_refusal_says_what_to_do(genmesh: Callable[..., Result], fake: FakeEdge, reason: "Reason.ValueType") -> None:
    fake.token_refusals.extend([MeshError(grpc.StatusCode.FAILED_PRECONDITION, reason, "no")])
    result = genmesh("whoami", GENMESH_API_KEY=SECRET)
    assert result.exit_code == ExitCode.FAILED
    assert ADVICE[reason] in result.stderr


@pytest.mark.parametrize(("retry_after_s", "says"), [(75.2, "in 1 min 15 s"), (0.2, "in 1 s"), (None, "in a moment")])
def test_a_limit_says_how_long_to_wait(genmesh: Callable[..., Result], fake: FakeEdge, retry_after_s: float | None, says: str) -> None:
    code, reason = grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.ERROR_REASON_LIMIT_REACHED
    fake.token_refusals.append(MeshError(code, reason, "too many", retry_after_s=retry_after_s))
    result = genmesh("whoami", GENMESH_API_KEY=SECRET)
    assert result.exit_code == ExitCode.LIMITED
    assert f"try again {says}" in result.stderr


# Tokens that stop working


@pytest.fixture
def naps() -> list[float]:
    return []


@pytest.fixture
def edge(fake: FakeEdge, naps: list[float]) -> Generator[Edge]:
    with Edge(fake.url, store=SessionMemory(), credentials=(EMAIL, PASSWORD), sleep=naps.append) as client:
        yield client


@pytest.fixture
def keyed(fake: FakeEdge) -> Generator[Edge]:
    with Edge(fake.url, store=SessionMemory(), api_key=SECRET, sleep=lambda _: None) as client:
        yield client


def whoami(client: Edge) -> str:
    return client.call(client.identity.GetMe, identity_pb2.GetMeRequest()).user.email


def test_a_revoked_token_is_changed_for_another(fake: FakeEdge, edge: Edge, naps: list[float]) -> None:
    fake.token_refusals.append(REVOKED)
    assert whoami(edge) == EMAIL
    assert (fake.refreshes, naps) == (1, [])


def test_a_token_of_the_second_of_the_revocation_is_changed_once_more(fake: FakeEdge, edge: Edge, naps: list[float]) -> None:
    fake.token_refusals.extend([REVOKED, REVOKED])
    assert whoami(edge) == EMAIL
    assert (fake.refreshes, naps) == (2, [1.0])


@pytest.mark.parametrize(("refusal", "refreshes"), [(REVOKED, 2), (EXPIRED, 1)])
def test_a_token_that_stays_refused_ends_the_call(fake: FakeEdge, edge: Edge, refusal: MeshError, refreshes: int) -> None:
    fake.token_refusals.extend([refusal] * 10)
    with pytest.raises(grpc.RpcError) as raised:
        whoami(edge)
    assert reason_of(raised.value) == Reason.Name(refusal.reason)
    assert fake.refreshes == refreshes


def test_a_refusal_that_no_token_mends_is_not_repeated(fake: FakeEdge, edge: Edge) -> None:
    fake.refusals.append(unauthenticated(Reason.ERROR_REASON_ID_TOKEN_INVALID, "the code does not verify"))
    with pytest.raises(grpc.RpcError):
        edge.call(edge.identity.LinkIdentity, identity_pb2.LinkIdentityRequest(google_code=identity_pb2.AuthorizationCode(code="x")))
    assert (len(fake.codes), fake.refreshes) == (1, 0)


def test_a_session_that_was_ended_says_so(signed_in: Callable[..., Result], fake: FakeEdge, session_path: Path) -> None:
    fake.token_refusals.append(REVOKED)
    fake.refresh_token = "gone"
    result = signed_in("whoami")
    assert result.exit_code == ExitCode.DENIED
    assert "genmesh login" in result.stderr
    assert not session_path.exists()


def done(sequence: int) -> jobs_pb2.WatchJobsResponse:
    job = jobs_pb2.Job(job_id=JOB_ID, state=jobs_pb2.STATE_COMPLETED)
    return event(sequence, state_change=jobs_pb2.StateChange(state=jobs_pb2.STATE_COMPLETED, job=job))


def test_a_watch_goes_on_after_its_token_was_revoked(fake: FakeEdge, edge: Edge) -> None:
    fake.connections.extend([[event(1, progress=jobs_pb2.Progress(percent=5)), REVOKED], [done(2)]])
    assert [response.event.sequence for response in edge.watch([JOB_ID])] == [1, 2]
    assert [request.resume_token for request in fake.watched] == ["", "t1"]
    assert fake.refreshes == 1


def test_a_watch_with_a_key_goes_on_after_its_token_expired(fake: FakeEdge, keyed: Edge) -> None:
    fake.connections.extend([[event(1, progress=jobs_pb2.Progress(percent=5)), EXPIRED], [done(2)]])
    assert [response.event.sequence for response in keyed.watch([JOB_ID])] == [1, 2]
    assert (fake.tokens, [request.resume_token for request in fake.watched]) == (0, ["", "t1"])


def test_a_watch_with_a_revoked_key_ends(fake: FakeEdge, keyed: Edge) -> None:
    fake.connections.append([event(1, progress=jobs_pb2.Progress(percent=5)), REVOKED])
    responses = keyed.watch([JOB_ID])
    next(responses)
    fake.secrets.clear()
    with pytest.raises(grpc.RpcError) as raised:
        next(responses)
    assert reason_of(raised.value) == "ERROR_REASON_API_KEY_INVALID"
    assert len(fake.watched) == 1


# Signing out


def test_signing_out_ends_the_session_of_the_token(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    assert signed_in("logout").exit_code == 0
    assert fake.signed_out == [("", "access-1")]


def test_an_expired_token_is_changed_for_a_last_one_to_sign_out(
    signed_in: Callable[..., Result], fake: FakeEdge, session_path: Path
) -> None:
    fake.valid.clear()
    assert signed_in("logout").exit_code == 0
    assert fake.signed_out == [("", "access-2")]
    assert not session_path.exists()


def test_signing_out_of_an_ended_session_forgets_it(signed_in: Callable[..., Result], fake: FakeEdge, session_path: Path) -> None:
    fake.valid.clear()
    fake.refresh_token = "gone"
    result = signed_in("logout")
    assert (result.exit_code, result.stderr) == (0, "signed out\n")
    assert not fake.signed_out
    assert not session_path.exists()


def test_the_login_of_another_edge_is_forgotten_without_telling_its_tokens(
    signed_in: Callable[..., Result], fake: FakeEdge, session_path: Path
) -> None:
    SessionFile(session_path).save(Session("http://127.0.0.1:1", USER_ID, EMAIL, "secret", "secret", 1e12))
    assert signed_in("logout").exit_code == 0
    assert not fake.signed_out


# Google


def google_of(*redirect_uris: str, endpoint: str = "https://accounts.example.com/auth?hd=example.com") -> identity_pb2.GoogleSignIn:
    return identity_pb2.GoogleSignIn(client_id="client", authorization_endpoint=endpoint, scope="openid email", redirect_uris=redirect_uris)


ANY_PORT = "http://127.0.0.1/callback"


def fetched(url: str) -> tuple[int, str]:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=WAIT_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


class Browser:
    """Goes where it is sent, and comes back with an answer, from a thread of its own as a browser does."""

    def __init__(self, *answers: dict[str, str]) -> None:
        self.answers = answers
        self.url = ""
        self.seen: list[tuple[int, str]] = []
        self.thread = threading.Thread(target=self._come_back)

    def go(self, url: str) -> None:
        self.url = url
        self.thread.start()

    @property
    def asked(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.url).query))

    def _come_back(self) -> None:
        for answer in self.answers:
            values = {"state": self.asked["state"]} | answer
            self.seen.append(fetched(f"{self.asked['redirect_uri']}?{urlencode(values)}"))


def test_the_browser_brings_a_code_back() -> None:
    browser = Browser({"code": "c0de"})
    code = sign_in_code(google_of(ANY_PORT), browser.go, wait_s=WAIT_S)
    browser.thread.join()
    asked = browser.asked
    assert urlsplit(browser.url)._replace(query="").geturl() == "https://accounts.example.com/auth"
    assert (asked["hd"], asked["client_id"], asked["scope"], asked["response_type"]) == ("example.com", "client", "openid email", "code")
    assert urlsplit(asked["redirect_uri"]).hostname == "127.0.0.1"
    assert urlsplit(asked["redirect_uri"]).path == "/callback"
    challenge = base64.urlsafe_b64encode(hashlib.sha256(code.code_verifier.encode()).digest()).rstrip(b"=").decode()
    assert (asked["code_challenge"], asked["code_challenge_method"]) == (challenge, "S256")
    assert (code.code, code.redirect_uri, code.nonce) == ("c0de", asked["redirect_uri"], asked["nonce"])
    assert 43 <= len(code.code_verifier) <= 128
    assert len({asked["state"], asked["nonce"], code.code_verifier}) == 3
    [(status, page)] = browser.seen
    assert status == 200
    assert "c0de" not in page
    with pytest.raises(ConnectionRefusedError):  # nobody listens any more
        socket.create_connection(("127.0.0.1", urlsplit(asked["redirect_uri"]).port or 0), 1)


def test_what_does_not_know_the_state_ends_nothing() -> None:
    browser = Browser(
        {"code": "forged", "state": "guess"}, {"code": "forged", "state": ""}, {"error": "denied", "state": "x"}, {"code": "c"}
    )
    assert sign_in_code(google_of(ANY_PORT), browser.go, wait_s=WAIT_S).code == "c"
    browser.thread.join()
    assert [status for status, _ in browser.seen] == [400, 400, 400, 200]


def test_other_paths_are_nothing() -> None:
    statuses: list[int] = []

    def present(url: str) -> None:
        asked = parse_qs(urlsplit(url).query)
        [uri], [state] = asked["redirect_uri"], asked["state"]
        statuses.extend(fetched(f"{one}?{urlencode({'state': state, 'code': 'c'})}")[0] for one in (uri + "/x", uri))

    assert sign_in_code(google_of(ANY_PORT), present, wait_s=WAIT_S).code == "c"
    assert statuses == [404, 200]


@pytest.mark.parametrize(
    ("answer", "says"),
    [({"error": "access_denied"}, "access_denied"), ({"error": "x", "error_description": "no\x1b[2J"}, "no"), ({}, "no code")],
)
def test_who_refuses_is_told_so(answer: dict[str, str], says: str) -> None:
    browser = Browser(answer)
    with pytest.raises(CommandError) as raised:
        sign_in_code(google_of(ANY_PORT), browser.go, wait_s=WAIT_S)
    browser.thread.join()
    assert raised.value.code == ExitCode.DENIED
    assert says in raised.value.message


def test_waiting_for_the_browser_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.browser.POLL_S", 0.01)
    with pytest.raises(CommandError) as raised:
        sign_in_code(google_of(ANY_PORT), lambda _: None, wait_s=0.02)
    assert raised.value.code == ExitCode.UNAVAILABLE


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://accounts.example.com/auth",
        "file://localhost/etc/passwd",
        "javascript://localhost/%0aalert(1)",
        "ftp://127.0.0.1/auth",
        "//localhost/auth",
        "https:///auth",
        "",
    ],
)
def test_the_browser_is_sent_to_no_unsafe_address(endpoint: str) -> None:
    with pytest.raises(CommandError) as raised:
        sign_in_code(google_of(ANY_PORT, endpoint=endpoint), lambda _: pytest.fail("sent"), wait_s=0.0)
    assert "safe address" in raised.value.message


def test_a_listed_port_is_used() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        google = google_of("https://console.example.com/back", f"http://localhost:{port}/back")
        with pytest.raises(CommandError) as raised:
            sign_in_code(google, lambda _: None)
        assert str(port) in raised.value.message
    browser = Browser({"code": "c"})
    assert sign_in_code(google, browser.go, wait_s=WAIT_S).redirect_uri == f"http://localhost:{port}/back"
    browser.thread.join()


@pytest.mark.parametrize(
    "google",
    [
        google_of("https://console.example.com/back"),
        google_of("http://localhost/callback"),  # any port is for the address only
        google_of(),
        google_of(ANY_PORT, endpoint="http://accounts.example.com/auth"),
        google_of(ANY_PORT, endpoint="javascript:alert(1)"),
    ],
)
def test_without_a_redirect_or_a_safe_address_nothing_begins(google: identity_pb2.GoogleSignIn) -> None:
    presented: list[str] = []
    with pytest.raises(CommandError):
        sign_in_code(google, presented.append)
    assert not presented


def come_back(errors: "object", code: str) -> None:
    """Read the address from what the command printed, and be the browser."""
    assert hasattr(errors, "readline")
    for line in iter(errors.readline, ""):  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType, reportUnknownArgumentType, reportUnknownMemberType]
        if str(line).startswith("https://"):
            asked = dict(parse_qsl(urlsplit(str(line).strip()).query))
            assert fetched(f"{asked['redirect_uri']}?{urlencode({'state': asked['state'], 'code': code})}")[0] == 200
            return
    raise AssertionError("no address was printed")


def test_login_with_google_is_stored(fake: FakeEdge, environment: dict[str, str | None], session_path: Path) -> None:
    fake.sign_in_options.google.CopyFrom(google_of(ANY_PORT))
    with spawned(environment, "login", "--google", "--no-browser", "--json") as process:
        come_back(process.stderr, "c0de")
        out, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, errors
    assert json.loads(out)["email"] == EMAIL
    assert [code.code for code in fake.codes] == ["c0de"]
    assert json.loads(session_path.read_text())["refresh_token"] == fake.refresh_token


@pytest.fixture
def at_google(fake: FakeEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody comes back from Google with a code."""
    fake.sign_in_options.google.CopyFrom(google_of(ANY_PORT))
    monkeypatch.setattr("cli.browser.sign_in_code", lambda *_: identity_pb2.AuthorizationCode(code="c"))


@pytest.mark.usefixtures("at_google")
def test_an_address_that_is_taken_is_linked(genmesh: Callable[..., Result], fake: FakeEdge) -> None:
    fake.refusals.append(MeshError(grpc.StatusCode.ALREADY_EXISTS, Reason.ERROR_REASON_EMAIL_TAKEN, "the address is taken"))
    result = genmesh("login", "--google")
    assert result.exit_code == ExitCode.FAILED
    assert "genmesh link google" in result.stderr
    assert genmesh("login", "--email", EMAIL, "--password-stdin", stdin=PASSWORD).exit_code == 0
    assert genmesh("link", "google").exit_code == 0
    assert len(fake.codes) == 2


@pytest.mark.usefixtures("at_google")
def test_a_code_is_sent_once(genmesh: Callable[..., Result], fake: FakeEdge) -> None:
    fake.refusals.append(MeshError(grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_UNAVAILABLE, "restarting"))
    assert genmesh("login", "--google").exit_code == ExitCode.UNAVAILABLE
    assert len(fake.codes) == 1


def test_where_google_is_not_offered(genmesh: Callable[..., Result]) -> None:
    result = genmesh("login", "--google")
    assert result.exit_code == ExitCode.FAILED
    assert "does not offer" in result.stderr


@pytest.mark.usefixtures("at_google")
def test_an_old_session_is_told_to_sign_in_again(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.identities.append(identity_pb2.LinkedIdentity(identity_id=IDENTITY_ID, issuer=ISSUER))
    for command in (["link", "google"], ["identities", "unlink", IDENTITY_ID]):
        fake.refusals.append(permission_denied("sign in again and do it soon after"))
        result = signed_in(*command)
        assert result.exit_code == ExitCode.DENIED
        assert "sign in again with `genmesh login`" in result.stderr
    assert fake.identities


# Linked identities


def test_linked_identities_are_listed(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    nothing = signed_in("identities", "list")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "genmesh link google" in nothing.stderr
    for issuer in (ISSUER, "https://securetoken.google.com/x"):
        fake.identities.append(identity_pb2.LinkedIdentity(identity_id=IDENTITY_ID, issuer=issuer))
    rows = [line.split("\t") for line in signed_in("identities", "list").stdout.splitlines()]
    assert [row[:2] for row in rows] == [[IDENTITY_ID, ISSUER], [IDENTITY_ID, "https://securetoken.google.com/x"]]
    lines = [json.loads(line) for line in signed_in("identities", "list", "--json").stdout.splitlines()]
    assert [line["issuer"] for line in lines] == [ISSUER, "https://securetoken.google.com/x"]


@pytest.mark.parametrize("named", [IDENTITY_ID, IDENTITY_ID.upper(), ISSUER])
def test_an_identity_is_unlinked_by_id_or_provider(signed_in: Callable[..., Result], fake: FakeEdge, named: str) -> None:
    other = identity_pb2.LinkedIdentity(identity_id=USER_ID, issuer="https://securetoken.google.com/x")
    fake.identities = [other, identity_pb2.LinkedIdentity(identity_id=IDENTITY_ID, issuer=ISSUER)]
    result = signed_in("identities", "unlink", named)
    assert (result.exit_code, result.stdout) == (0, f"unlinked {IDENTITY_ID} ({ISSUER})\n"), result.stderr
    assert fake.unlink_asked == [IDENTITY_ID]
    assert fake.identities == [other]


@pytest.mark.parametrize("named", [USER_ID, "https://accounts.example.com"])
def test_what_is_not_linked_cannot_be_unlinked(signed_in: Callable[..., Result], fake: FakeEdge, named: str) -> None:
    fake.identities.append(identity_pb2.LinkedIdentity(identity_id=IDENTITY_ID, issuer=ISSUER))
    result = signed_in("identities", "unlink", named)
    assert result.exit_code == ExitCode.NOT_FOUND
    assert "genmesh identities list" in result.stderr
    assert not fake.unlink_asked


def test_the_last_way_to_sign_in_stays(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.identities.append(identity_pb2.LinkedIdentity(identity_id=IDENTITY_ID, issuer=ISSUER))
    fake.refusals.append(precondition(Reason.ERROR_REASON_LAST_IDENTITY, "the only way left to sign in"))
    result = signed_in("identities", "unlink", IDENTITY_ID, "--json")
    assert (result.exit_code, result.stdout) == (ExitCode.FAILED, "")
    status = json.loads(result.stderr)
    assert (status["code"], status["details"][0]["reason"]) == (9, "ERROR_REASON_LAST_IDENTITY")
    assert "genmesh link" in status["details"][1]["message"]


def test_unlinking_is_not_repeated(signed_in: Callable[..., Result], fake: FakeEdge) -> None:
    fake.identities.append(identity_pb2.LinkedIdentity(identity_id=IDENTITY_ID, issuer=ISSUER))
    fake.refusals.append(MeshError(grpc.StatusCode.UNAVAILABLE, Reason.ERROR_REASON_UNAVAILABLE, "restarting"))
    assert signed_in("identities", "unlink", IDENTITY_ID).exit_code == ExitCode.UNAVAILABLE
    assert fake.unlink_asked == [IDENTITY_ID]


# What is typed


@pytest.mark.parametrize(("text", "seconds"), [("90m", 5400), ("12H", 43_200), (" 2d ", 172_800), ("1w", 604_800)])
def test_spans_are_from_now(text: str, seconds: int) -> None:
    for ago, sign in ((False, 1), (True, -1)):
        assert parse_from_now(text, ago=ago).seconds == pytest.approx(time.time() + sign * seconds, abs=60)
    assert parse_from_now("2026-07-01").seconds == 1_782_864_000
