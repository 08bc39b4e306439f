"""SHA-256 of files, remembered in the cache folder so that a warm start does not read them again.

Knows: the cache folder and what makes a remembered digest stale.
Does not know: what the files mean.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import platformdirs

_log = logging.getLogger(__name__)
_BUFFER_BYTES = 4 * 2**20


class Progress(Protocol):
    """Is told how far something long has come; a total of 0 means that it is not known."""

    def __call__(self, description: str, done: int, total: int) -> None:
        """Take note of `done` out of `total`."""
        ...


def cache_root(cache_dir: Path | None = None) -> Path:
    """Return the folder that kvloom may fill and a user may delete."""
    return cache_dir or platformdirs.user_cache_path("kvloom", appauthor=False)


def sha256_file(path: Path, progress: Progress | None = None) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    total = path.stat().st_size
    done = 0
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with path.open("rb", buffering=0) as file:
        while num_read := file.readinto(buffer):
            digest.update(buffer[:num_read])
            done += num_read
            if progress is not None:
                progress(f"Checking {path.name}", done, total)
    return digest.hexdigest()


def cached_sha256(
    path: Path, cache_dir: Path | None = None, progress: Progress | None = None
) -> str:
    """Return a file's SHA-256, from the cache folder if the file has not changed since.

    A file counts as changed if its path, size, or time of modification or of status change differs.
    """
    path = path.resolve()
    record_path = _record_path(path, cache_root(cache_dir))
    before = _stamp(path)
    try:
        record = json.loads(record_path.read_text())
        if record["stamp"] == before and len(record["sha256"]) == 64:
            return str(record["sha256"])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # no record, or a damaged one: read the file
    sha256 = sha256_file(path, progress)
    if _stamp(path) == before:
        _remember(record_path, before, sha256)
    return sha256


def remember_sha256(path: Path, sha256: str, cache_dir: Path | None = None) -> None:
    """Note the digest of a file whose bytes the caller has read."""
    path = path.resolve()
    _remember(_record_path(path, cache_root(cache_dir)), _stamp(path), sha256)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that readers see the old content or the new, even after a power cut."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _stamp(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _record_path(path: Path, root: Path) -> Path:
    name = hashlib.blake2b(os.fsencode(path), digest_size=16).hexdigest()
    return root / "digests" / f"{name}.json"


def _remember(record_path: Path, stamp: list[Any], sha256: str) -> None:
    try:
        record_path.parent.mkdir(parents=True, exist_ok=True)
        write_json(record_path, {"stamp": stamp, "sha256": sha256})
    except OSError as error:
        _log.warning("cannot remember a digest, so it is computed at every start: %s", error)
