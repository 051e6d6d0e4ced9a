"""The parts and the supervisor as the stack uses them: real PostgreSQL, Redis and S3, real processes that die."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import httpx
import psutil
import pytest
import pytest_asyncio

from cli.stack import Health, StackError
from cli.stack.ports import LOOPBACK, PortBlock, hold_block
from cli.stack.postgres import DATABASE, ROLE_BY_SERVICE, Postgres
from cli.stack.process import Phase, ProcessSpec
from cli.stack.supervisor import START_ATTEMPTS, Supervisor
from servicekit.objects import ObjectStore
from servicekit.settings import ObjectSettings, RedisSettings
from servicekit.streams import connect

if TYPE_CHECKING:
    from tests.conftest import PostgresServer

PASSWORDS = {role: f"password-of-{role}" for role in ROLE_BY_SERVICE.values()}
SLEEPER = "import time; time.sleep(600)"


@pytest_asyncio.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    yield supervisor
    await supervisor.stop()


@pytest.fixture
def ports(tmp_path: Path) -> Iterator[PortBlock]:
    with hold_block(None, tmp_path) as block:
        yield block


async def always_well() -> None:
    """A check that passes."""


def python(name: str, code: str, **more: object) -> ProcessSpec:
    fields: dict[str, object] = {"check": always_well, "phase": Phase.SERVICES} | more
    return ProcessSpec(name=name, service=name, role="test", argv=(sys.executable, "-c", code), env=dict(os.environ), **fields)  # pyright: ignore[reportArgumentType]


async def test_a_fresh_database_belongs_to_its_own_role(postgres: "PostgresServer") -> None:
    first, second = (postgres.create_database().replace("+asyncpg", "") for _ in range(2))
    connection = await asyncpg.connect(first)
    try:
        await connection.execute("CREATE SCHEMA thing")
        assert await connection.fetchval("SELECT current_database() = current_user")
    finally:
        await connection.close()
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(second.replace(second.split(":")[2].split("@")[0], "wrong"))


async def test_redis_refuses_those_without_the_password(redis_url: str) -> None:
    reader, writer = await asyncio.open_connection(LOOPBACK, int(redis_url.rpartition(":")[2].partition("/")[0]))
    writer.write(b"PING\r\n")
    assert (await reader.readline()).startswith(b"-NOAUTH")
    writer.close()
    await writer.wait_closed()
    async with connect(RedisSettings.model_validate({"redis_url": redis_url})) as client:
        assert await client.ping()


async def test_s3_stores_signs_and_refuses(s3: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    with ObjectStore(ObjectSettings()) as store:  # pyright: ignore[reportCallIssue]
        await store.ping()
        await store.put("a/picture.png", b"bytes", "image/png")
        url, _ = store.presign("a/picture.png", "image/png")
        async with httpx.AsyncClient() as client:
            answer = await client.get(url)
            assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"bytes", "image/png")
            assert (await client.get(url.partition("?")[0])).status_code in (400, 403)
        await store.delete("a/picture.png")
        await store.ping()  # the bucket outlives its last object


async def test_postgres_survives_kill_and_keeps_data_and_rights(supervisor: Supervisor, data_dir: Path, ports: PortBlock) -> None:
    directory = data_dir / "killed-postgres"
    directory.mkdir(mode=0o700)
    server = Postgres(directory, ports.port("postgres"), "top")
    await supervisor.start([server.spec(PASSWORDS)])
    gateway = server.dsn(DATABASE, role="genmesh_gateway", password=PASSWORDS["genmesh_gateway"])
    connection = await asyncpg.connect(gateway)
    await connection.execute("CREATE SCHEMA gateway; CREATE TABLE gateway.kept AS SELECT 42 AS answer")
    await connection.close()

    other = await asyncpg.connect(server.dsn(DATABASE, role="genmesh_jobs", password=PASSWORDS["genmesh_jobs"]))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await other.fetch("SELECT * FROM gateway.kept")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await other.execute("CREATE TABLE public.mine (a int)")

    pid = supervisor.status("postgres").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        await supervisor.until(lambda: supervisor.status("postgres").restarts > 0)
        await supervisor.until(lambda: supervisor.status("postgres").health is Health.HEALTHY)
    assert supervisor.status("postgres").pid != pid
    connection = await asyncpg.connect(gateway)
    assert await connection.fetchval("SELECT answer FROM gateway.kept") == 42
    await connection.close()
    other.terminate()


async def test_a_child_that_dies_is_started_again(supervisor: Supervisor) -> None:
    await supervisor.start([python("child", SLEEPER)])
    status = supervisor.status("child")
    for count in (1, 2):
        assert status.pid is not None
        os.kill(status.pid, signal.SIGKILL)
        async with asyncio.timeout(20):
            await supervisor.until(lambda count=count: status.restarts == count and status.health is Health.HEALTHY)


async def test_wrong_settings_fail_the_start_at_once(supervisor: Supervisor) -> None:
    code = "import sys; print('GENMESH_THING: expected a number', file=sys.stderr); sys.exit(78)"

    async def never() -> None:
        raise ConnectionRefusedError

    with pytest.raises(StackError, match="exit code 78") as caught:
        await supervisor.start([python("child", code, check=never)])
    assert caught.value.lines == ("GENMESH_THING: expected a number",)
    assert supervisor.status("child").restarts == 0


async def test_a_child_that_dies_again_and_again_fails_the_start(supervisor: Supervisor) -> None:
    async def never() -> None:
        raise ConnectionRefusedError

    with pytest.raises(StackError, match="exit code 3"):
        await supervisor.start([python("child", "raise SystemExit(3)", check=never)])
    assert supervisor.status("child").restarts == START_ATTEMPTS - 1


async def test_a_child_that_is_never_ready_fails_the_start_with_the_reason(supervisor: Supervisor) -> None:
    async def never() -> None:
        raise ConnectionRefusedError("nobody there")

    with pytest.raises(StackError, match=r"not ready within .*nobody there"):
        await supervisor.start([python("child", SLEEPER, check=never, start_timeout_s=0.3)])


async def test_order_of_start_and_stop(supervisor: Supervisor, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    code = (
        "import signal, sys; name = {name!r}\n"
        f"def note(what): open({str(journal)!r}, 'a').write(f'{{what}} {{name}}\\n')\n"
        "def end(*_): note('stop'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end); note('start'); signal.pause()"
    ).replace("{{", "{").replace("}}", "}")  # fmt: skip

    def noted(name: str) -> "ProcessSpec":
        async def check() -> None:
            assert f"start {name}" in journal.read_text()

        phase = {"part": Phase.PARTS, "service": Phase.SERVICES, "edge": Phase.EDGE}[name]
        after = {"part": (), "service": ("step",), "edge": ("service",)}[name]
        return python(name, code.replace("{name!r}", repr(name)), check=check, phase=phase, after=after)

    step = python("step", f"open({str(journal)!r}, 'a').write('step\\n')", check=None, phase=Phase.MIGRATIONS, after=("part",))
    await supervisor.start([noted("edge"), noted("service"), step, noted("part")])
    assert supervisor.status("step").health is Health.DONE
    await supervisor.stop()
    expected = ["start part", "step", "start service", "start edge", "stop edge", "stop service", "stop part"]
    assert journal.read_text().splitlines() == expected


async def test_nothing_is_left_of_a_child_that_will_not_stop(supervisor: Supervisor, tmp_path: Path) -> None:
    """A child that ignores SIGTERM is killed, and so is what it started itself."""
    pids = tmp_path / "pids"
    code = (
        "import os, signal, subprocess, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"inner = subprocess.Popen([sys.executable, '-c', {SLEEPER!r}])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{inner.pid}}'); signal.pause()"
    )

    async def check() -> None:
        assert len(pids.read_text().split()) == 2

    await supervisor.start([python("stubborn", code, check=check, stop_timeout_s=0.2)])
    family = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
    await supervisor.stop()
    _, alive = await asyncio.to_thread(psutil.wait_procs, family, timeout=5)
    assert alive == []


def test_children_die_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import asyncio, os, sys; from pathlib import Path\n"
        "from cli.stack.process import Phase, ProcessSpec; from cli.stack.supervisor import Supervisor\n"
        "async def well(): pass\n"
        "async def main():\n"
        "    supervisor = Supervisor(Path(sys.argv[1]))\n"
        f"    argv = (sys.executable, '-c', {SLEEPER!r})\n"
        "    spec = ProcessSpec(name='c', service='c', role='r', argv=argv, phase=Phase.PARTS, env=dict(os.environ), check=well)\n"
        "    await supervisor.start([spec])\n"
        "    print(supervisor.status('c').pid, flush=True); await supervisor.failed()\n"
        "asyncio.run(main())"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait()
        child.wait(timeout=10)
    assert not child.is_running()
