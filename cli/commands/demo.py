"""The whole mesh in one command: start the embedded stack, be a new user, make a picture through Envoy, stop."""

import asyncio
import contextlib
import secrets
import threading
import time
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import grpc
import typer

from cli.amounts import MILLICREDITS, credits_text
from cli.client import Edge
from cli.commands.generate import finish, follow, image_spec, submit
from cli.connection import Backoff
from cli.download import check_target
from cli.failures import CommandError, ExitCode, code_of, failure_of
from cli.output import note
from cli.session import SessionMemory
from genmesh.credits.v1 import credits_pb2
from genmesh.identity.v1 import identity_pb2
from genmesh.inference.v1 import inference_pb2
from genmesh.jobs.v1 import jobs_pb2
from servicekit.settings import load

if TYPE_CHECKING:
    from cli.stack import ProcessStatus, StackSettings

app = typer.Typer()

DEFAULT_PROMPT = "a tiger face"
GRANT_MILLICREDITS = 100 * MILLICREDITS
READY_WINDOW_S = 180.0


@dataclass(frozen=True, slots=True)
class RunningStack:
    """What the demo has to know of a stack."""

    edge_url: str
    admin_email: str
    admin_password: str


@app.command()
def demo(
    prompt: Annotated[str, typer.Option("--prompt", help="What to draw.")] = DEFAULT_PROMPT,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="File or directory to save to. Default: in out/.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, metavar="N", help="Denoising steps. Default: the model's.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="Same seed, same picture. Default: drawn.")] = None,
) -> None:
    """Show the whole mesh at work: start it, make a picture, stop it.

    Uses the stack that runs on GENMESH_STATE_DIR if there is one. The last line of its output is `saved PATH`.
    """
    spec = image_spec(prompt, steps=steps, seed=seed)
    if out is None:
        out = Path("out")
        out.mkdir(exist_ok=True)
    check_target(out)
    with _stack() as stack:
        note(f"edge {stack.edge_url} (Envoy)")
        with _user(stack) as client:
            _wait_for_model(client, spec)
            note(f"prompt: {prompt}")
            paths = finish(client, follow(client, submit(client, spec)), out)
    for path in paths:
        print(f"saved {path}")


@contextmanager
def _user(stack: RunningStack) -> Generator[Edge]:
    """A new user with credits, everything done through the edge."""
    email, password = f"demo-{secrets.token_hex(4)}@example.com", secrets.token_urlsafe(18)
    with (
        Edge(stack.edge_url, store=SessionMemory()) as client,
        Edge(stack.edge_url, store=SessionMemory(), credentials=(stack.admin_email, stack.admin_password)) as admin,
    ):
        request = identity_pb2.RegisterUserRequest(email=email, password=password, display_name="Demo")
        user = client.call(client.identity.RegisterUser, request, signed_in=False).user
        client.sign_in(email, password)
        note(f"registered {email}")
        balance = admin.call(
            admin.ledger_admin.GrantCredits,
            credits_pb2.GrantCreditsRequest(
                request_id=str(uuid.uuid4()), user_id=user.user_id, amount_millicredits=GRANT_MILLICREDITS, reason="genmesh demo"
            ),
        )
        note(f"granted {credits_text(balance.available_millicredits)}")
        yield client


def _wait_for_model(client: Edge, spec: jobs_pb2.JobSpec) -> None:
    """Return when a model is offered and the job can be priced. Raises CommandError after READY_WINDOW_S."""
    backoff = Backoff(READY_WINDOW_S)
    while True:
        problem = CommandError("no model is offered", "look at the logs of inference-0", code=ExitCode.UNAVAILABLE)
        try:
            if client.call(client.models.ListModels, inference_pb2.ListModelsRequest()).models:
                client.call(client.jobs.EstimateJob, jobs_pb2.EstimateJobRequest(spec=spec))
                return
        except grpc.RpcError as error:
            if code_of(error) not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
                raise
            problem = failure_of(error)
        if not backoff.wait():
            raise problem


@contextmanager
def _stack() -> Generator[RunningStack]:
    """The stack on GENMESH_STATE_DIR: the one that runs, or one for the length of the block."""
    try:
        from cli.stack import StackSettings
        from cli.stack.state import StateDirectory
    except ImportError as error:
        raise CommandError(f"the embedded stack is not installed: {error}", "install it with `pip install 'genmesh[embedded]'`") from error
    settings = load(StackSettings)
    state = StateDirectory(settings.state_dir)
    if state.holder() is not None and (published := state.published()):
        note(f"using the stack that runs on {state.path}")
        password = settings.admin_password.get_secret_value() if settings.admin_password else state.secrets().admin_password
        yield RunningStack(published["edge"]["url"], published["admin"]["email"], password)
        return
    # A demo needs no fixed port: it does not fail because something else listens on 8080.
    free = {name: 0 for name in ("edge_port", "edge_tls_port") if name not in settings.model_fields_set}
    with _started(settings.model_copy(update=free)) as stack:
        yield stack


@contextmanager
def _started(settings: "StackSettings") -> Generator[RunningStack]:
    """A stack in a thread of its own, so that Ctrl-C reaches the command first and the stack is stopped in order."""
    from cli.stack import Health, Stack, StackError

    began = time.monotonic()
    control: Future[Callable[[], object]] = Future()
    ready: Future[RunningStack] = Future()

    def changed(status: "ProcessStatus") -> None:
        if not ready.done() and status.health in {Health.HEALTHY, Health.DONE, Health.RESTARTING, Health.FAILED}:
            note(f"  {time.monotonic() - began:5.1f} s  {status.name} {status.health}")

    async def run() -> None:
        task = asyncio.current_task()
        loop = asyncio.get_running_loop()
        if task is not None:
            control.set_result(lambda: loop.call_soon_threadsafe(task.cancel))
        async with Stack(settings, on_change=changed).running() as stack:
            ready.set_result(RunningStack(stack.edge_url, stack.admin_email, stack.admin_password))
            await stack.failed()

    def body() -> None:
        try:
            asyncio.run(run())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            else:
                note(f"the stack failed: {error}")
        finally:
            if not control.done():
                control.set_result(lambda: None)

    note(f"starting the stack on {settings.state_dir}")
    thread = threading.Thread(target=body, name="stack")
    thread.start()
    try:
        try:
            stack = ready.result()
        except StackError as error:
            raise CommandError(str(error), f"logs are in {settings.state_dir / 'logs'}", code=ExitCode.UNAVAILABLE) from error
        yield stack
    finally:
        if thread.is_alive():
            note("stopping the stack")
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            control.result()()
        thread.join()
