"""The `genmesh` command: puts the commands of `cli.commands` together."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from cli.commands import account, admin, api_key_file, credits, demo, generate, identities, jobs, keys, stack, uploads
from cli.failures import EXIT_CODES
from cli.root import Root

app = typer.Typer(name="genmesh", cls=Root, epilog=EXIT_CODES, no_args_is_help=True, pretty_exceptions_enable=False)


def _use_key_file(context: typer.Context, file: Path | None) -> None:
    # In front of the command's name or behind it; behind it, left out means that what stood in front holds.
    if file is not None or context.parent is None:
        api_key_file.set(file)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"genmesh {version('genmesh')}")
        raise typer.Exit


@app.callback()
def root(
    key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            metavar="FILE",
            help="Call with the API key in FILE instead of your login. Default: GENMESH_API_KEY, if set.",
            callback=_use_key_file,
            expose_value=False,
        ),
    ] = None,
    show_version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True, expose_value=False)
    ] = False,
) -> None:
    """Generative media as a mesh of gRPC services.

    Begin with `genmesh demo`: it starts everything, draws a picture, and stops.

    To stay, `genmesh up`, and in a second terminal `genmesh register`, `genmesh credits`, `genmesh generate image "a tiger face"`.
    """


for module in (stack, demo, generate, jobs, uploads, account, identities, keys, credits, admin):
    app.add_typer(module.app)
