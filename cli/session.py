"""The stored login: a pair of tokens for one edge, in a file only its owner can read.

A refresh token works once, and using one twice ends the session. So whoever refreshes holds the lock, reads the file again
first, and replaces it atomically: any number of commands may run at once.
"""

import fcntl
import json
import os
import tempfile
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast


@dataclass(frozen=True, slots=True)
class Session:
    """A login at one edge. `expire_time` is Unix time, of the access token."""

    edge: str
    user_id: str
    email: str
    access_token: str
    refresh_token: str
    expire_time: float

    def __repr__(self) -> str:
        return f"Session(edge={self.edge!r}, email={self.email!r})"  # tokens stay out of logs and tracebacks


class SessionStore(Protocol):
    """Where a login lives."""

    def load(self) -> Session | None:
        """The login, or None."""
        ...

    def save(self, session: Session) -> None:
        """Replace the login."""
        ...

    def clear(self) -> None:
        """Forget the login."""
        ...

    def locked(self) -> AbstractContextManager[None]:
        """Hold the store against other processes for the block."""
        ...


class SessionFile:
    """A login in a file (mode 0600)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> Session | None:
        """The login; None when there is none or the file is not one of ours."""
        try:
            content: Any = json.loads(self.path.read_bytes())
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return None
        if not isinstance(content, dict):
            return None
        values = cast("dict[str, Any]", content)
        try:
            return Session(
                edge=str(values["edge"]),
                user_id=str(values["user_id"]),
                email=str(values["email"]),
                access_token=str(values["access_token"]),
                refresh_token=str(values["refresh_token"]),
                expire_time=float(values["expire_time"]),
            )
        except (KeyError, TypeError, ValueError):
            return None

    def save(self, session: Session) -> None:
        """Replace the login atomically: a reader, or a crash, finds the old one or the new one, never a half."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")  # made with mode 0600
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(asdict(session), file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise

    def clear(self) -> None:
        """Forget the login."""
        self.path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Generator[None]:
        """Hold the login against other processes; waits for whoever holds it (one RPC at most)."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A file of its own: replacing the login would leave the lock on the file that is gone.
        descriptor = os.open(self.path.with_name(self.path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class SessionMemory:
    """A login of this process only."""

    def __init__(self) -> None:
        self._session: Session | None = None

    def load(self) -> Session | None:
        """The login, or None."""
        return self._session

    def save(self, session: Session) -> None:
        """Replace the login."""
        self._session = session

    def clear(self) -> None:
        """Forget the login."""
        self._session = None

    @contextmanager
    def locked(self) -> Generator[None]:
        """Nothing to lock: nobody else sees it."""
        yield
