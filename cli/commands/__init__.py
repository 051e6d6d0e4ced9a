"""Commands of `genmesh`, one module a topic; each has an `app` that `cli.main` puts together. Here: what they share."""

import signal
import threading
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Annotated, TypeVar

import grpc
import typer

from cli.client import CALL_TIMEOUT_S, Edge
from cli.failures import CommandError, code_of, failure_of, usage
from cli.settings import ClientSettings
from servicekit.settings import load

# Ends of a call after which the server may have done it all the same.
_UNCERTAIN = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})

Request = TypeVar("Request")
Response = TypeVar("Response")

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
RequestIdOption = Annotated[
    str | None, typer.Option("--request-id", metavar="UUID", help="Run it again with the same id and it is still done once.")
]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=10_000, metavar="N", help="Show at most N.")]


def open_edge(url: str | None, *, stored_login: bool = False) -> Edge:
    """The edge of this command: the context manager every command works in."""
    return Edge.of(load(ClientSettings), url, stored_login=stored_login)


def parse_request_id(text: str | None) -> str:
    """The id of --request-id; left out: a new one. Raises CommandError (usage)."""
    try:
        return str(uuid.uuid4() if text is None else uuid.UUID(text))
    except ValueError:
        raise usage(f"not a request id: {text!r}", "give a UUID, or leave --request-id out") from None


def call_once(
    client: Edge,
    method: "grpc.UnaryUnaryMultiCallable[Request, Response]",
    request: Request,
    request_id: str,
    *,
    timeout_s: float = CALL_TIMEOUT_S,
) -> Response:
    """Call a method that moves credits or money. When nobody knows whether it did, the error says how to run it again, once."""
    try:
        return client.call(method, request, timeout_s=timeout_s)
    except grpc.RpcError as error:
        if code_of(error) not in _UNCERTAIN:
            raise
        failure = failure_of(error)
        raise CommandError(
            f"it is not known whether it was done: {failure.message}",
            f"run it again with `--request-id {request_id}`: it is done once",
            code=failure.code,
            notes=failure.notes,
        ) from error


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
