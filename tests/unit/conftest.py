"""The command line against an edge in this process."""

import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from cli.main import app
from genmesh.credits.v1 import credits_pb2_grpc, payments_pb2_grpc
from genmesh.identity.v1 import identity_pb2_grpc
from genmesh.jobs.v1 import jobs_pb2_grpc
from tests.unit.fake_edge import EMAIL, PASSWORD, FakeEdge


@pytest.fixture
def fake() -> Generator[FakeEdge]:
    edge = FakeEdge()  # pyright: ignore[reportAbstractUsage]  # what it lacks answers UNIMPLEMENTED
    with ThreadPoolExecutor(16) as pool:
        server = grpc.server(pool)
        identity_pb2_grpc.add_IdentityServiceServicer_to_server(edge, server)
        identity_pb2_grpc.add_IdentityAdminServiceServicer_to_server(edge, server)
        jobs_pb2_grpc.add_JobsServiceServicer_to_server(edge, server)
        jobs_pb2_grpc.add_JobsAdminServiceServicer_to_server(edge, server)
        credits_pb2_grpc.add_CreditsServiceServicer_to_server(edge, server)
        payments_pb2_grpc.add_PaymentsServiceServicer_to_server(edge, server)
        credits_pb2_grpc.add_LedgerAdminServiceServicer_to_server(edge, server)
        edge.url = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield edge
        finally:
            edge.cancelled.set()  # lets a handler that still waits go
            server.stop(None).wait()


@pytest.fixture
def session_path(tmp_path: Path) -> Path:
    return tmp_path / "config" / "session.json"


@pytest.fixture
def environment(fake: FakeEdge, session_path: Path) -> dict[str, str | None]:
    ours: dict[str, str | None] = {name: None for name in os.environ if name.startswith("GENMESH_")}
    return ours | {"GENMESH_EDGE_URL": fake.url, "GENMESH_SESSION_FILE": str(session_path)}


@pytest.fixture
def genmesh(environment: dict[str, str | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, stdin: str = "", **more: str) -> Result:
        return CliRunner().invoke(app, arguments, input=stdin, env=environment | more)

    return run


@pytest.fixture
def signed_in(genmesh: Callable[..., Result]) -> Callable[..., Result]:
    result = genmesh("login", "--email", EMAIL, "--password-stdin", stdin=f"{PASSWORD}\n")
    assert result.exit_code == 0, result.output
    return genmesh
