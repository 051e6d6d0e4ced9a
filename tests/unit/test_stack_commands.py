"""`genmesh status` and `genmesh down` on what a stack has published, without starting one."""

import json
import os
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.stack.mesh import NAMES, Mesh, migration_digests
from cli.stack.ports import PortBlock
from cli.stack.process import Health, ProcessStatus
from cli.stack.state import StateDirectory


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateDirectory:
    monkeypatch.setenv("GENMESH_STATE_DIR", str(tmp_path))
    return StateDirectory(tmp_path)


def publish(state: StateDirectory, **fields: Any) -> None:
    """Publish one process, which is this one unless said otherwise."""
    own = psutil.Process()
    status = ProcessStatus("gateway", "gateway", "serve", "127.0.0.1:1", pid=own.pid, created_at=own.create_time())
    status.health, status.started_at = Health.HEALTHY, own.create_time()
    state.publish(
        {"state_dir": str(state.path), "edge": {"url": "http://e", "tls_url": "https://e"}, "processes": [status.to_json() | fields]}
    )


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_nothing_runs(state: StateDirectory) -> None:
    assert run("status") == (3, f"nothing is running on {state.path}\n")
    code, output = run("status", "--json")
    assert code == 3
    assert output.count("\n") == 1
    assert json.loads(output) == {"running": False, "state_dir": str(state.path), "processes": []}
    assert run("down") == (0, f"nothing is running on {state.path}\n")


def test_all_healthy(state: StateDirectory) -> None:
    publish(state)
    with state.held():
        code, output = run("status", "--json")
        assert code == 0
        assert output.count("\n") == 1
        described = json.loads(output)
        assert described["pid"] == os.getpid()
        (process,) = described["processes"]
        assert {"name", "role", "pid", "address", "health", "metrics_address", "restarts", "uptime_s"} <= process.keys()
        assert run("status")[0] == 0


@pytest.mark.parametrize(("fields", "health"), [({"health": "unhealthy"}, "unhealthy"), ({"created_at": 1.0}, "dead")])
def test_something_is_not_well(state: StateDirectory, fields: dict[str, Any], health: str) -> None:
    publish(state, **fields)
    with state.held():
        code, output = run("status", "--json")
        assert code == 1
        assert json.loads(output)["processes"][0]["health"] == health


def test_a_wrong_setting_names_its_variable(state: StateDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENMESH_REPLICAS_INFERENCE", "many")
    code, output = run("up")
    assert code == 78
    assert "GENMESH_REPLICAS_INFERENCE" in output


def mesh(**fields: Any) -> Mesh:
    known: dict[str, Any] = {
        "ports": PortBlock(20_000), "certificates_dir": Path("/c"), "signing_keys_dir": Path("/k"), "environment": {},
        "database_urls": dict.fromkeys(NAMES.values(), "postgresql+asyncpg://"), "redis_url": "redis://", "s3": {},
        "admin_email": "a@b.c", "admin_password": "given", "replicas_inference": 2, "torch_threads": 1, "drain_s": 1.0,
    }  # fmt: skip
    return Mesh(**known | fields)


def test_each_replica_has_a_dispatcher_with_its_own_worker_id() -> None:
    specs = {spec.name: spec for spec in mesh().specs()}
    for index in range(2):
        dispatch = specs[f"dispatch-{index}"]
        assert dispatch.env["GENMESH_INFERENCE_ADDRESS"] == specs[f"inference-{index}"].address
        assert dispatch.env["GENMESH_WORKER_ID"] == f"dispatch-{index}"
    addresses = [spec.address for spec in specs.values() if spec.address] + [s.metrics_address for s in specs.values() if s.metrics_address]
    assert len(addresses) == len(set(addresses))


def test_the_administrators_password_is_the_gateways_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENMESH_ADMIN_PASSWORD", "from outside")
    told = {spec.name: spec.env.get("GENMESH_ADMIN_PASSWORD") for spec in mesh().specs()}
    assert {name: password for name, password in told.items() if password} == {"gateway": "given"}


def test_what_is_chosen_overrides_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENMESH_LEASE_SECONDS", "7")
    monkeypatch.setenv("GENMESH_LISTEN_ADDRESS", "0.0.0.0:1")
    (jobs,) = (spec for spec in mesh(environment={"GENMESH_DISPATCH_SLOTS": "3"}).specs() if spec.name == "jobs")
    assert jobs.env["GENMESH_LEASE_SECONDS"] == "7"
    assert jobs.env["GENMESH_DISPATCH_SLOTS"] == "3"
    assert jobs.env["GENMESH_LISTEN_ADDRESS"] == jobs.address


def test_known_schemas_are_not_migrated_again() -> None:
    names = {spec.name for spec in mesh(migrated={"gateway", "jobs_service"}).specs()}
    assert {name for name in names if name.startswith("migrate")} == {"migrate-credits"}
    for spec in mesh(migrated=set(NAMES.values())).specs():
        assert not any(name.startswith("migrate") for name in spec.after)
    assert set(migration_digests()) == set(NAMES.values())
