"""The second tier: one file per chunk in a folder, kept across restarts and shared by processes.

Knows: when a file may be used, and which ones have to go.
Does not know: other tiers, or what is done with a chunk.

A file is compared with its checksum each time it is mapped: what comes back was whole at that
moment. Later changes to the file's bytes by others are not noticed; kvloom only replaces and
removes files, which a mapping outlives.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kvloom.errors import StoreError
from kvloom.store.chunk import Chunk
from kvloom.store.files import (
    SUFFIX,
    map_file,
    remove_orphans,
    stored_files,
    write_atomically,
)
from kvloom.store.index import Index
from kvloom.store.key import ChunkKey, Place, is_name
from kvloom.store.saving import choose_victims
from kvloom.store.serde import (
    Buffer,
    DamagedChunkError,
    OtherVersionError,
    check,
    deserialize,
    read_header,
    read_tokens,
    serialize,
)
from kvloom.store.tier import Continuation, Entry, Tally, TierStatistics

logger = logging.getLogger(__name__)
INDEX = "index.sqlite"
DEFAULT_BUDGET_BYTES = 8 * 2**30


class DiskStore:
    """Chunks in a folder; they leave by expected saving."""

    name = "disk"

    def __init__(
        self,
        folder: Path,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder = folder
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._tally = Tally(logger)
        self._make_folder()
        remove_orphans(folder)
        self._index = Index(folder / INDEX, self._tally, self.name)
        self.reconcile()

    def get(self, key: ChunkKey) -> Chunk | None:
        """Return a chunk whose arrays lie in the mapped file, and count the use; None if none."""
        chunk = self._read(key)
        self._tally.add("misses" if chunk is None else "hits")
        if chunk is not None:
            self._index.touch(key.name, self._clock())
        return chunk

    def read_bytes(self, name: str) -> memoryview:
        """Return the intact bytes of a chunk's file, mapped; nothing is counted.

        Raises:
            StoreError: there is no such chunk, it is damaged or of another version.
        """
        if not is_name(name):
            raise StoreError(f"{name!r} is no name of a chunk.")
        try:
            data = map_file(self.path(name))
        except (OSError, ValueError) as error:
            raise DamagedChunkError(f"it cannot be read ({error})") from error
        if check(data).key.name != name:
            raise DamagedChunkError("it is another chunk")
        return data

    def put(self, chunk: Chunk) -> bool:
        """Write a chunk; it is refused where there is no room or no right to."""
        if self._is_current(chunk.key):
            return True
        try:
            pieces = serialize(chunk)
        except StoreError as error:
            self._tally.say_once("serialize", "%s", error)
            self._tally.add("refused")
            return False
        return self._write(chunk.key, chunk.tokens, pieces)

    def put_bytes(self, data: Buffer) -> ChunkKey:
        """Write a chunk from the bytes of another tier or store, and return its key.

        Raises:
            DamagedChunkError: the bytes are not what was written.
            OtherVersionError: the format is another one.
            StoreError: the chunk was refused.
        """
        header = check(data)
        tokens = read_tokens(data, header)
        deserialize(data, header.key)  # what cannot be read back is not taken
        known = self._is_current(header.key)
        if not known and not self._write(header.key, tokens, [memoryview(data)]):
            raise StoreError(
                f"{self.folder} takes no chunk of {len(data)} bytes; make room, raise the budget "
                "or check the rights."
            )
        return header.key

    def has(self, name: str) -> bool:
        """Whether there is a file of this name; its bytes are not looked at."""
        return is_name(name) and os.path.isfile(self.path(name))

    def pin(self, name: str, *, pinned: bool = True) -> bool:
        """Keep a chunk when room is needed, or no longer; say whether that is now so."""
        return self.has(name) and self._index.pin(name, pinned=pinned)

    def delete(self, name: str) -> bool:
        """Remove a chunk and say whether there was one."""
        if not is_name(name):
            return False
        self._index.remove([name])
        try:
            self.path(name).unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            self._complain("delete", error)
            return False
        return True

    def entries(self) -> Sequence[Entry]:
        """Return the catalogue."""
        return self._index.entries()

    def continuations(self, place: Place, next_token: int | None = None) -> Sequence[Continuation]:
        """Return the chunks at a place; with `next_token`, those that begin with it."""
        return self._index.continuations(place, next_token)

    def statistics(self) -> TierStatistics:
        """Return the counters."""
        chunks, nbytes = self._index.size()
        return self._tally.statistics(chunks=chunks, nbytes=nbytes)

    def close(self) -> None:
        """Close the index; mapped chunks stay valid."""
        self._index.close()

    def path(self, name: str) -> Path:
        """Return the file of a chunk."""
        return self.folder / f"{name}{SUFFIX}"

    def reconcile(self) -> None:
        """Make the index fit the files: enter what it lacks, forget what is gone."""
        known, files = self._index.clean(), stored_files(self.folder)
        self._index.remove(known - files.keys())
        for name in files.keys() - known:
            try:
                data = map_file(self.path(name))
                header = read_header(data)
                if header.key.name == name:
                    tokens = read_tokens(data, header)
                    self._index.add(header.key, tokens, len(data), self._clock())
            except (OSError, ValueError, StoreError) as error:
                logger.info("the file of chunk %s is not entered: %s", name, error)

    def make_room(self, need_bytes: int = 0) -> bool:
        """Remove chunks until this many bytes fit into the budget; say whether they do."""
        if need_bytes > self._budget_bytes:
            return False
        _, nbytes = self._index.size()
        over = nbytes + need_bytes - self._budget_bytes
        if over <= 0:
            return True
        victims = choose_victims(self._index.entries(), over, self._clock())
        for victim in victims or ():
            self.delete(victim.key.name)
            self._tally.add("evicted")
        return victims is not None

    def _is_current(self, key: ChunkKey) -> bool:
        """Whether there is a file whose header is this chunk's, in this version's format."""
        try:
            return read_header(map_file(self.path(key.name))).key == key
        except (OSError, ValueError, StoreError):
            return False

    def _read(self, key: ChunkKey) -> Chunk | None:
        path = self.path(key.name)
        try:
            return deserialize(map_file(path), key)
        except FileNotFoundError:
            self._index.remove([key.name])
        except OSError as error:
            self._complain("read", error)
        except OtherVersionError as error:
            self._tally.say_once("version", "stored chunks are left alone: %s", error)
        except (DamagedChunkError, ValueError) as error:  # ValueError: an empty file
            self._tally.add("corrupt")
            logger.warning("chunk %s is damaged and is removed: %s", key.name, error)
            self.delete(key.name)
        return None

    def _write(self, key: ChunkKey, tokens: np.ndarray, pieces: Sequence[memoryview]) -> bool:
        nbytes = sum(len(piece) for piece in pieces)
        if not self.make_room(nbytes):
            self._tally.add("refused")
            return False
        try:
            write_atomically(self.path(key.name), pieces)
        except OSError as error:
            self._complain("write", error)
            self._tally.add("refused")
            return False
        self._index.add(key, tokens, nbytes, self._clock())
        self._tally.add("stored")
        return True

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, mode=0o700, exist_ok=True)
            if self.folder.stat().st_mode & 0o077:
                logger.warning(
                    "others may list the store %s (its files are private); chmod it to 700",
                    self.folder,
                )
        except OSError as error:
            self._complain("folder", error)

    def _complain(self, action: str, error: OSError) -> None:
        self._tally.add("errors")
        self._tally.say_once(
            action, "the store %s fails (%s: %s)", self.folder, action, error.strerror or error
        )
