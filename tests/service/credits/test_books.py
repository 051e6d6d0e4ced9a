"""What PostgreSQL itself guarantees: append-only, balanced, bounded, swept; and that `tables.py` tells the truth about it."""

import asyncio
import uuid
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from importlib import resources

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from credit_service import app, store
from credit_service.ledger import Outcome, State, Swept
from credit_service.tables import SCHEMA, metadata
from servicekit.database import migrate
from servicekit.settings import DatabaseSettings
from tests.service.credits.conftest import Databases

INT64_MAX = 2**63 - 1
OVERDUE = timedelta(microseconds=1)
HOUR = timedelta(hours=1)
OLD_HOLDS = 2500
"""More than two batches of the migration that fills in their jobs."""


@pytest.fixture
async def connection(engine: AsyncEngine):
    """A connection in autocommit."""
    async with engine.connect() as connection:
        yield connection


async def grant(connection: AsyncConnection, user_id: uuid.UUID, amount_millicredits: int) -> Outcome:
    answer = await store.grant(
        connection,
        actor_id=uuid.uuid4(),
        request_id=uuid.uuid4(),
        user_id=user_id,
        amount_millicredits=amount_millicredits,
        reason="test",
    )
    return answer.outcome


async def sides(connection: AsyncConnection, user_id: uuid.UUID) -> tuple[int, int]:
    balance = await store.balance(connection, user_id=user_id)
    return balance.available_millicredits, balance.reserved_millicredits


async def hold(connection: AsyncConnection, user_id: uuid.UUID, amount_millicredits: int, ttl: timedelta = HOUR) -> uuid.UUID:
    reservation_id = uuid.uuid4()
    answer = await store.reserve(
        connection,
        reservation_id=reservation_id,
        job_id=reservation_id,
        user_id=user_id,
        amount_millicredits=amount_millicredits,
        ttl=ttl,
    )
    assert answer.outcome is Outcome.OK
    return reservation_id


@pytest.mark.parametrize("table", ["entries", "events", "grants"])
@pytest.mark.parametrize("change", ["UPDATE credits.{} SET event_id = event_id", "DELETE FROM credits.{}", "TRUNCATE credits.{} CASCADE"])
async def test_history_cannot_be_changed_by_the_service(connection: AsyncConnection, user_id: uuid.UUID, table: str, change: str):
    await grant(connection, user_id, 1)
    with pytest.raises(DBAPIError) as raised:
        await connection.execute(sa.text(change.format(table)))
    # 42501: the role has no right to; 23001, 428C9: it has, and is refused all the same.
    assert getattr(raised.value.orig, "sqlstate", None) in ("42501", "23001", "428C9")


@pytest.mark.parametrize("table", ["entries", "events", "grants"])
@pytest.mark.parametrize("change", ["UPDATE credits.{0} SET {1} = {1}", "DELETE FROM credits.{0}", "TRUNCATE credits.{0} CASCADE"])
async def test_history_cannot_be_changed_by_a_role_that_took_its_rights_back(
    connection: AsyncConnection, user_id: uuid.UUID, table: str, change: str
):
    await grant(connection, user_id, 1)
    column = {"entries": "account", "events": "kind", "grants": "reason"}[table]
    await connection.execute(sa.text("BEGIN"))
    try:
        await connection.execute(sa.text("GRANT ALL ON ALL TABLES IN SCHEMA credits TO CURRENT_USER"))
        with pytest.raises(DBAPIError, match="append-only"):
            await connection.execute(sa.text(change.format(table, column)))
    finally:
        await connection.execute(sa.text("ROLLBACK"))


