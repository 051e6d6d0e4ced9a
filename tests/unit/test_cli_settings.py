"""Where the command line looks for its edge."""

import json
from pathlib import Path

import pytest

from cli.settings import ClientSettings


@pytest.mark.parametrize(("values", "edge"), [({}, "http://127.0.0.1:8080"), ({"edge_port": 9090}, "http://127.0.0.1:9090")])
def test_the_port_names_the_edge(tmp_path: Path, values: dict[str, int], edge: str):
    (tmp_path / "stack.json").write_text(json.dumps({"edge": {"url": "http://127.0.0.1:31204"}}))
    assert ClientSettings.model_validate({"state_dir": tmp_path, **values}).default_edge == edge


def test_a_stack_that_chose_its_port_says_where_it_is(tmp_path: Path):
    settings = ClientSettings.model_validate({"state_dir": tmp_path, "edge_port": 0})
    assert settings.default_edge == "http://127.0.0.1:8080"
    (tmp_path / "stack.json").write_text(json.dumps({"edge": {"url": "http://127.0.0.1:31204"}}))
    assert settings.default_edge == "http://127.0.0.1:31204"
