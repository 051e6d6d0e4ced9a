"""The life of a process: event loop, signals, background tasks.

A background task that dies stops its process; the supervisor restarts it.
"""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Collection, Coroutine
from typing import Any

import structlog
import uvloop

from servicekit import telemetry
from servicekit.settings import TelemetrySettings

CANCEL_INTERVAL_S = 1.0

_log = structlog.get_logger(__name__)


def run(settings: TelemetrySettings, *, service: str, role: str, main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `main(stop)` on uvloop; SIGTERM and SIGINT set `stop`. An exception is logged and exits with 1."""
    telemetry.configure(settings, service=service, role=role)

    async def body() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await main(stop)

    try:
        uvloop.run(body())
    except Exception:
        _log.exception("process.died")
        sys.exit(1)


async def until_stopped(stop: asyncio.Event, *tasks: Coroutine[Any, Any, None]) -> None:
    """Run `tasks` until `stop` is set, then cancel them. A task that ends or raises by itself ends all, with its error."""
    running = [asyncio.create_task(task) for task in tasks]
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([stopping, *running], return_when=asyncio.FIRST_COMPLETED)
        for task in running:
            if task.done():
                task.result()
                raise RuntimeError(f"background task {task.get_coro()!r} ended")
    finally:
        await end({stopping, *running})


async def end(tasks: Collection["asyncio.Task[Any]"]) -> None:
    """Cancel tasks and return when all have ended.

    Asks again and again: redis-py 8.1 swallows a cancellation now and then, and its caller goes on as if nothing had been.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_INTERVAL_S)
