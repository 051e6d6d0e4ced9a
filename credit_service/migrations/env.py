"""Alembic's entry point; what a migration runs in is the same for every service."""

from alembic import context

from servicekit.database import run_migrations

run_migrations(context)
