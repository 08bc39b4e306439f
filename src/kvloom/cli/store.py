"""`kvloom store`: the folder of stored chunks.

Knows: how chunks are listed, checked, cleaned up and carried.
Does not know: how they are kept.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table

from kvloom.cli.flatten import flatten
from kvloom.cli.progress import long_work
from kvloom.cli.settings import JsonOption, StoreOption, size
from kvloom.cli.terminal import Terminal
from kvloom.errors import StoreError

if TYPE_CHECKING:
    from kvloom.store.disk import DiskStore
    from kvloom.store.tier import Entry
    from kvloom.store.upkeep import Report

NAME_DIGITS = 12
NamesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NAME...", help="As `ls` shows it; all if left out.", show_default=False
    ),
]


def make_store() -> typer.Typer:
    """Return the group of commands."""
    store = typer.Typer(help="List, check, clean up and carry stored KV.", no_args_is_help=True)
    commands: dict[str, Callable[..., None]] = {
        "ls": list_chunks,
        "verify": verify,
        "gc": collect_garbage,
        "export": export,
        "import": import_,
        "rm": remove,
    }
    for name, command in commands.items():
        store.command(name)(flatten(command))
    return store


def list_chunks(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the stored chunks, last used first."""
    terminal = Terminal()
    with opened(store) as found:
        entries = sorted(found.entries(), key=lambda e: (-e.last_used, e.key.name))
    if as_json:
        terminal.write(json.dumps([_plain(entry) for entry in entries], indent=2) + "\n")
        return
    if not entries:
        terminal.note("There are no stored chunks.")
        return
    terminal.results.print(_table(entries))
    tokens, nbytes = sum(e.num_tokens for e in entries), sum(e.nbytes for e in entries)
    terminal.note(f"{len(entries)} chunks, {tokens} tokens, {decimal(nbytes)}")


def verify(store: StoreOption = None) -> None:
    """Compare every stored chunk with its checksum; exits with 1 if one is damaged."""
    from kvloom.store import upkeep

    terminal = Terminal()
    with opened(store) as found, long_work(terminal.messages, "Checking"):
        report = upkeep.verify(found)
    _tell(terminal, report, "intact", "run `kvloom store gc` to remove damaged ones")


def collect_garbage(
    store: StoreOption = None,
    budget: Annotated[
        int | None,
        typer.Option(parser=size, metavar="SIZE", show_default="8GiB", help="Bytes that may stay."),
    ] = None,
) -> None:
    """Remove damaged chunks, leftovers, and what is above the budget."""
    from kvloom.store import upkeep

    terminal = Terminal()
    with opened(store, budget) as found, long_work(terminal.messages, "Checking"):
        report = upkeep.collect_garbage(found)
    _tell(terminal, report, "removed", "remove by hand what must not stay")


def export(
    target: Annotated[Path, typer.Argument(help="A folder, or a file that ends in .tar.")],
    names: NamesArgument = None,
    store: StoreOption = None,
) -> None:
    """Write chunks into a folder or a .tar file."""
    from kvloom.store import upkeep

    terminal = Terminal()
    with opened(store) as found, long_work(terminal.messages, "Writing"):
        chosen = [_whole_name(found, name) for name in names] if names else None
        report = upkeep.export_chunks(found, target, chosen)
    _tell(terminal, report, "exported", "run `kvloom store gc` to remove damaged ones")


def import_(
    source: Annotated[Path, typer.Argument(help="What `export` wrote.")],
    store: StoreOption = None,
) -> None:
    """Take chunks from a folder or a .tar file; damaged ones are left out."""
    from kvloom.store import upkeep

    terminal = Terminal()
    with opened(store, make=True) as found, long_work(terminal.messages, "Reading"):
        report = upkeep.import_chunks(found, source)
    _tell(terminal, report, "imported", "export them again")


def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="As `ls` shows it.")],
    store: StoreOption = None,
) -> None:
    """Remove stored chunks."""
    terminal = Terminal()
    with opened(store) as found:
        for name in [_whole_name(found, name) for name in names]:
            if not found.delete(name):
                raise StoreError(f"chunk {name[:NAME_DIGITS]} cannot be removed; check the rights.")
            terminal.say(f"Removed {name[:NAME_DIGITS]}.")


@contextmanager
def opened(
    folder: Path | None, budget_bytes: int | None = None, *, make: bool = False
) -> Iterator[DiskStore]:
    """Open the store's folder; unless it shall be made, it must be there.

    Raises:
        StoreError: there is no such folder.
    """
    from kvloom.model.digest import cache_root
    from kvloom.store.disk import DiskStore

    folder = folder or cache_root() / "store"
    if not make and not folder.is_dir():
        raise StoreError(f"there is no store at {folder}; name another with --store.")
    # Which budget the folder is used with is not known here, so nothing has to go for it.
    store = DiskStore(folder, sys.maxsize if budget_bytes is None else budget_bytes)
    try:
        yield store
    finally:
        store.close()


def _whole_name(store: DiskStore, beginning: str) -> str:
    from kvloom.store.upkeep import find_names

    found = find_names(store, beginning) if beginning else []
    if len(found) != 1:
        problem = "no stored chunk's name begins" if not found else f"{len(found)} names begin"
        raise StoreError(f"{problem} with {beginning!r}; `kvloom store ls` shows the names.")
    return found[0]


def _tell(terminal: Terminal, report: Report, done: str, advice: str) -> None:
    """Say how many chunks it worked for, and which ones it did not; the latter is an error."""
    for name, reason in report.failed:
        terminal.say(f"{_harmless(name[:NAME_DIGITS])}: {_harmless(reason)}")
    terminal.say(f"{len(report.done)} {done}, {len(report.failed)} failed.")
    if report.failed:
        raise StoreError(f"{len(report.failed)} chunks failed; {advice}.")


def _plain(entry: Entry) -> dict[str, Any]:
    """Return an entry as JSON; names and digests are hexadecimal."""
    key = entry.key
    return {
        "name": key.name,
        "tokens": entry.num_tokens,
        "bytes": entry.nbytes,
        "tiers": list(entry.tiers),
        "hits": entry.hits,
        "created": _time(entry.created),
        "last_used": _time(entry.last_used),
        "pinned": entry.pinned,
        "tenant": key.tenant,
        "recipe": key.recipe,
        "fingerprint": key.fingerprint.hex(),
        "context": None if key.context is None else key.context.hex(),
    }


def _table(entries: list[Entry]) -> Table:
    table = Table("name", box=None, header_style="bold", pad_edge=False)
    for heading in ("tokens", "size", "hits"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("last use", "created", "pinned", "tenant", "recipe", "model"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        key = entry.key
        table.add_row(
            key.name[:NAME_DIGITS],
            str(entry.num_tokens),
            decimal(entry.nbytes),
            str(entry.hits),
            _time(entry.last_used),
            _time(entry.created),
            "yes" if entry.pinned else "no",
            key.tenant[:8],
            _harmless(key.recipe) or "–",
            key.fingerprint.hex()[:NAME_DIGITS],
        )
    return table


def _harmless(text: str) -> str:
    """Return what a file from elsewhere says, without anything that a terminal would carry out."""
    return ascii(text)[1:-1]


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return "unknown"
