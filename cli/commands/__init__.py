"""Commands of `genmesh`, one module a topic; each has an `app` that `cli.main` puts together. Here: what they share."""

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Annotated

import typer

from cli.client import Edge
from cli.settings import ClientSettings
from servicekit.settings import load

EdgeOption = Annotated[
    str | None,
    typer.Option(
        "--edge",
        metavar="URL",
        help="Edge to call, http://HOST:PORT or https://HOST:PORT. Default: GENMESH_EDGE_URL, else where you signed in, "
        "else the embedded stack on this machine.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Write JSON, one object a line.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=10_000, metavar="N", help="Show at most N.")]


def open_edge(url: str | None, *, stored_login: bool = False) -> Edge:
    """The edge of this command: the context manager every command works in."""
    return Edge.of(load(ClientSettings), url, stored_login=stored_login)


@contextmanager
def interrupts(*actions: Callable[[], None]) -> Generator[None]:
    """While the block runs, each Ctrl-C runs the next of `actions` in a thread of its own; after the last: KeyboardInterrupt.

    KeyboardInterrupt may strike between any two instructions, those of gRPC that hold a lock included, and a call made
    afterwards then hangs. A thread that cancels something is safe.
    """
    left = iter(actions)

    def handle(number: int, frame: object) -> None:
        action = next(left, None)
        if action is None:
            raise KeyboardInterrupt
        threading.Thread(target=action, daemon=True).start()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
