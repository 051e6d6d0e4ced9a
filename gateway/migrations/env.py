"""Entry point of Alembic; what happens is in servicekit.database."""

from alembic import context

from servicekit.database import run_migrations

run_migrations(context)
