"""What can be done to a running stack: processes killed and frozen, stores emptied, stopped and locked, points armed.

Each control takes back what it did; `heal` takes back all that is left. Disks that fill up cannot be had without a file system of
our own: `store_refuses` is what the services see of it, a store that answers 500.
"""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import psutil
from redis import asyncio as redis

from cli.stack import Health, Stack
from cli.stack.parts import BUCKET
from tests.faults import launcher

BACK_S = 90.0
"""How long a process may take to be back: a model takes seconds to load, on a busy machine many."""
POLL_S = 0.02
DEADLOCK_OURS_S = 60
"""PostgreSQL ends the transaction that looks first; ours looks so late that it is always the other one."""
AOF_TAIL_BYTES = 64 * 1024


class Controls:
    """Faults of one stack."""

    def __init__(self, stack: Stack, faults_dir: Path) -> None:
        self._stack = stack
        self._faults_dir = faults_dir
        self._frozen: set[int] = set()
        self._struck: dict[tuple[str, str], int] = {}
        self._bucket = stack.state.directory("objects") / BUCKET
        self._bucket_away = self._bucket.with_suffix(".away")

    # --- processes --------------------------------------------------------------------------------------------------------

    def pid(self, name: str) -> int | None:
        """Pid of a process; None while it is down."""
        return self._stack.process(name).pid

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal; how often the process had been restarted before. The supervisor starts it again."""
        restarts = self._stack.process(name).restarts
        pid = self.pid(name)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        return restarts

    async def back(self, name: str, restarts: int) -> None:
        """Wait until a process has been restarted and is healthy."""
        async with asyncio.timeout(BACK_S):
            await self._stack.until(
                lambda: self._stack.process(name).restarts > restarts and self._stack.process(name).health is Health.HEALTHY
            )

    async def restart(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Kill a process and wait until it is back."""
        await self.back(name, self.kill(name, number))

    def kill_model(self, replica: str) -> None:
        """Kill the model process of a replica, as the kernel does when memory runs out."""
        pid = self.pid(replica)
        if pid is not None:
            with suppress(psutil.NoSuchProcess):
                for child in psutil.Process(pid).children():
                    if "spawn_main" in " ".join(child.cmdline()):
                        child.kill()

    def freeze(self, name: str) -> None:
        """SIGSTOP a process: it keeps its connections and does nothing."""
        pid = self.pid(name)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self._frozen.add(pid)

    def thaw(self, name: str) -> None:
        """SIGCONT a process."""
        pid = self.pid(name)
        if pid is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self._frozen.discard(pid)

    @asynccontextmanager
    async def frozen(self, name: str) -> AsyncGenerator[None]:
        """A process does nothing while the block runs."""
        self.freeze(name)
        try:
            yield
        finally:
            self.thaw(name)

    # --- points -----------------------------------------------------------------------------------------------------------

    def arm(self, process: str, point: str, *, match: Sequence[str] = (), always: bool = False) -> None:
        """Make a process end when it reaches a point (see `launcher.POINTS`), once or always."""
        assert point in launcher.POINTS
        self._struck[process, point] = self.strikes(process, point)
        file = launcher.armed_file(self._faults_dir, process, point)
        complete = file.with_suffix(".new")
        complete.write_text(json.dumps({"match": list(match), "always": always}))
        complete.rename(file)

    def disarm(self, process: str, point: str) -> None:
        """Let it go on living."""
        launcher.armed_file(self._faults_dir, process, point).unlink(missing_ok=True)

    def strikes(self, process: str, point: str) -> int:
        """How often a process ended at a point."""
        with suppress(FileNotFoundError):
            return len(launcher.struck_file(self._faults_dir, process, point).read_text().splitlines())
        return 0

    async def struck(self, process: str, point: str, times: int = 1) -> None:
        """Wait until a process has ended at a point so often since it was armed."""
        async with asyncio.timeout(BACK_S):
            while self.strikes(process, point) < self._struck[process, point] + times:  # noqa: ASYNC110  # no event crosses processes
                await asyncio.sleep(POLL_S)

    async def struck_any(self, processes: tuple[str, ...], point: str) -> str:
        """Wait until one of the processes has ended at a point since it was armed; the point is disarmed in the others."""
        async with asyncio.timeout(BACK_S):
            while True:
                for process in processes:
                    if self.strikes(process, point) > self._struck[process, point]:
                        for other in processes:
                            self.disarm(other, point)
                        return process
                await asyncio.sleep(POLL_S)

    # --- Redis ------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def redis(self) -> AsyncGenerator[Any]:
        """A client of the stack's Redis."""
        client: Any = redis.Redis.from_url(self._stack.redis_url, socket_timeout=5, socket_connect_timeout=2)
        try:
            yield client
        finally:
            await client.aclose()

    async def flush_redis(self) -> None:
        """Everything in Redis is gone."""
        async with self.redis() as client:
            await client.flushall()

    def forget_redis(self) -> int:
        """Kill Redis, and take the newest part of its append-only file: what a machine that loses power has not yet written."""
        # Without a pause in between: the supervisor, which starts Redis again, runs in this very event loop.
        pid = self.pid("redis")
        restarts = self.kill("redis")
        if pid is not None:
            _wait_until_dead(pid)
        newest = max(self._stack.state.directory("redis").rglob("*.aof"), key=lambda file: file.stat().st_mtime)
        os.truncate(newest, max(0, newest.stat().st_size - AOF_TAIL_BYTES))
        return restarts

    # --- PostgreSQL -------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def superuser(self) -> AsyncGenerator[asyncpg.Connection]:
        """A connection of its own."""
        connection = await asyncpg.connect(self._stack.database_url("postgres").replace("+asyncpg", ""), timeout=60)
        try:
            yield connection
        finally:
            with suppress(Exception):
                await connection.close(timeout=5)

    async def end_connections(self, application: str = "") -> int:
        """End the connections of services whose name begins so; how many there were."""
        async with self.superuser() as connection:
            ended = await connection.fetch(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend' AND application_name LIKE $1 || '%'"
                " AND application_name <> ''",
                application,
            )
        return len(ended)

    @asynccontextmanager
    async def locked(self, table: str) -> AsyncGenerator[asyncpg.Connection]:
        """Nobody else can use a table while the block runs: every transaction that touches it waits, with its connection."""
        async with self.superuser() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(f"SET LOCAL deadlock_timeout = '{DEADLOCK_OURS_S}s'")
            await connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            try:
                yield connection
            finally:
                with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                    await transaction.rollback()

    # --- S3 ---------------------------------------------------------------------------------------------------------------

    def refuse_media(self) -> None:
        """The store answers every write and read with an error, until `accept_media`: a file stands where the bucket was."""
        self._bucket.rename(self._bucket_away)
        self._bucket.write_text("not a directory")

    def accept_media(self) -> None:
        """The bucket is back."""
        if self._bucket_away.exists():
            self._bucket.unlink()
            self._bucket_away.rename(self._bucket)

    # --- afterwards -------------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Take back what is still in force."""
        for file in self._faults_dir.iterdir():
            if file.suffix != ".struck":
                file.unlink()
        for pid in list(self._frozen):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self._frozen.discard(pid)
        self.accept_media()


def _wait_until_dead(pid: int) -> None:
    deadline = time.monotonic() + BACK_S
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(POLL_S)
