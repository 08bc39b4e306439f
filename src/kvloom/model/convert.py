"""Turns a GGUF file into a folder that transformers loads: once, atomically, one process at a time.

Knows: the layout of converted folders, their manifest, and how to tell a whole one from a damaged.
Does not know: how a folder becomes a model in memory.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from filelock import FileLock, Timeout

from kvloom.errors import ModelLoadError
from kvloom.model.digest import (
    Progress,
    cache_root,
    cached_sha256,
    remember_sha256,
    sha256_file,
    write_json,
)
from kvloom.model.gguf_reader import read_gguf
from kvloom.model.source import ModelSource, check_gguf
from kvloom.version import __version__

MANIFEST = "kvloom.json"
FORMAT_VERSION = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file of a converted folder was when it was written.

    Attributes:
        size: bytes.
        mtime_ns: time of modification; if it still holds, the digest is trusted unread.
        sha256: digest of the bytes.
    """

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a converted folder holds and where it came from.

    Attributes:
        format_version: layout of the folder; another one is converted again.
        source: file name of the GGUF it was made from.
        source_sha256: digest of that file.
        kvloom: version that converted.
        transformers: version that converted.
        files: every other file of the folder, by name.
    """

    format_version: int
    source: str
    source_sha256: str
    kvloom: str
    transformers: str
    files: dict[str, FileRecord]


@dataclass(frozen=True, slots=True)
class ConvertedModel:
    """One entry of the list of converted models.

    Attributes:
        name: name of its folder, by which it can be removed.
        path: the folder.
        nbytes: bytes on disk; a source GGUF that is hard-linked counts in full.
        damage: why the folder cannot be used; None if it can.
        manifest: what it was made from; None if that cannot be read.
    """

    name: str
    path: Path
    nbytes: int
    damage: str | None
    manifest: Manifest | None


def convert_gguf(
    source: ModelSource, *, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """Return the converted folder of a GGUF file, making it if it is missing or damaged.

    Raises:
        ModelLoadError: the file is damaged, not the one expected, or cannot be converted.
    """
    assert source.path is not None
    check_gguf(source.path)
    sha256 = cached_sha256(source.path, cache_dir, progress)
    if source.sha256 not in (None, sha256):
        raise ModelLoadError(
            f"{source.path} is damaged or another version: its SHA-256 is {sha256}, "
            f"expected {source.sha256}; install or download it again."
        )
    folder = _models_folder(cache_dir) / f"{_folder_name(source.name)}-{sha256[:12]}"
    if damage_of(folder) is None:
        return folder
    try:
        with _one_process(folder, progress):
            _make(folder, source.path, sha256, progress)
    except OSError as error:
        raise ModelLoadError(
            f"{source.path.name} cannot be converted below {folder.parent}: "
            f"{error.strerror or error}; make room or choose another cache folder."
        ) from error
    if (folder / source.path.name).samefile(source.path):
        remember_sha256(source.path, sha256, cache_dir)  # the new link changed the file's status
    return folder


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a converted folder.

    Raises:
        ModelLoadError: there is none, or it cannot be read.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): FileRecord(**record) for name, record in content.pop("files").items()}
        manifest = Manifest(**content, files=files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelLoadError(f"{folder} holds no readable {MANIFEST}: {error}.") from error
    if manifest.format_version != FORMAT_VERSION:
        raise ModelLoadError(
            f"{folder} has format {manifest.format_version}, not {FORMAT_VERSION}."
        )
    return manifest


def damage_of(folder: Path) -> str | None:
    """Say why a converted folder must not be used; None if it may.

    Sizes are compared; the bytes are read again only where the time of modification differs.
    """
    try:
        manifest = read_manifest(folder)
    except ModelLoadError as error:
        return str(error)
    for name, record in manifest.files.items():
        try:
            stat = (folder / name).stat()
        except OSError:
            return f"{name} is missing"
        if stat.st_size != record.size:
            return f"{name} has {stat.st_size} bytes, not {record.size}"
        if stat.st_mtime_ns != record.mtime_ns and sha256_file(folder / name) != record.sha256:
            return f"{name} was changed"
    return None


def known_digests(folder: Path) -> dict[str, str]:
    """Return digests from a converted folder's manifest that still hold; none for other folders."""
    try:
        manifest = read_manifest(folder)
    except ModelLoadError:
        return {}
    known = {}
    for name, record in manifest.files.items():
        path = folder / name
        if path.exists() and (path.stat().st_size, path.stat().st_mtime_ns) == (
            record.size,
            record.mtime_ns,
        ):
            known[name] = record.sha256
    return known


