"""Starts children in order, watches their health, restarts those that die, and stops them all in reverse order.

A child that cannot work (wrong settings, dies again and again while starting) ends the whole stack with a clear message;
one that dies later is restarted with growing pauses, for as long as it takes.
"""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

from cli.stack import launch
from cli.stack.health import PROBE_TIMEOUT_S
from cli.stack.logs import LogFile
from cli.stack.process import Health, Phase, ProcessSpec, ProcessStatus, StackError
from servicekit.settings import EXIT_CONFIGURATION

POLL_MIN_S = 0.05
POLL_MAX_S = 0.25
POLL_GROWTH = 1.2
"""Asked often while an answer is near, less often of what takes long: asking takes time from those that start."""
HEALTH_INTERVAL_S = 2.0
BACKOFF_MIN_S = 0.1
BACKOFF_MAX_S = 10.0
STABLE_AFTER_S = 30.0
"""A child that has lived this long starts over with the shortest pause."""
START_ATTEMPTS = 3
"""Deaths before the first readiness that fail the start of the stack."""
KILL_TIMEOUT_S = 5.0
LOG_CHECK_S = 10.0


class _Child:
    def __init__(self, spec: ProcessSpec, logs_dir: Path) -> None:
        self.spec = spec
        self.status = ProcessStatus.of(spec)
        self.log = LogFile(logs_dir / f"{spec.name}.log")
        self.ready = asyncio.Event()
        self.stopping = False
        self.process: asyncio.subprocess.Process | None = None
        self.task: asyncio.Task[None] | None = None


