"""The `genmesh` command: puts the commands of `cli.commands` together."""

import typer

from cli.commands import account, admin, credits, demo, generate, jobs, stack
from cli.failures import EXIT_CODES, Commands

app = typer.Typer(
    name="genmesh", cls=Commands, help="Generative media as a mesh of gRPC services.", epilog=EXIT_CODES, no_args_is_help=True,
    pretty_exceptions_enable=False,
)  # fmt: skip
for module in (stack, demo, generate, jobs, account, credits, admin):
    app.add_typer(module.app)
