"""The embedded stack without starting it: what its processes are told, new certificates and signing keys."""

from pathlib import Path

import pytest
from cryptography.x509 import load_pem_x509_certificate
from typer.testing import CliRunner, Result

from cli.failures import ExitCode
from cli.main import app
from cli.stack import certificates
from cli.stack.mesh import NAMES, SECRETS, Mesh
from cli.stack.ports import PortBlock
from cli.stack.state import StateDirectory


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateDirectory:
    monkeypatch.setenv("GENMESH_STATE_DIR", str(tmp_path))
    return StateDirectory(tmp_path)


def genmesh(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def mesh(**environment: str) -> Mesh:
    return Mesh(
        ports=PortBlock(20_000),
        certificates_dir=Path("/c"),
        signing_keys_dir=Path("/k"),
        environment=environment,
        database_urls=dict.fromkeys(NAMES.values(), "postgresql+asyncpg://"),
        redis_url="redis://",
        s3={},
        admin_email="a@b.c",
        admin_password="given",
        replicas_inference=1,
        torch_threads=1,
        drain_s=1.0,
    )


def test_every_server_asks_the_gateway_and_the_gateway_has_what_it_needs() -> None:
    specs = {spec.name: spec for spec in mesh().specs()}
    gateway = specs["gateway"]
    servers = [spec for spec in specs.values() if spec.role == "serve"]
    assert {spec.name for spec in servers} == {"gateway", "credits", "jobs", "inference-0"}
    assert {spec.env["GENMESH_GATEWAY_ADDRESS"] for spec in servers} == {gateway.address}
    assert gateway.env["GENMESH_REDIS_URL"] == "redis://"
    assert gateway.env["GENMESH_CREDITS_ADDRESS"] == specs["credits"].address
    assert "redis" in gateway.after


def test_a_secret_is_told_to_who_needs_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "from outside")
    told = {(spec.name, name) for spec in mesh(GENMESH_STRIPE_SECRET_KEY="given").specs() for name in SECRETS if name in spec.env}
    assert told == {
        ("gateway", "GENMESH_ADMIN_PASSWORD"),
        ("gateway", "GENMESH_GOOGLE_CLIENT_SECRET"),
        ("credits", "GENMESH_STRIPE_SECRET_KEY"),
        ("credits", "GENMESH_STRIPE_WEBHOOK_SECRET"),
    }


@pytest.mark.parametrize("group", ["certificates", "signing-keys"])
def test_where_no_stack_was_started_nothing_is_made(state: StateDirectory, group: str) -> None:
    result = genmesh(group, "rotate")
    assert result.exit_code == ExitCode.NOT_FOUND
    assert str(state.path) in result.stderr
    assert not list(state.path.iterdir())


def serials(state: StateDirectory) -> dict[str, int]:
    files = (state.path / "certificates").glob("*.crt")
    return {file.stem: load_pem_x509_certificate(file.read_bytes()).serial_number for file in files}


@pytest.mark.parametrize("new_authority", [False, True])
def test_every_certificate_is_made_anew(state: StateDirectory, monkeypatch: pytest.MonkeyPatch, new_authority: bool) -> None:
    certificates.ensure_certificates(state.directory("certificates"), state.directory("authority"))
    before = serials(state)
    naps: list[float] = []
    monkeypatch.setattr("cli.stack.certificates.time.sleep", naps.append)
    result = genmesh("certificates", "rotate", *(["--new-authority"] if new_authority else []))
    assert result.exit_code == 0, result.output
    kept = {name for name, serial in serials(state).items() if before[name] == serial}
    assert kept == (set() if new_authority else {"ca"})
    assert ("ca" in result.stdout) is new_authority
    assert bool(naps) is new_authority
    assert "gateway" in result.stdout


def test_a_rotation_at_a_time(state: StateDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates.ensure_certificates(state.directory("certificates"), state.directory("authority"))

    def busy(*_: object) -> list[str]:
        raise TimeoutError

    monkeypatch.setattr("cli.stack.certificates.rotate", busy)
    result = genmesh("certificates", "rotate")
    assert (result.exit_code, "another rotation" in result.stderr) == (ExitCode.UNAVAILABLE, True)


def test_a_new_signing_key_stands_beside_the_old_one(state: StateDirectory) -> None:
    keys = state.directory("keys")
    assert genmesh("signing-keys", "rotate").exit_code == 0  # makes the first, too
    before = set(keys.glob("*.pem"))
    result = genmesh("signing-keys", "rotate")
    assert result.exit_code == 0, result.output
    assert "signs in" in result.stdout
    assert set(keys.glob("*.pem")) > before


def test_a_damaged_signing_key_is_told(state: StateDirectory) -> None:
    (state.directory("keys") / "a.pem").write_text("nonsense")
    result = genmesh("signing-keys", "rotate")
    assert result.exit_code == ExitCode.FAILED
    assert "could not be made" in result.stderr