async def test_entries_that_do_not_balance_are_not_written(connection: AsyncConnection, user_id: uuid.UUID):
    await grant(connection, user_id, 1)
    write = sa.text(
        "WITH event AS (INSERT INTO credits.events (kind, create_time) VALUES ('grant', now()) RETURNING event_id)"
        " INSERT INTO credits.entries (event_id, account, user_id, amount_millicredits, balance_after_millicredits)"
        " SELECT event_id, 'available', :user_id, 5, 6 FROM event"
    )
    with pytest.raises(DBAPIError, match="sum to zero"):
        await connection.execute(write, {"user_id": user_id})
    assert await sides(connection, user_id) == (1, 0)


@pytest.mark.parametrize("side", ["available_millicredits", "reserved_millicredits"])
async def test_no_balance_is_below_zero(connection: AsyncConnection, user_id: uuid.UUID, side: str):
    await grant(connection, user_id, 1)
    with pytest.raises(DBAPIError, match=r"accounts_.*check"):
        await connection.execute(sa.text(f"UPDATE credits.accounts SET {side} = -1 WHERE user_id = :user_id"), {"user_id": user_id})


async def test_a_grant_that_would_overflow_the_balance_moves_nothing(connection: AsyncConnection, user_id: uuid.UUID):
    assert await grant(connection, user_id, INT64_MAX) is Outcome.OK
    reservation_id = await hold(connection, user_id, INT64_MAX - 10)
    # There is room on the available side, but none for the hold to come back to.
    assert await grant(connection, user_id, 1) is Outcome.AMOUNT_OUT_OF_RANGE
    assert await sides(connection, user_id) == (10, INT64_MAX - 10)
    await store.capture(connection, reservation_id=reservation_id, amount_millicredits=1)
    assert await grant(connection, user_id, 2) is Outcome.AMOUNT_OUT_OF_RANGE
    assert await grant(connection, user_id, 1) is Outcome.OK
    assert await sides(connection, user_id) == (INT64_MAX, 0)


async def test_a_balance_that_entries_do_not_prove_is_a_discrepancy(connection: AsyncConnection, user_id: uuid.UUID):
    await grant(connection, user_id, 10)
    await hold(connection, user_id, 4)
    found = sa.text("SELECT problem FROM credits.discrepancies WHERE subject = :user_id ORDER BY problem")
    await connection.execute(sa.text("BEGIN"))
    try:
        await connection.execute(
            sa.text("UPDATE credits.accounts SET available_millicredits = 11, reserved_millicredits = 5 WHERE user_id = :user_id"),
            {"user_id": user_id},
        )
        assert (await connection.execute(found, {"user_id": str(user_id)})).scalars().all() == [
            "balance differs from entries: available",
            "balance differs from entries: reserved",
            "reserved balance differs from open holds",
        ]
    finally:
        await connection.execute(sa.text("ROLLBACK"))


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE credits.accounts SET available_millicredits = available_millicredits + 1 WHERE user_id = :user_id",
        "UPDATE credits.accounts SET reserved_millicredits = reserved_millicredits + 1 WHERE user_id = :user_id",
        "INSERT INTO credits.accounts (user_id, available_millicredits)"
        " SELECT gen_random_uuid(), 5 FROM credits.accounts WHERE user_id = :user_id",
    ],
)
async def test_a_balance_does_not_change_without_the_entries_that_prove_it(connection: AsyncConnection, user_id: uuid.UUID, change: str):
    await grant(connection, user_id, 10)
    with pytest.raises(DBAPIError, match="do not prove the balance"):
        await connection.execute(sa.text(change), {"user_id": user_id})
    assert await sides(connection, user_id) == (10, 0)


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM credits.accounts",
        "UPDATE credits.accounts SET user_id = gen_random_uuid()",
        "UPDATE credits.reservations SET amount_millicredits = 1",
        "UPDATE credits.reservations SET user_id = gen_random_uuid()",
        "DELETE FROM credits.reservations",
        "UPDATE credits.lots SET expire_time = now()",
        "DELETE FROM credits.lots",
    ],
)
async def test_what_a_hold_or_a_lot_is_about_does_not_change(connection: AsyncConnection, change: str):
    with pytest.raises(DBAPIError, match="permission denied"):
        await connection.execute(sa.text(change))


