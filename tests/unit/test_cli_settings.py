"""Where the command line looks for its edge, and whether it is the right one."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import grpc
import pytest

from cli.client import Edge
from cli.failures import CommandError, code_of
from cli.session import Session, SessionFile, SessionMemory
from cli.settings import ClientSettings
from cli.stack.certificates import ensure_certificates
from genmesh.identity.v1 import identity_pb2


@pytest.mark.parametrize(("values", "edge"), [({}, "http://127.0.0.1:8080"), ({"edge_port": 9090}, "http://127.0.0.1:9090")])
def test_the_port_names_the_edge(tmp_path: Path, values: dict[str, int], edge: str):
    (tmp_path / "stack.json").write_text(json.dumps({"edge": {"url": "http://127.0.0.1:31204"}}))
    assert ClientSettings.model_validate({"state_dir": tmp_path, **values}).default_edge == edge


def test_a_stack_that_chose_its_port_says_where_it_is(tmp_path: Path):
    settings = ClientSettings.model_validate({"state_dir": tmp_path, "edge_port": 0})
    assert settings.default_edge == "http://127.0.0.1:8080"
    (tmp_path / "stack.json").write_text(json.dumps({"edge": {"url": "http://127.0.0.1:31204"}}))
    assert settings.default_edge == "http://127.0.0.1:31204"


def test_a_login_comes_before_the_port_of_a_stack(tmp_path: Path):
    session = tmp_path / "session.json"
    SessionFile(session).save(Session("https://localhost:18443", "u", "ann@example.com", "access", "refresh", 0.0))
    settings = ClientSettings.model_validate({"state_dir": tmp_path, "session_file": session, "edge_port": 9090})
    with Edge.of(settings) as edge:
        assert edge.url == "https://localhost:18443"


def test_a_certificate_of_an_unknown_authority_is_told_at_once(tmp_path: Path):
    certificates, authority, other = tmp_path / "certificates", tmp_path / "authority", tmp_path / "other"
    for directory in (certificates, authority, other):
        directory.mkdir()
    ensure_certificates(certificates, authority)
    ensure_certificates(other, tmp_path / "other")
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool)
        pair = ((certificates / "edge.key").read_bytes(), (certificates / "edge.crt").read_bytes())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        server.start()
        try:
            for ca_file, said in ((other / "ca.crt", "is not trusted"), (certificates / "ca.crt", "")):
                waits: list[float] = []
                edge = Edge(f"https://localhost:{port}", store=SessionMemory(), ca_file=ca_file, sleep=waits.append)
                with edge, pytest.raises((CommandError, grpc.RpcError)) as refused:
                    edge.call(edge.identity.GetSignInOptions, identity_pb2.GetSignInOptionsRequest(), signed_in=False)
                if said:
                    assert isinstance(refused.value, CommandError)
                    assert said in refused.value.message
                    assert "GENMESH_EDGE_CA_FILE" in refused.value.advice
                else:
                    assert code_of(cast("grpc.RpcError", refused.value)) is grpc.StatusCode.UNIMPLEMENTED
                assert waits == []
        finally:
            server.stop(None).wait()