class Supervisor:
    """Children by name. `on_change` is called with every status that has changed."""

    def __init__(self, logs_dir: Path, on_change: Callable[[ProcessStatus], None] = lambda _: None) -> None:
        self._logs_dir = logs_dir
        self._on_change = on_change
        self._children: dict[str, _Child] = {}
        self._changed = asyncio.Condition()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._housekeeping = asyncio.create_task(self._trim_logs(), name="logs")
        self._notifying: set[asyncio.Task[None]] = set()
        # One core is left to the start that takes longest, that of the model: everything else finishes in its shadow.
        self._turns = asyncio.Semaphore(max(1, (os.cpu_count() or 1) - 1))
        self._passing: set[asyncio.Task[None]] = set()

    @property
    def statuses(self) -> list[ProcessStatus]:
        """Every process, in the order in which they were added."""
        return [child.status for child in self._children.values()]

    def status(self, name: str) -> ProcessStatus:
        """The process with this name."""
        return self._children[name].status

    async def start(self, specs: Iterable[ProcessSpec]) -> None:
        """Start processes, each as soon as those in its `after` are ready; return when all are. StackError if one cannot."""
        children = [_Child(spec, self._logs_dir) for spec in specs]
        for child in children:
            self._children[child.spec.name] = child
        for child in children:
            child.task = asyncio.create_task(self._live(child), name=child.spec.name)
        ready = asyncio.gather(*(child.ready.wait() for child in children))
        try:
            await asyncio.wait([ready, self._failure], return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                self._failure.result()
        finally:
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)

    async def failed(self) -> None:
        """Wait until a child cannot be kept running; raises StackError then."""
        await asyncio.shield(self._failure)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds; it is asked again at every change of a status."""
        async with self._changed:
            await self._changed.wait_for(condition)

    async def stop(self) -> None:
        """Stop everything, phase by phase in reverse. Nothing is left running."""
        for child in self._children.values():
            child.stopping = True
        for phase in sorted(Phase, reverse=True):
            await asyncio.gather(*(self._stop(child) for child in self._children.values() if child.spec.phase is phase))
        for task in (self._housekeeping, *self._passing):
            task.cancel()
        await asyncio.gather(self._housekeeping, *self._passing, *self._notifying, return_exceptions=True)
        if not self._failure.cancel() and not self._failure.cancelled():
            self._failure.exception()  # seen, whoever asked

    def _set(self, child: _Child, health: Health, detail: str = "") -> None:
        status = child.status
        if status.health is health and status.detail == detail:
            return
        status.health, status.detail = health, detail
        self._on_change(status)

        async def notify() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.create_task(notify())
        self._notifying.add(task)
        task.add_done_callback(self._notifying.discard)

    async def _live(self, child: _Child) -> None:
        """One child from its first start to its end."""
        try:
            for name in child.spec.after:
                await self._children[name].ready.wait()
            if child.spec.takes_turn:
                await self._turns.acquire()
                passing = asyncio.create_task(self._pass_turn(child))
                self._passing.add(passing)
                passing.add_done_callback(self._passing.discard)
            self._set(child, Health.STARTING)
            if child.spec.prepare is not None:
                await child.spec.prepare()
            await self._keep_running(child)
        except Exception as error:
            self._set(child, Health.FAILED, str(error))
            if not self._failure.done():
                failure = error if isinstance(error, StackError) else StackError(f"{child.spec.name}: {error!r}")
                failure.__cause__ = error if failure is not error else None
                self._failure.set_exception(failure)

    async def _pass_turn(self, child: _Child) -> None:
        await child.ready.wait()
        self._turns.release()

    async def _keep_running(self, child: _Child) -> None:
        spec = child.spec
        pause_s = BACKOFF_MIN_S
        attempts = 0
        while True:
            began = time.monotonic()
            process = await self._spawn(child)
            timed_out = await self._watch(child, process)
            code = process.returncode
            self._kill_group(process.pid)
            child.process = None
            child.status.pid = None
            if child.stopping:
                return
            if spec.check is None and code == 0:
                self._set(child, Health.DONE)
                child.ready.set()
                return
            attempts += 1
            problem = child.status.detail
            ended = f"was not ready within {spec.start_timeout_s:g} s ({problem})" if timed_out else _ended(code)
            if code == EXIT_CONFIGURATION or spec.check is None or (not child.ready.is_set() and (timed_out or attempts >= START_ATTEMPTS)):
                raise StackError(f"{spec.name} {ended}", f"its log: {child.log.path}", lines=tuple(child.log.tail()))
            if time.monotonic() - began > STABLE_AFTER_S:
                pause_s = BACKOFF_MIN_S
            child.status.restarts += 1
            self._set(child, Health.RESTARTING, ended)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, BACKOFF_MAX_S)

    async def _spawn(self, child: _Child) -> asyncio.subprocess.Process:
        spec = child.spec
        log = child.log.open()
        try:
            user_id, group_id = ("-", "-") if spec.account is None else (str(spec.account.user_id), str(spec.account.group_id))
            signal_number = str(int(spec.stop_signal))
            launcher = (sys.executable, "-I", "-S", launch.__file__, signal_number, str(os.getpid()), user_id, group_id)
            process = await asyncio.create_subprocess_exec(
                *launcher,
                *spec.argv,
                env=dict(spec.env),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in the terminal is the supervisor's to handle; the child gets its signal in its turn.
                start_new_session=True,
            )
        finally:
            os.close(log)
        child.process = process
        child.status.pid = process.pid
        child.status.started_at = time.time()
        with contextlib.suppress(psutil.NoSuchProcess):
            child.status.created_at = psutil.Process(process.pid).create_time()
        self._set(child, Health.STARTING, f"pid {process.pid}")
        return process

    async def _watch(self, child: _Child, process: asyncio.subprocess.Process) -> bool:
        """Follow a running child until it has ended. True: it was ended for not getting ready in time."""
        exited = asyncio.create_task(process.wait())
        deadline = time.monotonic() + child.spec.start_timeout_s
        was_ready = False
        poll_s = POLL_MIN_S
        try:
            while True:
                if child.spec.check is not None:
                    problem = await self._probe(child, exited, first=not was_ready)
                    if exited.done():
                        return False
                    if problem is None:
                        was_ready = True
                        self._set(child, Health.HEALTHY)
                        child.ready.set()
                    elif was_ready:
                        self._set(child, Health.UNHEALTHY, problem)
                    else:
                        child.status.detail = problem
                if not was_ready and time.monotonic() > deadline:
                    self._signal(process, signal.SIGKILL)
                    await exited
                    return True
                healthy = child.status.health is Health.HEALTHY
                await asyncio.wait([exited], timeout=HEALTH_INTERVAL_S if healthy else poll_s)
                poll_s = POLL_MIN_S if healthy else min(poll_s * POLL_GROWTH, POLL_MAX_S)
                if exited.done():
                    return False
        finally:
            exited.cancel()
            await asyncio.gather(exited, return_exceptions=True)

    async def _probe(self, child: _Child, exited: "asyncio.Task[int]", *, first: bool) -> str | None:
        """None when the child works, else what is wrong. Ends early when the child does."""
        spec = child.spec
        assert spec.check is not None

        async def ask() -> None:
            assert spec.check is not None
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await spec.check()
            if first and spec.on_ready is not None:
                await spec.on_ready()

        asking = asyncio.create_task(ask())
        try:
            await asyncio.wait([asking, exited], return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                return "ended"
            error = asking.exception()
            return None if error is None else f"{type(error).__name__}: {error}"[:300]
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _stop(self, child: _Child) -> None:
        task = child.task
        if task is None:
            return
        process = child.process
        if process is None:
            task.cancel()  # waits for others, prepares or pauses: nothing runs yet
        elif process.returncode is None:
            self._signal(process, child.spec.stop_signal)
        done, _ = await asyncio.wait([task], timeout=child.spec.stop_timeout_s)
        if not done and process is not None:
            self._kill_group(process.pid)
            await asyncio.wait([task], timeout=KILL_TIMEOUT_S)
        if not task.done():
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if child.status.health not in (Health.DONE, Health.FAILED):
            self._set(child, Health.STOPPED)

    @staticmethod
    def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    @staticmethod
    def _kill_group(group: int) -> None:
        """End what a child started and left behind; its session has the child's pid as its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)

    async def _trim_logs(self) -> None:
        while True:
            await asyncio.sleep(LOG_CHECK_S)
            for child in list(self._children.values()):
                await asyncio.to_thread(child.log.trim)


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