async def test_one_hold_that_cannot_be_ended_keeps_no_other(connection: AsyncConnection, user_id: uuid.UUID):
    await store.expire_holds(connection, limit=1000)  # what other tests left
    await grant(connection, user_id, 100)
    broken, other = await hold(connection, user_id, 10, OVERDUE), await hold(connection, user_id, 20, OVERDUE)
    refuse = (
        "CREATE FUNCTION credits.break_a_hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'broken'; END $$",
        "CREATE TRIGGER broken BEFORE UPDATE ON credits.reservations FOR EACH ROW"
        f" WHEN (NEW.reservation_id = '{broken}') EXECUTE FUNCTION credits.break_a_hold()",
    )
    try:
        for statement in refuse:
            await connection.execute(sa.text(statement))
        swept = await store.expire_holds(connection, limit=10)
    finally:
        await connection.execute(sa.text("DROP FUNCTION credits.break_a_hold CASCADE"))
    assert sorted((one.user_id, one.problem or "") for one in swept) == [
        (user_id, ""),
        (user_id, f"reservation {broken}: broken"),
    ]
    assert await sides(connection, user_id) == (90, 10)
    assert (await store.get_reservation(connection, reservation_id=other)).reservation is not None
    assert await store.expire_holds(connection, limit=10) == [Swept(user_id, None)]


async def test_a_service_that_is_not_restarted_yet_goes_on_after_the_migration(connection: AsyncConnection, user_id: uuid.UUID):
    # The statements of the release before.
    await store.expire_holds(connection, limit=1000)
    reservation_ids = [uuid.uuid4() for _ in range(3)]
    await connection.execute(
        sa.text("SELECT * FROM credits.grant_credits(:id, :id, :user_id, 100, 'test')"), {"id": uuid.uuid4(), "user_id": user_id}
    )
    for reservation_id, ttl in zip(reservation_ids, (HOUR, HOUR, OVERDUE), strict=True):
        held = sa.text("SELECT * FROM credits.reserve(:id, :id, :user_id, 10, :ttl)")
        row = (await connection.execute(held, {"id": reservation_id, "user_id": user_id, "ttl": ttl})).one()
        assert (row.outcome, row.amount_millicredits) == ("ok", 10)
    captured = sa.text("SELECT * FROM credits.capture(:id, 4)")
    assert (await connection.execute(captured, {"id": reservation_ids[0]})).one().outcome == "ok"
    released = sa.text("SELECT * FROM credits.release(:id)")
    assert (await connection.execute(released, {"id": reservation_ids[1]})).one().outcome == "ok"
    assert (await connection.execute(sa.text("SELECT credits.expire_due(10)"))).scalar_one() == 1
    assert await sides(connection, user_id) == (96, 0)


async def test_overdue_holds_are_swept_in_bounded_batches_and_others_are_left(connection: AsyncConnection, user_id: uuid.UUID):
    await grant(connection, user_id, 100)
    await store.expire_holds(connection, limit=1000)  # what other tests left
    overdue = [await hold(connection, user_id, 10, OVERDUE) for _ in range(3)]
    current = await hold(connection, user_id, 10)
    assert len(await store.expire_holds(connection, limit=2)) == 2
    assert len(await store.expire_holds(connection, limit=2)) == 1
    assert len(await store.expire_holds(connection, limit=2)) == 0
    states: list[State] = []
    for reservation_id in (*overdue, current):
        answer = await store.get_reservation(connection, reservation_id=reservation_id)
        assert answer.reservation is not None
        states.append(answer.reservation.state)
    assert states == [State.EXPIRED, State.EXPIRED, State.EXPIRED, State.HELD]
    assert await sides(connection, user_id) == (90, 10)


