"""`python -m inference_service serve` as its supervisor sees it: exit codes, memory, orphans."""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

Start = Callable[[dict[str, str]], Awaitable[Process]]


@pytest_asyncio.fixture
async def start(environment: dict[str, str]) -> AsyncIterator[Start]:
    started: list[Process] = []

    async def run(changes: dict[str, str]) -> Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "inference_service", "serve", env={**os.environ, **environment, **changes}, stderr=PIPE
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until_logged(process: Process, wanted: str) -> dict[str, Any]:
    assert process.stderr is not None
    async for line in process.stderr:
        entry: dict[str, Any] = json.loads(line)
        if entry["event"] == wanted:
            return entry
    raise AssertionError(f"the process ended without saying {wanted}")


async def test_serves_with_a_small_parent_and_ends_with_zero(start: Start) -> None:
    process = await start({})
    model = psutil.Process((await until_logged(process, "model_process.ready"))["pid"])
    parent = psutil.Process(process.pid)
    assert not any("torch" in entry.path for entry in parent.memory_maps())
    assert any("torch" in entry.path for entry in model.memory_maps())
    process.send_signal(signal.SIGTERM)
    _, errors = await process.communicate()
    assert process.returncode == 0, errors
    assert not model.is_running()


async def test_model_process_does_not_outlive_its_server(start: Start) -> None:
    process = await start({})
    model = psutil.Process((await until_logged(process, "model_process.ready"))["pid"])
    process.kill()
    await asyncio.to_thread(model.wait, 30)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("models: [", "is not YAML"),
        ("models: []", "models: "),
        ("models: [{id: x}]", "models.0.path: "),
        (None, "No such file"),
    ],
)
async def test_wrong_catalogue_is_a_settings_error(start: Start, tmp_path: Path, content: str | None, told: str) -> None:
    file = tmp_path / "catalogue.yaml"
    if content is not None:
        file.write_text(content)
    process = await start({"GENMESH_MODELS_FILE": str(file)})
    _, errors = await process.communicate()
    assert process.returncode == 78
    assert errors.decode().startswith("GENMESH_MODELS_FILE: ")
    assert told in errors.decode()


async def test_wrong_setting_names_its_variable(start: Start) -> None:
    process = await start({"GENMESH_TORCH_THREADS": "none"})
    _, errors = await process.communicate()
    assert process.returncode == 78
    assert errors.decode().startswith("GENMESH_TORCH_THREADS: ")
