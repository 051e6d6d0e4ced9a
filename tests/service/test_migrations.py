"""`tables.py`, which queries are written with, is what the migrations make. (credit_service: tests/service/credits/test_books.py.)"""

import asyncio
import os
import sys
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.exc import DBAPIError

import gateway.tables
import jobs_service.tables
from servicekit.database import create_engine, migrate
from servicekit.settings import DatabaseSettings
from tests.conftest import PostgresServer

PROCESS_TIMEOUT_S = 60


@pytest.mark.parametrize(
    ("package", "schema", "metadata"),
    [("gateway", "gateway", gateway.tables.metadata), ("jobs_service", "jobs", jobs_service.tables.metadata)],
)
async def test_tables_are_what_the_migrations_make(postgres: PostgresServer, package: str, schema: str, metadata: sa.MetaData):
    settings = DatabaseSettings.model_validate({"database_url": postgres.create_database()})

    def differences(connection: sa.Connection) -> list[Any]:
        def ours(_item: Any, name: str | None, kind: str, _reflected: bool, _other: Any) -> bool:
            # Indexes are for speed and stand in the migration alone.
            return kind not in ("index", "unique_constraint") and name != "alembic_version"

        return compare_metadata(MigrationContext.configure(connection, opts={"include_object": ours, "compare_type": True}), metadata)

    # Alembic brings its own event loop.
    await asyncio.to_thread(migrate, settings, package=package, schema=schema)
    engine = create_engine(settings, schema=schema, application="test")
    try:
        async with engine.connect() as connection:
            assert await connection.run_sync(differences) == []
    finally:
        await engine.dispose()


async def test_processes_that_migrate_at_once_do_not_stop_each_other(postgres: PostgresServer):
    url = postgres.create_database()
    settings = DatabaseSettings.model_validate({"database_url": url})
    environment = {**os.environ, "GENMESH_DATABASE_URL": url}
    command = (sys.executable, "-m", "jobs_service", "migrate")

    processes = [await asyncio.create_subprocess_exec(*command, env=environment) for _ in range(3)]
    async with asyncio.timeout(PROCESS_TIMEOUT_S):
        assert [await process.wait() for process in processes] == [0, 0, 0]

    engine = create_engine(settings, schema="jobs", application="test")
    try:
        async with engine.connect() as connection:
            broken = "SELECT count(*) FROM pg_index WHERE NOT indisvalid"
            assert (await connection.execute(sa.text(broken))).scalar_one() == 0
            made = "SELECT count(*) FROM pg_indexes WHERE schemaname = 'jobs' AND indexname = 'jobs_waiting_by_owner'"
            assert (await connection.execute(sa.text(made))).scalar_one() == 1
    finally:
        await engine.dispose()


async def test_an_index_whose_making_failed_is_made_again(postgres: PostgresServer):
    settings = DatabaseSettings.model_validate({"database_url": postgres.create_database()})
    made_by_0007 = ("jobs_open_by_owner", "requests_unfinished_by_owner")
    validity = sa.text("SELECT relname, indisvalid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid WHERE relname = ANY(:names)")
    await asyncio.to_thread(migrate, settings, package="jobs_service", schema="jobs")
    engine = create_engine(settings, schema="jobs", application="test")
    try:
        async with engine.begin() as connection:
            # What is left when the making of the second one is cancelled: the revision counts as not done.
            await connection.execute(sa.text("DROP INDEX jobs.requests_unfinished_by_owner"))
            await connection.execute(sa.text("INSERT INTO jobs.requests (owner_id, request_id, digest, job_id, intent) SELECT "
                                             "id, id, '', id, '{}' FROM (SELECT gen_random_uuid() AS id) AS one"))  # fmt: skip
            await connection.execute(sa.text("UPDATE jobs.alembic_version SET version_num = '0006'"))
        async with engine.connect() as connection:
            # One that cannot be: the same name, made to fail half-way.
            outside = await connection.execution_options(isolation_level="AUTOCOMMIT")
            with pytest.raises(DBAPIError):
                await outside.execute(
                    sa.text("CREATE INDEX CONCURRENTLY requests_unfinished_by_owner ON jobs.requests ((1 / length(digest)))")
                )
            assert (await outside.execute(validity, {"names": [made_by_0007[1]]})).all() == [(made_by_0007[1], False)]

        await asyncio.to_thread(migrate, settings, package="jobs_service", schema="jobs")

        async with engine.connect() as connection:
            assert sorted((await connection.execute(validity, {"names": list(made_by_0007)})).all()) == [
                (name, True) for name in made_by_0007
            ]
    finally:
        await engine.dispose()
