"""What every tier offers, and what it tells about itself.

Knows: the protocol of a tier, entries of its catalogue, and its counters.
Does not know: memory, files or networks.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import numpy as np

from kvloom.store.chunk import Chunk
from kvloom.store.key import ChunkKey, Place


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a catalogue.

    Attributes:
        key: what the chunk is.
        num_tokens: tokens it holds.
        nbytes: bytes it takes in its tier.
        tiers: names of the tiers that hold it, fastest first.
        hits: times it was read.
        created: seconds since 1970 at which it came.
        last_used: seconds since 1970 of the last read, or of its coming.
        pinned: whether it stays when room is needed.
    """

    key: ChunkKey
    num_tokens: int
    nbytes: int
    tiers: tuple[str, ...]
    hits: int
    created: float
    last_used: float
    pinned: bool

    @property
    def name(self) -> str:
        """Name of the chunk."""
        return self.key.name


@dataclass(frozen=True, slots=True, eq=False)
class Continuation:
    """A stored chunk that goes on from a place.

    Attributes:
        key: with which it can be read.
        tokens: int64 token ids, shape (t,).
    """

    key: ChunkKey
    tokens: np.ndarray


@dataclass(frozen=True, slots=True)
class TierStatistics:
    """Counters of one tier since it was opened, and what it holds now.

    Attributes:
        hits: reads that found a chunk.
        misses: reads that did not, for whatever reason.
        stored: chunks that were taken.
        refused: chunks that were not, for lack of room, of rights or of a connection.
        evicted: chunks that made room for others.
        corrupt: chunks that were damaged, and removed.
        errors: calls of the system or the network that failed.
        skipped: calls that were not tried, because the ones before had failed.
        chunks: chunks held now; 0 where a tier does not know.
        nbytes: bytes held now; 0 where a tier does not know.
    """

    hits: int = 0
    misses: int = 0
    stored: int = 0
    refused: int = 0
    evicted: int = 0
    corrupt: int = 0
    errors: int = 0
    skipped: int = 0
    chunks: int = 0
    nbytes: int = 0


class ChunkStore(Protocol):
    """One tier; may be called from any thread, and never raises because of what it holds.

    A name is `ChunkKey.name`.
    """

    @property
    def name(self) -> str:
        """Name of the tier."""
        ...

    def get(self, key: ChunkKey) -> Chunk | None:
        """Return a whole and intact chunk, and count the use; None if there is none."""
        ...

    def put(self, chunk: Chunk) -> bool:
        """Keep a chunk and own its arrays; say whether it is kept now."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a chunk; nothing is counted."""
        ...

    def pin(self, name: str, *, pinned: bool = True) -> bool:
        """Keep a chunk when room is needed, or no longer; say whether that is now so."""
        ...

    def delete(self, name: str) -> bool:
        """Remove a chunk and say whether there was one."""
        ...

    def entries(self) -> Sequence[Entry]:
        """Return the catalogue, in no particular order."""
        ...

    def continuations(self, place: Place, next_token: int | None = None) -> Sequence[Continuation]:
        """Return the chunks at a place, without their KV; nothing is counted.

        With `next_token`, only those that begin with it. A chunk may be gone when it is read.
        """
        ...

    def statistics(self) -> TierStatistics:
        """Return the counters."""
        ...

    def close(self) -> None:
        """Let go of what is held; the store cannot be used afterwards."""
        ...


class Tally:
    """Counters that several threads change, and complaints that are logged once."""

    def __init__(self, logger: logging.Logger) -> None:
        self._counts: Counter[str] = Counter()
        self._said: set[str] = set()
        self._lock = Lock()
        self._logger = logger

    def add(self, name: str) -> None:
        """Count one of what an attribute of `TierStatistics` is called."""
        with self._lock:
            self._counts[name] += 1

    def say_once(self, topic: str, message: str, *values: object) -> None:
        """Log a warning, unless this was called with the topic before."""
        with self._lock:
            known = topic in self._said
            self._said.add(topic)
        if not known:
            self._logger.warning(message, *values)

    def statistics(self, *, chunks: int = 0, nbytes: int = 0) -> TierStatistics:
        """Return the counters as data."""
        with self._lock:
            return TierStatistics(**self._counts, chunks=chunks, nbytes=nbytes)
