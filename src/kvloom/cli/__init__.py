"""The command line: options, progress, and errors in one line.

Knows: arguments, environment variables, streams and exit codes; no other room does.
Does not know: torch, until a command needs it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from kvloom.cli.ask import ask
from kvloom.cli.bench import make_bench
from kvloom.cli.chat import chat
from kvloom.cli.demo import demo
from kvloom.cli.doctor import doctor
from kvloom.cli.flatten import flatten
from kvloom.cli.models import make_models
from kvloom.cli.serve import serve
from kvloom.cli.store import make_store
from kvloom.cli.terminal import Terminal, set_up_logging
from kvloom.errors import KvloomError
from kvloom.version import __version__

LogLevel = Literal["debug", "info", "warning", "error"]


def main() -> None:
    """Run the command line and exit."""
    make_app()()


def make_app() -> typer.Typer:
    """Return the command line as typer sees it."""
    app = typer.Typer(
        cls=ErrorLines,
        callback=kvloom,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # the boxes of rich cut long option names
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command in (ask, chat, serve, doctor, demo):
        app.command(command.__name__)(flatten(command))
    app.add_typer(make_models(), name="models")
    app.add_typer(make_store(), name="store")
    app.add_typer(make_bench(), name="bench")
    return app


class ErrorLines(TyperGroup):
    """Runs commands, and turns the errors that are meant for users into one line and exit code 1.

    What is left is a defect of kvloom and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # nobody reads any more; typer ends quietly
        except (KvloomError, OSError, MemoryError) as error:
            if ctx.params.get("debug"):
                raise
            Terminal().error(str(error) or type(error).__name__)
            raise typer.Exit(1) from error


def kvloom(
    log_level: Annotated[
        LogLevel, typer.Option(help="Log records that are shown, on standard error.")
    ] = "warning",
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=lambda v: show_version(asked=v))
    ] = False,
) -> None:
    """Ask language models about text; what they have read is kept and reused."""
    set_up_logging(log_level)


def show_version(*, asked: bool) -> None:
    """Print the version and end, if that was asked for."""
    if asked:
        typer.echo(f"kvloom {__version__}")
        raise typer.Exit