async def test_the_sweep_does_not_wait_for_a_busy_account(connection: AsyncConnection, engine: AsyncEngine, user_id: uuid.UUID):
    other = uuid.uuid4()
    for owner in (user_id, other):
        await grant(connection, owner, 10)
    await store.expire_holds(connection, limit=1000)
    for owner in (user_id, other):
        await hold(connection, owner, 10, OVERDUE)
    async with engine.connect() as busy:
        await busy.execute(sa.text("BEGIN"))
        await busy.execute(sa.text("SELECT 1 FROM credits.accounts WHERE user_id = :user_id FOR UPDATE"), {"user_id": user_id})
        assert len(await store.expire_holds(connection, limit=1000)) == 1
        await busy.execute(sa.text("ROLLBACK"))
    assert await sides(connection, user_id) == (0, 10)
    assert len(await store.expire_holds(connection, limit=1000)) == 1
    assert await sides(connection, user_id) == (10, 0)


def shape(tables: sa.MetaData) -> dict[str, object]:
    """What tables.py tells its readers about each table."""
    dialect = postgresql.dialect()
    return {
        table.name: (
            [(column.name, column.type.compile(dialect), column.nullable, column.primary_key) for column in table.columns],
            {(key.parent.name, key.target_fullname) for key in table.foreign_keys},
        )
        for table in tables.tables.values()
        if table.name != "alembic_version"
    }


async def test_tables_are_what_the_migrations_make(connection: AsyncConnection):
    reflected = sa.MetaData()
    await connection.run_sync(partial(reflected.reflect, schema=SCHEMA, postgresql_ignore_search_path=True))
    assert shape(reflected) == shape(metadata)


def test_migrating_again_changes_nothing(migrated_database: Callable[[], str]):
    settings = DatabaseSettings.model_validate({"database_url": migrated_database()})
    migrate(settings, package="credit_service", schema=SCHEMA)


def test_holds_from_before_they_named_their_job_get_the_job_of_their_own_id(postgres: Databases):
    url = postgres.create_database()
    config = Config()
    config.set_main_option("script_location", str(resources.files("credit_service").joinpath("migrations")))
    config.attributes.update(database_url=url, schema=SCHEMA)
    settings = DatabaseSettings.model_validate({"database_url": url})
    command.upgrade(config, "0001")
    asyncio.run(
        execute(
            settings,
            f"SELECT credits.grant_credits('{uuid.uuid4()}', '{uuid.uuid4()}', '{uuid.UUID(int=1)}', {OLD_HOLDS}, 'test')",
            # Among them the lowest and the highest id there can be.
            "SELECT credits.reserve(id, '00000000-0000-0000-0000-000000000001', 1, '1 hour')"
            f" FROM (SELECT gen_random_uuid() FROM generate_series(3, {OLD_HOLDS})"
            f" UNION ALL VALUES ('{uuid.UUID(int=0)}'::uuid), ('{uuid.UUID(int=2**128 - 1)}'::uuid)) AS made (id)",
        )
    )
    migrate(settings, package="credit_service", schema=SCHEMA)
    (counts, discrepancies, left) = asyncio.run(
        execute(
            settings,
            "SELECT count(*), count(*) FILTER (WHERE job_id = reservation_id) FROM credits.reservations",
            "SELECT count(*), 0 FROM credits.discrepancies",
            # Neither the procedure that filled the column nor the old signature of reserve stays behind.
            "SELECT count(*) FILTER (WHERE proname = 'fill_job_ids'), count(*) FILTER (WHERE proname = 'reserve') FROM pg_proc"
            " WHERE pronamespace = 'credits'::regnamespace",
        )
    )[-3:]
    assert (counts, discrepancies, left) == ((OLD_HOLDS, OLD_HOLDS), (0, 0), (0, 1))


async def execute(settings: DatabaseSettings, *statements: str) -> list[tuple[object, ...]]:
    """The first row of each statement."""
    engine = app.create_engine(settings)
    try:
        async with engine.connect() as connection:
            return [tuple((await connection.execute(sa.text(statement))).first() or ()) for statement in statements]
    finally:
        await engine.dispose()
