"""`tables.py`, which queries are written with, is what the migrations make. (credit_service: tests/service/credits/test_books.py.)"""

import asyncio
import os
import sys
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

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
