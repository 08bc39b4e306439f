"""The first tier: chunks in the memory of this process, within a budget of bytes.

Knows: the chunks it holds, and when each was used.
Does not know: files or other tiers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import Lock

from kvloom.store.chunk import Chunk
from kvloom.store.key import ChunkKey, Place
from kvloom.store.saving import choose_victims
from kvloom.store.tier import Continuation, Entry, Tally, TierStatistics

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Held:
    """A chunk and its line in the catalogue."""

    chunk: Chunk
    entry: Entry


class RamStore:
    """Chunks in memory; they leave by expected saving."""

    name = "ram"

    def __init__(self, budget_bytes: int, clock: Callable[[], float] = time.time) -> None:
        self._budget_bytes = budget_bytes
        self._clock = clock
        self._held: dict[str, _Held] = {}
        self._places: dict[bytes, set[str]] = {}
        self._nbytes = 0
        self._tally = Tally(logger)
        self._lock = Lock()

    def get(self, key: ChunkKey) -> Chunk | None:
        """Return a chunk and count the use; None if there is none."""
        with self._lock:
            held = self._held.get(key.name)
            if held is None:
                self._tally.add("misses")
                return None
            entry = held.entry
            held.entry = replace(entry, hits=entry.hits + 1, last_used=self._clock())
            self._tally.add("hits")
            return held.chunk

    def put(self, chunk: Chunk) -> bool:
        """Keep a chunk; it is refused where pinned and larger ones leave no room for it."""
        name, nbytes, now = chunk.name, chunk.nbytes, self._clock()
        with self._lock:
            if name in self._held:
                return True
            entries = [held.entry for held in self._held.values()]
            over = self._nbytes + nbytes - self._budget_bytes
            victims = choose_victims(entries, over, now) if self.takes(nbytes) else None
            if victims is None:
                self._tally.add("refused")
                return False
            for victim in victims:
                self._remove(victim.key.name)
                self._tally.add("evicted")
            entry = Entry(chunk.key, len(chunk.tokens), nbytes, (self.name,), 0, now, now, False)
            self._held[name] = _Held(chunk, entry)
            self._places.setdefault(chunk.key.place.digest, set()).add(name)
            self._nbytes += nbytes
            self._tally.add("stored")
            return True

    def takes(self, nbytes: int) -> bool:
        """Whether a chunk of so many bytes could be kept at all."""
        return nbytes <= self._budget_bytes

    def has(self, name: str) -> bool:
        """Whether there is such a chunk."""
        return name in self._held

    def pin(self, name: str, *, pinned: bool = True) -> bool:
        """Keep a chunk when room is needed, or no longer; say whether that is now so."""
        with self._lock:
            held = self._held.get(name)
            if held is not None:
                held.entry = replace(held.entry, pinned=pinned)
            return held is not None

    def delete(self, name: str) -> bool:
        """Remove a chunk and say whether there was one."""
        with self._lock:
            return self._remove(name)

    def entries(self) -> Sequence[Entry]:
        """Return the catalogue."""
        with self._lock:
            return [held.entry for held in self._held.values()]

    def continuations(self, place: Place, next_token: int | None = None) -> Sequence[Continuation]:
        """Return the chunks at a place; with `next_token`, those that begin with it."""
        with self._lock:
            names = self._places.get(place.digest, ())
            chunks = [self._held[name].chunk for name in names]
        return [
            Continuation(chunk.key, chunk.tokens)
            for chunk in chunks
            if next_token is None or chunk.tokens[0] == next_token
        ]

    def statistics(self) -> TierStatistics:
        """Return the counters."""
        with self._lock:
            return self._tally.statistics(chunks=len(self._held), nbytes=self._nbytes)

    def close(self) -> None:
        """Let go of all chunks."""
        with self._lock:
            self._held.clear()
            self._places.clear()
            self._nbytes = 0

    def _remove(self, name: str) -> bool:
        held = self._held.pop(name, None)
        if held is None:
            return False
        place = held.entry.key.place.digest
        self._places[place].discard(name)
        if not self._places[place]:
            del self._places[place]
        self._nbytes -= held.entry.nbytes
        return True
