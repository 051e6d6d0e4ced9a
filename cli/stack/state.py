"""The state directory: what a stack keeps between runs, who holds it, and what the running one says of itself."""

import contextlib
import fcntl
import json
import os
import secrets
import signal
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict

from cli.stack.process import StackError

LEFTOVER_TIMEOUT_S = 5.0
CREATED_TOLERANCE_S = 0.05


def _secret() -> str:
    return secrets.token_urlsafe(24)


class Secrets(BaseModel):
    """What is made on first start and never shown."""

    model_config = ConfigDict(frozen=True)

    postgres: str
    gateway_database: str
    credits_database: str
    jobs_database: str
    redis: str
    s3_access_key_id: str
    s3_secret_access_key: str
    admin_password: str

    @classmethod
    def generate(cls) -> "Secrets":
        """New ones."""
        return cls(**{name: _secret() for name in cls.model_fields})


class StateDirectory:
    """Paths and files of one stack. Directories are made when they are first asked for, readable by the owner only."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def directory(self, name: str) -> Path:
        """A subdirectory that exists."""
        path = self.path / name
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    @property
    def secrets_file(self) -> Path:
        """Where generated passwords lie."""
        return self.path / "secrets.json"

    @property
    def _lock_file(self) -> Path:
        return self.path / "lock"

    @property
    def _stack_file(self) -> Path:
        return self.path / "stack.json"

    @property
    def _ports_file(self) -> Path:
        return self.path / "ports"

    @contextmanager
    def held(self) -> Generator[None]:
        """Be the only stack on this directory while the block runs; StackError says who else is."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StackError(
                    f"a stack is already running on {self.path} (pid {self.holder()})",
                    "stop it with `genmesh down`, or choose another directory with GENMESH_STATE_DIR=DIR",
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def holder(self) -> int | None:
        """Pid of the stack that runs on this directory, None if there is none."""
        try:
            descriptor = os.open(self._lock_file, os.O_RDWR)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with contextlib.suppress(ValueError):
                return int(os.pread(descriptor, 32, 0))
            return 0  # it has the lock but has not written its pid yet
        finally:
            os.close(descriptor)
        return None

    def secrets(self) -> Secrets:
        """The secrets of this stack, made on first use."""
        try:
            return Secrets.model_validate_json(self.secrets_file.read_bytes())
        except FileNotFoundError:
            made = Secrets.generate()
            self.write(self.secrets_file, made.model_dump_json(indent=2))
            return made
        except ValueError as error:
            raise StackError(f"{self.secrets_file} is damaged: {error}") from error

    @property
    def port_base(self) -> int | None:
        """First port of the block that was used last."""
        try:
            return int(self._ports_file.read_text())
        except (FileNotFoundError, ValueError):
            return None

    @port_base.setter
    def port_base(self, base: int) -> None:
        self.write(self._ports_file, str(base))

    def publish(self, description: dict[str, Any]) -> None:
        """Say what runs, for `status`, `down` and operators."""
        self.write(self._stack_file, json.dumps(description, indent=2))

    def published(self) -> dict[str, Any] | None:
        """What the running stack, or the last one, said."""
        try:
            return json.loads(self._stack_file.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise StackError(f"{self._stack_file} is damaged: {error}") from error

    def write(self, path: Path, text: str) -> None:
        """Write a file that is complete or not there, readable by the owner only."""
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def end_leftovers(self) -> list[str]:
        """End children that outlived a stack which was killed; names of those that were found. Call only while nobody holds it."""
        published = self.published() or {}
        found: dict[str, psutil.Process] = {}
        for entry in published.get("processes", ()):
            process = _running(entry.get("pid"), entry.get("created_at"))
            if process is not None:
                found[entry["name"]] = process
        for process in found.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                # PostgreSQL waits for its clients on SIGTERM, not on SIGINT; the services end on either.
                process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(list(found.values()), timeout=LEFTOVER_TIMEOUT_S)
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=LEFTOVER_TIMEOUT_S)
        return list(found)


def is_alive(status: dict[str, Any]) -> bool:
    """Whether a published process still is the one that was published."""
    return _running(status.get("pid"), status.get("created_at")) is not None


def _running(pid: int | None, created_at: float | None) -> psutil.Process | None:
    """The process, unless it has ended and its pid is another's by now."""
    if pid is None or created_at is None:
        return None
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - created_at) <= CREATED_TOLERANCE_S and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if same else None
