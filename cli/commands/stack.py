"""The embedded stack: up, down, status, new certificates and signing keys.

What it is made of stands in `cli.stack`, imported only when one of these runs.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cli.failures import CommandError, ExitCode
from cli.output import note
from servicekit.settings import load

if TYPE_CHECKING:
    from cli.stack import ProcessStatus, Stack, StackSettings
    from cli.stack.state import StateDirectory

DOWN_TIMEOUT_S = 90.0
DOWN_POLL_S = 0.05
ROTATE_TIMEOUT_S = 60.0

app = typer.Typer()
certificates = typer.Typer(help="Certificates of the embedded stack's services.", no_args_is_help=True)
signing_keys = typer.Typer(help="Keys that sign the embedded stack's access tokens.", no_args_is_help=True)
app.add_typer(certificates, name="certificates")
app.add_typer(signing_keys, name="signing-keys")

_STYLES = {"healthy": "green", "done": "green", "unhealthy": "red", "failed": "bold red", "restarting": "red", "dead": "bold red"}


@app.command()
def up() -> None:
    """Run the whole mesh here, in the foreground, until Ctrl-C.

    PostgreSQL, Redis, S3, Envoy and every service, supervised and restarted when they die. Data stays in GENMESH_STATE_DIR.
    """
    from cli.stack import StackError, StackSettings

    settings = load(StackSettings)
    console = Console(highlight=False, soft_wrap=True)
    try:
        asyncio.run(_up(settings, console))
    except StackError as error:
        raise CommandError(error.message, error.advice, notes=error.lines) from error


async def _up(settings: "StackSettings", console: Console) -> None:
    from cli.stack import Stack

    began = time.monotonic()
    stopping = False
    task = asyncio.current_task()
    assert task is not None

    def stop() -> None:
        nonlocal stopping
        if not stopping:  # asked once is enough: a second Ctrl-C must not leave half of it running
            stopping = True
            console.print("stopping …")
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop)

    def show(status: "ProcessStatus") -> None:
        if not stopping:
            _show_change(console, status, time.monotonic() - began)

    stack = Stack(settings, on_change=show)
    console.print(f"starting in {stack.state.path}")
    try:
        async with stack.running():
            _show_ready(console, stack, time.monotonic() - began)
            await stack.failed()
    except asyncio.CancelledError:
        if not stopping:
            raise
        console.print("stopped")


def _show_change(console: Console, status: "ProcessStatus", elapsed_s: float) -> None:
    if status.health in ("waiting", "starting", "stopped"):
        return
    style = _STYLES.get(status.health, "")
    pid = f"pid {status.pid}" if status.pid else ""
    detail = status.detail.splitlines()[0] if status.detail and status.health not in ("healthy", "done") else ""
    console.print(f"{elapsed_s:6.1f} s  {status.name:<16} [{style}]{status.health:<10}[/]  {status.address:<16} {pid}  {detail}".rstrip())


def _show_ready(console: Console, stack: "Stack", elapsed_s: float) -> None:
    console.print(f"\n[bold green]ready[/] after {elapsed_s:.1f} s")
    console.print(f"  edge           {stack.edge_url}  (gRPC, grpc-web, JSON)")
    console.print(f"  edge with TLS  {stack.edge_tls_url}  (CA: {stack.certificates_dir / 'ca.crt'})")
    console.print(f"  administrator  {stack.admin_email}  (password: {stack.password_source})")
    console.print("  to stop        Ctrl-C here, or `genmesh down`\n")


@app.command()
def down() -> None:
    """Stop the embedded stack of GENMESH_STATE_DIR and wait until it is gone."""
    state = _state()
    pid = state.holder()
    if pid is None:
        left = state.end_leftovers()
        print(f"ended what a killed stack had left running: {', '.join(left)}" if left else f"nothing is running on {state.path}")
        return
    began = time.monotonic()
    if pid:
        os.kill(pid, signal.SIGTERM)
    while state.holder() is not None:
        if time.monotonic() - began > DOWN_TIMEOUT_S:
            raise CommandError(f"the stack (pid {pid}) is still running after {DOWN_TIMEOUT_S:g} s", f"end it with `kill -9 {pid}`")
        time.sleep(DOWN_POLL_S)
    print(f"stopped the stack on {state.path} (pid {pid}) in {time.monotonic() - began:.1f} s")


@app.command()
def status(
    json_output: Annotated[bool, typer.Option("--json", help="Write one JSON object on one line: running, pid, edge, processes …")] = False,
) -> None:
    """Show every process of the embedded stack. Exit code 0: all healthy, 1: something is not, 3: not running."""
    from cli.stack.state import is_alive

    state = _state()
    pid = state.holder()
    published = state.published()
    if pid is None or published is None:
        if json_output:
            print(json.dumps({"running": False, "state_dir": str(state.path), "processes": []}))
        else:
            print(f"nothing is running on {state.path}")
        raise typer.Exit(ExitCode.UNAVAILABLE)
    now = time.time()
    for entry in published["processes"]:
        if entry["pid"] is not None and not is_alive(entry):
            entry["health"], entry["pid"] = "dead", None
        started_at = entry.pop("started_at")
        entry["uptime_s"] = round(now - started_at, 1) if entry["pid"] is not None and started_at else None
        entry.pop("created_at")
    if json_output:
        print(json.dumps({"running": True, "pid": pid, **published}))
    else:
        _show_status(pid, published)
    if any(entry["health"] not in ("healthy", "done") for entry in published["processes"]):
        raise typer.Exit(ExitCode.FAILED)


def _show_status(pid: int, published: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    for column in ("PROCESS", "ROLE", "HEALTH", "PID", "ADDRESS", "RESTARTS", "UPTIME"):
        table.add_column(column, no_wrap=True)
    for entry in published["processes"]:
        if entry["health"] == "done":
            continue
        style = _STYLES.get(entry["health"], "")
        uptime = f"{entry['uptime_s']:.0f} s" if entry["uptime_s"] is not None else ""
        table.add_row(
            *(entry["name"], entry["role"], f"[{style}]{entry['health']}[/]" if style else entry["health"], str(entry["pid"] or "")),
            *(entry["address"], str(entry["restarts"]), uptime),
        )
    console.print(table)
    console.print(f"\nedge {published['edge']['url']}  {published['edge']['tls_url']}  supervisor pid {pid}  {published['state_dir']}")


@certificates.command("rotate")
def rotate_certificates(
    new_authority: Annotated[
        bool,
        typer.Option("--new-authority", help="Make a new certificate authority, too; the earlier one is trusted no longer at the end."),
    ] = False,
) -> None:
    """Give every service a new certificate and key. What runs takes them over by itself, without a lost call."""
    from cli.stack.certificates import SETTLE_S, rotate

    state = _existing_state("certificates")
    running = state.holder() is not None
    if new_authority:
        note(f"this takes about {2 * SETTLE_S:.0f} s: all trust the new authority before it is used, and use it before the old one goes")
    try:
        made = rotate(state.directory("certificates"), state.directory("authority"), new_authority)
    except TimeoutError as error:
        raise CommandError("another rotation is going on", "wait for its end", code=ExitCode.UNAVAILABLE) from error
    print(f"made {', '.join(made)}")
    if running:
        note(f"every process uses them within {SETTLE_S:.0f} s")


@signing_keys.command("rotate")
def rotate_signing_keys() -> None:
    """Make a new key that signs access tokens. The earlier one is accepted until the last token that it signed has expired."""
    state = _existing_state("keys")
    # Its own process, as every service here: the command line imports none.
    environment = os.environ | {"GENMESH_SIGNING_KEYS_DIR": str(state.directory("keys"))}
    command = (sys.executable, "-m", "gateway", "rotate-keys")
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=ROTATE_TIMEOUT_S)  # noqa: S603  # ours
    except subprocess.TimeoutExpired as error:
        raise CommandError("the key was not made in time", "run it again", code=ExitCode.UNAVAILABLE) from error
    if run.returncode:
        raise CommandError("the key could not be made", "mend the cause and run it again", notes=tuple(run.stderr.splitlines()[-5:]))
    print(run.stdout.splitlines()[-1])


def _existing_state(name: str) -> "StateDirectory":
    """The state directory, if a stack has been started on it."""
    state = _state()
    if not (state.path / name).is_dir():
        advice = "start one with `genmesh up`, or set GENMESH_STATE_DIR"
        raise CommandError(f"no stack has been started on {state.path}", advice, code=ExitCode.NOT_FOUND)
    return state


def _state() -> "StateDirectory":
    from cli.stack import StackSettings
    from cli.stack.state import StateDirectory

    return StateDirectory(load(StackSettings).state_dir)
