"""PostgreSQL through SQLAlchemy Core and asyncpg: engine, transactions, migrations, errors of the driver in our words.

SQL itself lives in each service's `store.py`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, DisconnectionError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from servicekit.errors import MeshError, Reason, unavailable
from servicekit.settings import DatabaseSettings

CONNECT_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 2.0
RETRY_AFTER_S = 0.5
MIGRATION_LOCK_POLL_S = 0.1


def create_engine(settings: DatabaseSettings, *, schema: str, application: str, autocommit: bool = False) -> AsyncEngine:
    """An engine whose connections use `schema` and end statements and idle transactions that take too long.

    `autocommit`: every statement is a transaction of its own, and `transaction` makes none.
    """
    statement_ms = int(settings.database_statement_timeout_s * 1000)
    engine = create_async_engine(
        settings.database_url.get_secret_value(),
        # Set once a connection: as an option of an engine or a connection it is set and taken back at every checkout.
        **({"isolation_level": "AUTOCOMMIT"} if autocommit else {}),
        pool_size=settings.database_pool_size,
        max_overflow=0,
        pool_timeout=settings.database_pool_timeout_s,
        hide_parameters=True,  # errors are logged, and parameters are users' data
        # A ping before every transaction would cost a round trip; `_refuse_closed` sees the same in most cases.
        pool_pre_ping=False,
        connect_args={
            "timeout": CONNECT_TIMEOUT_S,
            "server_settings": {
                "application_name": application,
                "search_path": schema,
                "statement_timeout": str(statement_ms),
                # A cancelled task can leave a connection with locks (asyncpg #464): the server ends it.
                "idle_in_transaction_session_timeout": str(statement_ms),
            },
        },
    )
    event.listen(engine.sync_engine, "checkout", _refuse_closed)
    return engine


def _refuse_closed(adapted: Any, *_: Any) -> None:
    """Have the pool replace a connection that was closed while it lay there: after a restart of PostgreSQL all of them are."""
    if adapted.driver_connection.is_closed():
        raise DisconnectionError


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncGenerator[AsyncConnection]:
    """A connection in a transaction: committed at the end of the block, rolled back on any exception.

    Giving the connection back is shielded from cancellation, so that a client that goes away cannot leak it.
    """
    connection = await engine.connect()
    try:
        async with connection.begin():
            yield connection
    finally:
        await asyncio.shield(asyncio.ensure_future(connection.close()))


@asynccontextmanager
async def autocommit(engine: AsyncEngine) -> AsyncGenerator[AsyncConnection]:
    """A connection on which every statement is a transaction of its own: two round trips less than `transaction`."""
    connection = await engine.connect()
    try:
        if not _pooled(connection).dbapi_connection.autocommit:
            await connection.execution_options(isolation_level="AUTOCOMMIT")
        yield connection
    finally:
        # Nothing is to be rolled back, so nothing is waited for, and no cancellation can come in between.
        _sync(connection).close()


reading = autocommit
"""For queries that need no transaction around them."""


async def fetch_row(source: AsyncEngine | AsyncConnection, statement: str, *arguments: object) -> dict[str, Any]:
    """The row of a statement ($1 …) that always has one and is a transaction of its own; with an engine, on a connection just for it.

    The driver gets it as it is, in one round trip: SQLAlchemy's ways to a connection, a statement and a result take several times its
    processor time. Raises the driver's errors, which `translate` knows.
    """
    if isinstance(source, AsyncConnection):
        pooled = _pooled(source)
        if not pooled.dbapi_connection.autocommit:
            raise RuntimeError("the statement would not be part of the connection's transaction")
        return await _fetch_row(pooled.driver_connection, statement, arguments)
    pooled: Any = await source.raw_connection()
    try:
        return await _fetch_row(pooled.driver_connection, statement, arguments)
    finally:
        pooled.close()  # nothing is waited for: see `autocommit`


async def _fetch_row(driver: asyncpg.Connection, statement: str, arguments: tuple[object, ...]) -> dict[str, Any]:
    try:
        row = await driver.fetchrow(statement, *arguments)
    except asyncpg.PostgresError:
        raise  # the connection is as good as before, or closed
    except BaseException:
        # Cancelled in the middle, for one: closing it tells PostgreSQL to stop, and the pool replaces what is closed.
        await asyncio.shield(asyncio.ensure_future(_close(driver)))
        raise
    assert row is not None
    return dict(row)


async def _close(driver: asyncpg.Connection) -> None:
    with suppress(OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        await driver.close(timeout=CLOSE_TIMEOUT_S)


def _sync(connection: AsyncConnection) -> sa.Connection:
    """What needs no greenlet as long as it does not wait for PostgreSQL; a greenlet costs about as much as the driver does."""
    assert connection.sync_connection is not None
    return connection.sync_connection


def _pooled(connection: AsyncConnection) -> Any:
    return _sync(connection).connection


@asynccontextmanager
async def snapshot(engine: AsyncEngine) -> AsyncGenerator[AsyncConnection]:
    """A connection in a read-only transaction that sees the database as it was at its first query, for as long as it lasts."""
    connection = await engine.connect()
    try:
        await connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        async with connection.begin():
            yield connection
    finally:
        await asyncio.shield(asyncio.ensure_future(connection.close()))


async def ping(engine: AsyncEngine) -> None:
    """Raise unless the database answers."""
    async with reading(engine) as connection:
        await connection.execute(sa.text("SELECT 1"))


def translate(error: Exception) -> MeshError | None:
    """Driver and pool errors as typed errors; None for what is not one of them."""
    if isinstance(error, PoolTimeoutError):
        return MeshError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            Reason.ERROR_REASON_LIMIT_REACHED,
            "the database is busy; try again",
            retry_after_s=RETRY_AFTER_S,
        )
    out_of_reach = isinstance(error, (OperationalError, InterfaceError, OSError, TimeoutError, asyncpg.InterfaceError))
    if isinstance(error, (DBAPIError, asyncpg.PostgresError)):
        origin = error.orig if isinstance(error, DBAPIError) else error
        cause = getattr(origin, "sqlstate", None) or getattr(origin, "pgcode", None)
        # 08: connection; 40: serialization failure, deadlock; 53: out of resources; 57: shutdown, cancelled by time-out.
        out_of_reach |= str(cause)[:2] in ("08", "40", "53", "57")
        out_of_reach |= isinstance(error, DBAPIError) and error.connection_invalidated
    return unavailable("the database is out of reach right now", RETRY_AFTER_S) if out_of_reach else None


def migrate(settings: DatabaseSettings, *, package: str, schema: str) -> None:
    """Bring the schema of a service to its newest revision. Safe to run from several processes at once.

    `package` has a `migrations` directory with Alembic's `env.py` calling `run_migrations`.
    """
    # Only this needs Alembic: services start half a second sooner without it.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(resources.files(package).joinpath("migrations")))
    config.attributes["database_url"] = settings.database_url.get_secret_value()
    config.attributes["schema"] = schema
    command.upgrade(config, "head")


def run_script(migration: str) -> None:
    """Run the SQL that lies beside a revision (`0001_name.py` → `0001_name.sql`), in the revision's transaction.

    Migrations are SQL files, for people and for the linter that reads them; call this from `upgrade` with `__file__`.
    """
    from alembic import op

    # SQLAlchemy prepares every statement, and PostgreSQL prepares only one at a time; the driver itself takes a script whole.
    connection: Any = op.get_bind().connection.dbapi_connection
    connection.run_async(lambda driver: driver.execute(_script(migration)))


def run_script_outside_transaction(migration: str) -> None:
    """Run the SQL beside a revision statement by statement, each on its own: for CREATE INDEX CONCURRENTLY, which must not hold up
    writers. Each has to bear being run again, as a revision that fails half-way is. No `;` but between statements."""
    from alembic import op

    with op.get_context().autocommit_block():
        for statement in _script(migration).split(";"):
            if statement.strip():
                op.get_bind().exec_driver_sql(statement)


def _script(migration: str) -> str:
    return Path(migration).with_suffix(".sql").read_text(encoding="utf-8")


def run_migrations(context: Any) -> None:
    """Body of every service's `migrations/env.py`: online, a transaction a revision, under an advisory lock."""
    attributes = context.config.attributes
    schema: str = attributes["schema"]

    def upgrade(connection: sa.Connection) -> None:
        # The session's lock and path, not a transaction's: every revision has a transaction of its own. Both end with the connection.
        # Asked again and again, not waited for: CREATE INDEX CONCURRENTLY waits for every statement under way, a waiting one included.
        lock = sa.text("SELECT pg_try_advisory_lock(hashtext(:name))")
        while not connection.execute(lock, {"name": f"genmesh.migrate.{schema}"}).scalar_one():
            connection.commit()
            time.sleep(MIGRATION_LOCK_POLL_S)
        connection.execute(sa.schema.CreateSchema(schema, if_not_exists=True))
        connection.execute(sa.text(f"SET search_path TO {schema}"))
        connection.commit()
        context.configure(connection=connection, version_table_schema=schema, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()

    async def main() -> None:
        engine = create_async_engine(attributes["database_url"])
        try:
            async with engine.connect() as connection:
                await connection.run_sync(upgrade)
        finally:
            await engine.dispose()

    asyncio.run(main())
