"""Log files of the children: appended to, bounded in size, one older file kept."""

import os
import shutil
from pathlib import Path

LOG_MAX_BYTES = 16 * 1024 * 1024
TAIL_LINES = 20
TAIL_MAX_BYTES = 64 * 1024


class LogFile:
    """`logs/<process>.log`, opened anew for every start of its process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._start = 0

    def open(self) -> int:
        """A descriptor for a child's output; the caller closes it. What was written before stays, within the bound."""
        self.trim()
        # O_APPEND: when `trim` empties the file under a running child, the child goes on at its beginning.
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._start = os.fstat(descriptor).st_size
        return descriptor

    def trim(self) -> None:
        """Move the content to `<name>.log.1` when it has grown past the bound."""
        try:
            if self.path.stat().st_size <= LOG_MAX_BYTES:
                return
        except FileNotFoundError:
            return
        shutil.copyfile(self.path, self.path.with_suffix(".log.1"))
        os.truncate(self.path, 0)
        self._start = 0

    def tail(self) -> list[str]:
        """The last lines since the newest start."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(min(self._start, size), size - TAIL_MAX_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return lines[-TAIL_LINES:]
