"""Ports of a stack: one block of consecutive loopback ports, held by a guard socket for as long as the stack runs.

A restarted child finds its port again, because nobody else picks from a block whose first port is taken.
"""

import errno
import socket
import zlib
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from cli.stack.process import StackError

BLOCK_SIZE = 64
FIRST_PORT = 20_000
LAST_PORT = 32_700
LOOPBACK = "127.0.0.1"
ANY = "0.0.0.0"  # noqa: S104  # where the edge listens


class PortBlock:
    """Names to ports inside a block, in the order in which they are asked for."""

    def __init__(self, base: int) -> None:
        self.base = base
        self._ports: dict[str, int] = {}

    def port(self, name: str) -> int:
        """The port of `name`; the same at every call."""
        if name not in self._ports:
            offset = len(self._ports) + 1  # the first port is the guard's
            if offset >= BLOCK_SIZE:
                raise StackError(f"a stack has no more than {BLOCK_SIZE - 1} ports")
            self._ports[name] = self.base + offset
        return self._ports[name]

    def address(self, name: str) -> str:
        """127.0.0.1:PORT of `name`."""
        return f"{LOOPBACK}:{self.port(name)}"


def is_free(port: int, host: str = LOOPBACK) -> bool:
    """Whether a server could listen there right now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Connections of a server that has just ended linger in TIME_WAIT; they are no obstacle to a new one.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise
    return True


@contextmanager
def hold_block(preferred: int | None, seed: Path) -> Generator[PortBlock]:
    """Hold a free block while the block of code runs: `preferred` (its base) if that is free, else any.

    `seed` decides where the search begins, so that stacks with different state directories seldom meet.
    """
    limit = min(LAST_PORT, _ephemeral_start())
    count = max(1, (limit - FIRST_PORT) // BLOCK_SIZE)
    start = zlib.crc32(str(seed).encode()) % count
    bases = [FIRST_PORT + (start + index) % count * BLOCK_SIZE for index in range(count)]
    if preferred is not None:
        bases.insert(0, preferred)
    for base in bases:
        guard = _listen(base)
        if guard is None:
            continue
        with guard:
            if all(is_free(port) for port in range(base + 1, base + BLOCK_SIZE)):
                yield PortBlock(base)
                return
    raise StackError(f"no {BLOCK_SIZE} consecutive ports are free between {FIRST_PORT} and {limit}")


@contextmanager
def hold_edge(port: int, variable: str) -> Generator[None]:
    """Fail if somebody listens on `port`; else keep other stacks off it while the block of code runs.

    Envoy listens with SO_REUSEPORT: two of them would share a port without a word. The socket held here is bound the same
    way but never listens, so Envoy can bind beside it and gets every connection, while `is_free` of another stack fails.
    """
    if not is_free(port, ANY):
        raise StackError(f"port {port} is taken by another program", f"stop that program, or choose another port with {variable}=PORT")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as guard:
        # Without SO_REUSEADDR: two sockets that both have it and do not listen would not see each other.
        guard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Fails beside connections in TIME_WAIT of a server that had no SO_REUSEPORT. Envoy would not, so go on unguarded.
        with suppress(OSError):
            guard.bind((ANY, port))
        yield


def _listen(port: int) -> socket.socket | None:
    guard = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    guard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        guard.bind((LOOPBACK, port))
        guard.listen(1)
    except OSError:
        guard.close()
        return None
    return guard


def _ephemeral_start() -> int:
    """First port that the kernel hands to outgoing connections; above it a port is never safely ours."""
    try:
        start = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        return LAST_PORT
    # A machine that hands out nearly all ports leaves no safe range; ours is then as good as any.
    return start if start > FIRST_PORT + BLOCK_SIZE else LAST_PORT
