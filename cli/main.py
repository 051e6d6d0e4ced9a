"""The `genmesh` command: puts the commands of `cli.commands` together."""

from pathlib import Path
from typing import Annotated

import typer

from cli.commands import account, admin, api_key_file, credits, demo, generate, jobs, keys, stack, uploads
from cli.failures import EXIT_CODES, Commands

app = typer.Typer(
    name="genmesh", cls=Commands, help="Generative media as a mesh of gRPC services.", epilog=EXIT_CODES, no_args_is_help=True,
    pretty_exceptions_enable=False,
)  # fmt: skip


@app.callback()
def root(
    key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file", metavar="FILE", help="Call with the API key in FILE instead of your login. Default: GENMESH_API_KEY, if set."
        ),
    ] = None,
) -> None:
    """Generative media as a mesh of gRPC services."""
    api_key_file.set(key_file)


for module in (stack, demo, generate, jobs, uploads, account, keys, credits, admin):
    app.add_typer(module.app)
