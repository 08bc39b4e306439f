"""Looks after a folder of chunks: checks it, cleans it up, carries chunks out and in.

Knows: what to do with all chunks of a folder.
Does not know: terminals or options.
"""

from __future__ import annotations

import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from kvloom.errors import StoreError
from kvloom.store.disk import DiskStore
from kvloom.store.files import SUFFIX, map_file, remove_orphans, stored_files, write_atomically
from kvloom.store.serde import Buffer, OtherVersionError


@dataclass(frozen=True, slots=True)
class Report:
    """What was done with the chunks of a folder.

    Attributes:
        done: names of the chunks, or of files, for which it worked.
        failed: names and reasons of those for which it did not.
    """

    done: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]


def verify(store: DiskStore) -> Report:
    """Compare every file with its checksum and its name; nothing is changed."""
    return _each(stored_files(store.folder), store.read_bytes)


def collect_garbage(store: DiskStore) -> Report:
    """Remove damaged chunks, leftovers of killed writers, and what is above the budget.

    Returns:
        Names of what was removed as done; of what stays although it cannot be used as failed.
    """
    removed = remove_orphans(store.folder)
    failed: list[tuple[str, str]] = []
    for name in stored_files(store.folder):
        try:
            store.read_bytes(name)
        except OtherVersionError as error:  # another kvloom may use it
            failed.append((name, str(error)))
        except StoreError as error:
            if store.delete(name):
                removed.append(name)
            else:
                failed.append((name, str(error)))
    store.reconcile()
    before = {entry.key.name for entry in store.entries()}
    store.make_room()
    removed += sorted(before - {entry.key.name for entry in store.entries()})
    return Report(tuple(removed), tuple(failed))


def export_chunks(store: DiskStore, target: Path, names: Iterable[str] | None = None) -> Report:
    """Write intact chunks into a new or existing folder, or into one file that ends in .tar.

    Raises:
        StoreError: the target cannot be written.
    """
    chosen = sorted(stored_files(store.folder) if names is None else names)
    try:
        if target.suffix == ".tar":
            return _export_tar(store, target, chosen)
        target.mkdir(parents=True, exist_ok=True)
        return _each(
            chosen,
            lambda name: write_atomically(target / f"{name}{SUFFIX}", [store.read_bytes(name)]),
        )
    except OSError as error:
        raise StoreError(
            f"{target} cannot be written ({error.strerror or error}); choose another target."
        ) from error


def import_chunks(store: DiskStore, source: Path) -> Report:
    """Take the intact chunks of a folder or a .tar file that was exported.

    Raises:
        StoreError: the source cannot be read.
    """
    done: list[str] = []
    failed: list[tuple[str, str]] = []
    try:
        for label, data in _sources(source):
            try:
                done.append(store.put_bytes(data).name)
            except StoreError as error:
                failed.append((label, str(error)))
    except (OSError, tarfile.TarError, EOFError) as error:
        raise StoreError(f"{source} cannot be read ({error}); is it an export?") from error
    return Report(tuple(done), tuple(failed))


def find_names(store: DiskStore, beginning: str) -> list[str]:
    """Return the names of the chunks whose name begins like this."""
    return sorted(name for name in stored_files(store.folder) if name.startswith(beginning))


def _each(names: Iterable[str], work: Callable[[str], object]) -> Report:
    done: list[str] = []
    failed: list[tuple[str, str]] = []
    for name in names:
        try:
            work(name)
            done.append(name)
        except StoreError as error:
            failed.append((name, str(error)))
    return Report(tuple(done), tuple(failed))


def _export_tar(store: DiskStore, target: Path, names: Iterable[str]) -> Report:
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w") as archive:

            def add(name: str) -> None:
                data = store.read_bytes(name)
                member = tarfile.TarInfo(f"{name}{SUFFIX}")
                member.size, member.mode = len(data), 0o600
                archive.addfile(member, BytesIO(data))

            report = _each(names, add)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return report


def _sources(source: Path) -> Iterator[tuple[str, Buffer]]:
    """Yield the name and the bytes of each chunk of an export; names are labels, never paths."""
    if source.is_dir():
        for name in stored_files(source):
            yield name, map_file(source / f"{name}{SUFFIX}")
        return
    with tarfile.open(source, mode="r:") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() else None
            if content is not None and member.name.endswith(SUFFIX):
                yield member.name, bytearray(content.read())
