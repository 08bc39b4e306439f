"""Files of a folder of chunks: written whole or not at all, mapped to be read.

Knows: temporary names, locks, renames and mappings.
Does not know: what is in the files.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvloom.store.key import is_name

SUFFIX = ".safetensors"
PREFIX, PARTIAL = ".kvloom-", ".partial"


def write_atomically(path: Path, pieces: Iterable[memoryview | bytes]) -> None:
    """Write a file so that others see the old one or the new one, even after a power cut.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=PREFIX, suffix=PARTIAL)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            # While its writer lives, a temporary file is locked; see `remove_orphans`.
            fcntl.flock(file, fcntl.LOCK_EX)
            for piece in pieces:
                _write_all(file.fileno(), piece)
            os.fsync(file.fileno())
            os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def map_file(path: Path) -> memoryview:
    """Return the bytes of a file as a private mapping: writing to it never reaches the file.

    The mapping outlives the file's name.

    Raises:
        OSError: it cannot be read.
        ValueError: it is empty.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY))
    finally:
        os.close(descriptor)


def remove_orphans(folder: Path) -> list[str]:
    """Remove temporary files whose writers are gone, and return their names."""
    removed = []
    for path in _listed(folder):
        if not (path.name.startswith(PREFIX) and path.name.endswith(PARTIAL)):
            continue
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed.append(path.name)
    return removed


def stored_files(folder: Path) -> dict[str, int]:
    """Return the sizes in bytes of the files that are named like chunks, by name of the chunk."""
    sizes = {}
    for path in _listed(folder):
        if path.suffix == SUFFIX and is_name(path.stem):  # others' files are not touched
            with suppress(OSError):
                sizes[path.stem] = path.stat().st_size
    return sizes


@contextmanager
def locked(folder: Path, timeout_s: float) -> Iterator[None]:
    """Keep other processes out of a folder; go on without after some time, or if it has no locks.

    Raises:
        OSError: the folder cannot be opened.
    """
    with _opened(folder) as descriptor:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        yield


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _write_all(descriptor: int, piece: memoryview | bytes) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _sync_folder(folder: Path) -> None:
    """Make a rename last; some file systems have no such thing."""
    with suppress(OSError), _opened(folder) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
