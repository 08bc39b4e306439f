"""`kvloom models`: the converted models in the cache folder.

Knows: how they are listed.
Does not know: how a model is converted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from kvloom.cli.flatten import flatten
from kvloom.cli.progress import long_work
from kvloom.cli.settings import CacheDirOption, ModelArgument, TrustOption
from kvloom.cli.terminal import Terminal

if TYPE_CHECKING:
    from kvloom.model.convert import ConvertedModel


def make_models() -> typer.Typer:
    """Return the group of commands."""
    models = typer.Typer(help="List, convert and remove models.", no_args_is_help=True)
    for command in (list_models, convert, remove):
        name = command.__name__.removesuffix("_models")
        models.command(name)(flatten(command))
    return models


def list_models(cache_dir: CacheDirOption = None) -> None:
    """List the converted models."""
    from kvloom.model.convert import list_converted

    terminal = Terminal()
    entries = list_converted(cache_dir)
    if not entries:
        terminal.note("There are no converted models.")
        return
    terminal.results.print(_table(entries))


def convert(
    model: ModelArgument = "default",
    cache_dir: CacheDirOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Convert or download a model now, and print the folder it is in."""
    terminal = Terminal()
    with long_work(terminal.messages, "Starting") as progress:
        from kvloom.model.load import prepare_folder
        from kvloom.model.source import resolve_source

        folder = prepare_folder(
            resolve_source(model),
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    terminal.results.print(str(folder), soft_wrap=True)


def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="As `list` shows it.")],
    cache_dir: CacheDirOption = None,
) -> None:
    """Remove converted models; they are converted again when they are needed."""
    from kvloom.model.convert import remove_converted

    terminal = Terminal()
    for name in names:
        nbytes = remove_converted(name, cache_dir)
        terminal.say(f"Removed {name} ({decimal(nbytes)}).")


def _table(entries: list[ConvertedModel]) -> Table:
    table = Table("name", box=None, header_style="bold", pad_edge=False)
    table.columns[0].overflow = "fold"
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("source", overflow="fold")
    table.add_column("SHA-256 of the source", overflow="fold")
    table.add_column("state", overflow="fold")
    for entry in entries:
        manifest = entry.manifest
        table.add_row(
            entry.name,
            decimal(entry.nbytes),
            "–" if manifest is None else manifest.source,
            "–" if manifest is None else manifest.source_sha256[:16],
            entry.damage or "whole",
        )
    return table
