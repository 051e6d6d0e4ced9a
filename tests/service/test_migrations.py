"""`tables.py`, which queries are written with, is what the migrations make. (credit_service: tests/service/credits/test_books.py.)"""

import asyncio
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
