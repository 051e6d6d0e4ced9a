"""Commands of `genmesh`, one module a topic; each has an `app` that `cli.main` puts together. Here: what they share."""

import signal
import threading
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, TypeVar

import grpc
import typer

from cli.client import CALL_TIMEOUT_S, Edge, parse_api_key
from cli.failures import ExitCode, code_of, failure_of, usage
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
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Write JSON: an object a line for each result; a failure as a google.rpc.Status on standard error."),
]
RequestIdOption = Annotated[
    str | None, typer.Option("--request-id", metavar="UUID", help="Run it again with the same id and it is still done once.")
]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=10_000, metavar="N", help="Show at most N.")]

API_KEY_FILE_MAX_BYTES = 4096

api_key_file: ContextVar[Path | None] = ContextVar("api_key_file", default=None)
"""What `genmesh --api-key-file` names."""


def open_edge(url: str | None, *, stored_login: bool = False) -> Edge:
    """The edge of this command: the context manager every command works in. `stored_login`: no other credentials count."""
    file = None if stored_login else api_key_file.get()
    return Edge.of(load(ClientSettings), url, stored_login=stored_login, api_key=_read_api_key(file) if file else None)


def _read_api_key(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            content = opened.read(API_KEY_FILE_MAX_BYTES)
    except OSError as error:
        raise usage(f"the API key cannot be read: {error.strerror}: {file}", "name a file that holds a key with --api-key-file") from error
    return parse_api_key(content.decode(errors="replace"), str(file))


@contextmanager
def missing_is(message: str, advice: str) -> Generator[None]:
    """NOT_FOUND inside the block is told with these words."""
    try:
        yield
    except grpc.RpcError as error:
        if code_of(error) is not grpc.StatusCode.NOT_FOUND:
            raise
        raise failure_of(error).told(message, advice, code=ExitCode.NOT_FOUND, notes=()) from error


def parse_id(text: str, what: str, advice: str) -> str:
    """A UUID in its usual form. Raises CommandError (usage)."""
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise usage(f"not the id of {what}: {text!r}", advice) from None


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
        raise failure.told(
            f"it is not known whether it was done: {failure.message}", f"run it again with `--request-id {request_id}`: it is done once"
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
