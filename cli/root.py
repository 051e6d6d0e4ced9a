"""The root of the command's tree: what all commands share, and the only place where what goes wrong becomes an exit code."""

import errno
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import grpc
import typer
from typer.core import TyperGroup

from cli.failures import CommandError, ExitCode, failure_of

WITHOUT_KEY = frozenset({"register", "login", "logout", "link", "identities", "keys"})
"""Commands for people who sign in: no key may do what they do."""


class Root(TyperGroup):
    """Ends every command with an exit code of `ExitCode` and never with a traceback.

    Its option --api-key-file is an option of every command that calls with a key, too.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._as_json = False
        (key_file,) = (parameter for parameter in self.params if parameter.name == "key_file")
        _share(self, key_file)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options in front of the command's name."""
        # Asked before anything is understood: what cannot be understood is told as JSON, too.
        self._as_json = "--json" in (args[: args.index("--")] if "--" in args else args)
        with self._told():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that `ctx` names."""
        with self._told():
            result = super().invoke(ctx)
            sys.stdout.flush()  # what cannot be written is told here, not while the interpreter shuts down
            return result

    @contextmanager
    def _told(self) -> Generator[None]:
        """Tell what goes wrong inside the block, and exit."""
        try:
            yield
        except typer.Exit:
            raise
        except (typer.Abort, EOFError) as error:
            if not self._as_json:
                raise
            print(file=sys.stderr)  # the question's line has not ended
            raise self._ended(CommandError("not confirmed")) from error
        except typer.TyperException as error:
            if not self._as_json:
                raise  # Typer shows it with the usage of the command
            raise self._ended(CommandError(error.format_message(), "see `--help`", code=ExitCode(error.exit_code))) from error
        except CommandError as failure:
            raise self._ended(failure) from failure
        except grpc.RpcError as error:
            raise self._ended(failure_of(error)) from error
        except KeyboardInterrupt as error:
            if self._as_json:
                raise self._ended(CommandError("interrupted", code=ExitCode.INTERRUPTED)) from error
            print("interrupted", file=sys.stderr)
            raise typer.Exit(ExitCode.INTERRUPTED) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone: Typer ends quietly
                raise
            raise self._ended(CommandError(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")) from error
        except Exception as error:
            if os.environ.get("GENMESH_LOG_LEVEL") == "debug":
                raise
            advice = "run it again with GENMESH_LOG_LEVEL=debug for the traceback, and report it"
            raise self._ended(CommandError(f"unexpected: {error!r}", advice)) from error

    def _ended(self, failure: CommandError) -> typer.Exit:
        failure.show(as_json=self._as_json)
        return typer.Exit(failure.code)


def _share(group: Any, option: Any) -> None:
    """Let all commands below that call an edge have an option of the root, behind their --edge."""
    for name, command in group.commands.items():
        if name in WITHOUT_KEY:
            continue
        names = [parameter.name for parameter in command.params]
        if "edge" in names:
            command.params.insert(names.index("edge") + 1, option)
        if isinstance(command, TyperGroup):
            _share(command, option)
