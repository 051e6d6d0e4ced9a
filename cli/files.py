"""Files that are written whole or not at all, and what is no file and takes what comes: pipes, devices."""

import contextlib
import os
import stat
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_STDOUT = 1


def is_stream(path: Path) -> bool:
    """Whether `path` is a pipe, a device, or where standard output goes (`/dev/stdout`): nothing that may be replaced."""
    try:
        found = path.stat()
    except OSError:  # nothing there, or out of reach: writing to it tells
        return False
    if stat.S_ISREG(found.st_mode):
        with contextlib.suppress(OSError):  # standard output may be closed
            return os.path.samestat(found, os.fstat(_STDOUT))
        return False
    return not stat.S_ISDIR(found.st_mode)


@contextmanager
def appending(path: Path) -> Generator[BinaryIO]:
    """A pipe or device to write to, as it is."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND), "wb") as file:
        yield file


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """A file to write; it becomes `path`, with the usual mode, when the block ends well. Else `path` is untouched.

    Where `path` is a symbolic link, what it leads to is replaced.
    """
    path = path.resolve()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # made readable by its owner alone, which is not what one expects
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
