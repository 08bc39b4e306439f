"""`kvloom bench peers`: the environments of the engines that kvloom is measured beside.

Knows: what a user is told before an installation, and the limit that needs a yes.
Does not know: how an environment is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.table import Table

from kvloom.cli.flatten import flatten
from kvloom.cli.progress import long_work
from kvloom.cli.settings import size
from kvloom.cli.terminal import Terminal

if TYPE_CHECKING:
    from kvloom.bench.peers.environments import Home
    from kvloom.bench.peers.recipes import Recipe

_MEGABYTE = 10**6
_NONE = "–"
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="As `list` shows it.")]


def make_peers() -> typer.Typer:
    """Return the group of commands."""
    peers = typer.Typer(
        help="List, install and remove the engines beside kvloom.", no_args_is_help=True
    )
    for command in (list_peers, install, remove):
        peers.command(command.__name__.removesuffix("_peers"))(flatten(command))
    return peers


def list_peers() -> None:
    """List the peers: what each is made of, and which are installed."""
    from kvloom.bench.peers.environments import home_of
    from kvloom.bench.peers.recipes import RECIPES

    homes = [home_of(recipe) for recipe in RECIPES.values()]
    Terminal().results.print(_table(homes))


def install(
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Install it whatever its size.")] = False,
    limit: Annotated[
        int,
        typer.Option(
            parser=size, metavar="SIZE", show_default="2GB", help="Disk it may take without --yes."
        ),
    ] = 2000 * _MEGABYTE,
    again: Annotated[
        bool, typer.Option("--again", help="Make the environment anew though it stands.")
    ] = False,
) -> None:
    """Install a peer from the package index into an environment of its own."""
    from kvloom.bench.peers.environments import install as make

    home = _home(name)
    terminal = Terminal()
    found = home.installed()
    if found is not None and not again:
        terminal.say(f"{name} {found.version} is installed already.")
        return
    terminal.say(_plan(home.recipe))
    needed = home.recipe.installed_mb * _MEGABYTE
    if needed > limit and not yes:
        raise typer.BadParameter(
            f"{name} takes {decimal(needed)} of disk and the limit is {decimal(limit)}; "
            "allow it with --yes or a higher --limit."
        )
    with long_work(terminal.messages, f"Installing {name}") as progress:
        done = make(home, progress, again=again)
    terminal.say(
        f"Installed {name} {done.version} in {done.install_s:.0f} s; "
        f"it takes {decimal(done.nbytes)}."
    )


def remove(name: NameArgument) -> None:
    """Remove a peer's environment and the models that were converted for it."""
    from kvloom.bench.peers.environments import remove as discard

    nbytes = discard(_home(name))
    Terminal().say(f"Removed {name} ({decimal(nbytes)}).")


def _home(name: str) -> Home:
    from kvloom.bench.peers.environments import home_of
    from kvloom.bench.peers.recipes import RECIPES

    if name == "transformers":
        raise typer.BadParameter("transformers comes with kvloom; there is nothing to do.")
    if name not in RECIPES:
        raise typer.BadParameter(f"{name!r} is no peer; known are: {', '.join(RECIPES)}.")
    return home_of(RECIPES[name])


def _plan(recipe: Recipe) -> str:
    """Return what will be installed, how large it is and how long it takes."""
    minutes = max(1, round(recipe.install_s / 60))
    plan = (
        f"{recipe.name}: package {recipe.package} {recipe.version} ({recipe.licence}), "
        f"about {decimal(recipe.download_mb * _MEGABYTE)} to download, "
        f"{decimal(recipe.installed_mb * _MEGABYTE)} on disk, {minutes} min on two cores."
    )
    return f"{plan} {recipe.note}".strip()


def _table(homes: list[Home]) -> Table:
    table = Table("name", "package", "format", box=None, header_style="bold", pad_edge=False)
    for heading in ("installed", "on disk"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    table.add_row("transformers", "transformers", "as told", "with kvloom", _NONE, "")
    for home in homes:
        recipe, found = home.recipe, home.installed()
        expected = f"{decimal(recipe.installed_mb * _MEGABYTE)} if installed"
        table.add_row(
            recipe.name,
            f"{recipe.package} {recipe.version}",
            recipe.format,
            _NONE if found is None else found.version,
            expected if found is None else decimal(home.nbytes()),
            recipe.note,
        )
    return table
