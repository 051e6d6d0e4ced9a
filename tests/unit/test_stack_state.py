"""The state directory: one holder, secrets that stay, files that are whole or not there, leftovers that are ended."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cli.stack import StackError
from cli.stack.logs import LogFile
from cli.stack.state import StateDirectory, is_alive


def test_a_second_holder_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "state")
    assert state.holder() is None
    with state.held():
        assert state.holder() == os.getpid()
        with pytest.raises(StackError, match=str(os.getpid())), StateDirectory(tmp_path / "state").held():
            pass
    assert state.holder() is None


def test_a_holder_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    script = "import sys, time; from pathlib import Path; from cli.stack.state import StateDirectory\n"
    script += "with StateDirectory(Path(sys.argv[1])).held(): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        state = StateDirectory(tmp_path)
        assert state.holder() == holder.pid
        holder.kill()
        holder.wait()
        assert state.holder() is None


def test_secrets_stay_and_are_for_the_owner_only(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    made = state.secrets()
    assert len(set(made.model_dump().values())) == len(made.model_dump())
    assert StateDirectory(tmp_path).secrets() == made
    assert stat.S_IMODE(state.secrets_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.directory("keys").stat().st_mode) == 0o700


def test_damaged_files_are_named(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    state.secrets_file.write_text("{")
    with pytest.raises(StackError, match=r"secrets\.json is damaged"):
        state.secrets()
    (tmp_path / "stack.json").write_text("{")
    with pytest.raises(StackError, match=r"stack\.json is damaged"):
        state.published()


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = StateDirectory(tmp_path)
    state.publish({"generation": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        state.publish({"generation": 2})
    assert state.published() == {"generation": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["stack.json"]


def test_leftovers_are_ended_but_not_those_whose_pid_is_anothers(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True) as child:
        created_at = psutil.Process(child.pid).create_time()
        entry = {"name": "child", "pid": child.pid, "created_at": created_at}
        assert is_alive(entry)
        state.publish({"processes": [{**entry, "created_at": created_at - 60}]})
        assert state.end_leftovers() == []
        assert child.poll() is None
        state.publish({"processes": [entry]})
        assert state.end_leftovers() == ["child"]
        assert not is_alive(entry)


def test_a_log_is_bounded_and_its_tail_is_of_the_newest_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.stack.logs.LOG_MAX_BYTES", 100)
    log = LogFile(tmp_path / "child.log")
    descriptor = log.open()
    os.write(descriptor, b"first run\n")
    os.close(descriptor)
    descriptor = log.open()
    os.write(descriptor, b"second run\n")
    assert log.tail() == ["second run"]
    os.write(descriptor, b"x" * 100)
    log.trim()
    os.write(descriptor, b"after\n")
    os.close(descriptor)
    assert log.path.read_bytes() == b"after\n"
    assert (tmp_path / "child.log.1").read_bytes().startswith(b"first run\nsecond run\n")
    assert log.tail() == ["after"]
