"""A ledger on the real PostgreSQL whose clock the tests set, so that lapses, expiries, midnights and months need no waiting.

The stored functions ask `clock_timestamp()` without naming its schema: connections made here find one of ours before PostgreSQL's own.
It also lets a test stop a function in the middle: it waits there as long as the test holds the lock that the connection names.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from servicekit import database
from servicekit.settings import DatabaseSettings

START = datetime(2031, 3, 14, 12, tzinfo=UTC)
"""In the middle of a day and of a month."""
END = datetime(2999, 1, 1, tzinfo=UTC)
"""By then everything is over."""
SWEEP_MAX = 1_000_000
CONNECTIONS_MAX = 24
WAIT_TIMEOUT_S = 20
POLL_INTERVAL_S = 0.002

_SET_UP = (
    "CREATE SCHEMA test_clock",
    "CREATE TABLE test_clock.moments (moment timestamptz NOT NULL)",
    f"INSERT INTO test_clock.moments VALUES ('{START.isoformat()}')",
    """
    CREATE FUNCTION test_clock.clock_timestamp() RETURNS timestamptz LANGUAGE plpgsql AS $$
    DECLARE
        gate constant text := current_setting('test_clock.gate', true);
    BEGIN
        IF gate <> '' THEN
            PERFORM pg_advisory_xact_lock_shared(gate::bigint);
        END IF;
        RETURN (SELECT moment FROM test_clock.moments);
    END
    $$
    """,
)

Call = Callable[[AsyncConnection], Awaitable[Any]]


class ClockedLedger:
    """The ledger, its clock and its locks."""

    def __init__(self, url: str, engine: AsyncEngine) -> None:
        self.url = url
        self.engine = engine
        self.now = START

    async def set_up(self) -> None:
        """Make the clock, once a database."""
        async with self.engine.connect() as connection:
            for statement in _SET_UP:
                await connection.execute(sa.text(statement))

    async def set_time(self, moment: datetime) -> None:
        """What time it is from now on."""
        async with self.engine.connect() as connection:
            await connection.execute(sa.text("UPDATE test_clock.moments SET moment = :moment"), {"moment": moment})
        self.now = moment

    async def advance(self, duration: timedelta) -> None:
        """Let time pass."""
        await self.set_time(self.now + duration)

    async def do(self, call: Call) -> Any:
        """One operation on a connection of its own."""
        async with self.engine.connect() as connection:
            return await call(connection)

    async def query(self, statement: str, **parameters: Any) -> Sequence[Any]:
        """The rows of a statement that has any."""
        async with self.engine.connect() as connection:
            result = await connection.execute(sa.text(statement), parameters)
            return result.all() if result.returns_rows else ()

    async def at_once(self, *calls: Call, behind: uuid.UUID | None = None) -> list[Any]:
        """What operations answer that start together, each on a connection of its own.

        `behind` a user, whose account is locked until as many of them as ever will wait for it: they go through one right after another.
        """
        gate = asyncio.Barrier(len(calls))

        async def one(call: Call) -> Any:
            async with self.engine.connect() as connection:
                await gate.wait()
                return await call(connection)

        if behind is None:
            return list(await asyncio.gather(*map(one, calls)))
        async with self.locked("SELECT 1 FROM credits.accounts WHERE user_id = :user_id FOR UPDATE", user_id=behind):
            tasks = [asyncio.create_task(one(call)) for call in calls]
            await self.wait_until(lambda waiting: waiting + sum(task.done() for task in tasks) == len(tasks))
        return list(await asyncio.gather(*tasks))

    @asynccontextmanager
    async def locked(self, statement: str, **parameters: Any) -> AsyncGenerator[None]:
        """What the statement locks stays locked in the block."""
        async with self.engine.connect() as connection:
            await connection.execute(sa.text("BEGIN"))
            try:
                await connection.execute(sa.text(statement), parameters)
                yield
            finally:
                await connection.execute(sa.text("ROLLBACK"))

    async def waiting(self) -> list[int]:
        """The backends that wait for a lock."""
        rows = await self.query("SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")
        return [row.pid for row in rows]

    async def wait_until(self, condition: Callable[[int], bool]) -> None:
        """Until the number of backends that wait for a lock is right."""
        async with asyncio.timeout(WAIT_TIMEOUT_S):
            while not condition(len(await self.waiting())):  # noqa: ASYNC110  # PostgreSQL gives no sign
                await asyncio.sleep(POLL_INTERVAL_S)

    async def start_over(self) -> None:
        """Bring the clock to START, with nothing left from earlier that could end some time."""
        await self.set_time(END)
        await self.query(f"SELECT credits.expire_holds({SWEEP_MAX})")
        await self.query(f"SELECT credits.lapse_due({SWEEP_MAX})")
        await self.set_time(START)

    async def check_books(self) -> None:
        """Everything adds up: no discrepancy, and all entries sum to zero."""
        assert await self.query("SELECT * FROM credits.discrepancies") == []
        ((total,),) = await self.query("SELECT coalesce(sum(amount_millicredits), 0) FROM credits.entries")
        assert total == 0


@asynccontextmanager
async def clocked_ledger(url: str) -> AsyncGenerator[ClockedLedger]:
    """The ledger in a migrated database of its own."""
    settings = DatabaseSettings.model_validate({"database_url": url, "database_pool_size": CONNECTIONS_MAX})
    engine = database.create_engine(settings, schema="test_clock, pg_catalog", application="test").execution_options(
        isolation_level="AUTOCOMMIT"
    )
    try:
        yield ClockedLedger(url, engine)
    finally:
        await engine.dispose()