def list_converted(cache_dir: Path | None = None) -> list[ConvertedModel]:
    """Return the converted models by name; leftovers of killed conversions are not listed."""
    root = _models_folder(cache_dir)
    folders = sorted(path for path in root.glob("*") if path.is_dir() and path.name[0] != ".")
    return [_describe(folder) for folder in folders]


def remove_converted(name: str, cache_dir: Path | None = None) -> int:
    """Remove a converted model by the name of its folder and return the bytes it held.

    Raises:
        ModelLoadError: there is no such folder.
    """
    entries = {entry.name: entry for entry in list_converted(cache_dir)}
    if name not in entries:
        known = ", ".join(entries) or "none"
        raise ModelLoadError(f"no converted model is called {name!r}; there are: {known}.")
    entry = entries[name]
    with _one_process(entry.path, None):
        _discard(entry.path)
    return entry.nbytes


def _describe(folder: Path) -> ConvertedModel:
    nbytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    try:
        manifest = read_manifest(folder)
    except ModelLoadError:
        manifest = None
    return ConvertedModel(folder.name, folder, nbytes, damage_of(folder), manifest)


def _models_folder(cache_dir: Path | None) -> Path:
    return cache_root(cache_dir) / "models"


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")[:80] or "model"


@contextmanager
def _one_process(folder: Path, progress: Progress | None) -> Iterator[None]:
    """Hold the folder's lock; the system releases it when a process is killed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    message = f"Waiting for another process that converts {folder.name}"
    waited = 0
    while True:
        try:
            lock.acquire(timeout=1 if waited else 0)
            break
        except Timeout:
            if not waited:
                _log.warning("%s", message)
            if progress is not None:
                progress(message, waited, 0)
            waited += 1
    try:
        yield
    finally:
        lock.release()


def _make(folder: Path, gguf: Path, sha256: str, progress: Progress | None) -> None:
    """Convert into a folder beside the final one and rename it; runs under the folder's lock."""
    for leftover in folder.parent.glob(f".{folder.name}.partial-*"):
        shutil.rmtree(leftover)
    if folder.exists():
        damage = damage_of(folder)
        if damage is None:  # another process made it while this one waited
            return
        _log.warning("%s is damaged (%s); converting it again", folder, damage)
        _discard(folder)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        _keep_source(gguf, partial / gguf.name)
        read_gguf(partial / gguf.name, partial, progress)
        _seal(partial, gguf.name, sha256, progress)
        os.rename(partial, folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _keep_source(gguf: Path, kept: Path) -> None:
    try:
        os.link(gguf, kept)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(gguf, kept)


def _seal(partial: Path, source: str, source_sha256: str, progress: Progress | None) -> None:
    """Flush every file to disk and write the manifest last."""
    files = {}
    for path in sorted(partial.iterdir()):
        _sync(path)
        sha256 = sha256_file(path, progress)
        if path.name == source and sha256 != source_sha256:
            raise ModelLoadError(f"{source} changed while it was converted; start again.")
        stat = path.stat()
        files[path.name] = FileRecord(stat.st_size, stat.st_mtime_ns, sha256)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=source,
        source_sha256=source_sha256,
        kvloom=__version__,
        transformers=metadata.version("transformers"),
        files=files,
    )
    write_json(partial / MANIFEST, asdict(manifest))
    _sync(partial)


def _discard(folder: Path) -> None:
    """Remove a folder so that no other process ever sees a part of it."""
    doomed = folder.parent / f".{folder.name}.partial-removed-{os.getpid()}"
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
