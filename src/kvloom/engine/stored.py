"""`Store`: what an `LLM` keeps beyond its process, for whoever runs it.

Knows: what waits on the way to the store, and how to wait for it.
Does not know: tiers, or what KV is looked for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvloom.engine.computing import call
from kvloom.engine.engine import Engine
from kvloom.engine.idle import IdleWork
from kvloom.engine.loop import EngineLoop
from kvloom.engine.shelf import Shelf
from kvloom.store.tier import Entry, TierStatistics

FLUSH_S = 60.0


@dataclass(frozen=True, slots=True)
class StoreUse:
    """What a store did for an engine since both were opened.

    Attributes:
        tiers: counters of each tier, by name, fastest first.
        loaded_tokens: tokens whose KV came from the store.
        kept_tokens: tokens whose KV was handed to the store.
        missed_tokens: tokens whose KV was there, and came too late, damaged or not at all.
        dropped: stretches of KV that were not stored: too many waited, or it failed.
        lookups_skipped: requests that did not ask the store, because an earlier read hangs.
        secret: chunks that were kept in memory only, because of credentials.
        pending: stretches of KV that wait to be stored or are being stored.
    """

    tiers: Mapping[str, TierStatistics]
    loaded_tokens: int
    kept_tokens: int
    missed_tokens: int
    dropped: int
    lookups_skipped: int
    secret: int
    pending: int


class Store:
    """The store of an `LLM`, as `llm.store`; may be used from any thread.

    It shows the KV of all tenants; a name is that of `Entry`.
    """

    def __init__(self, loop: EngineLoop, shelf: Shelf, idle: IdleWork) -> None:
        self._loop = loop
        self._shelf = shelf
        self._idle = idle

    @property
    def folder(self) -> Path | None:
        """Folder of the disk tier; None if there is none."""
        return self._shelf.store.folder

    def statistics(self) -> StoreUse:
        """Return what the store did since it was opened."""
        counts, store = self._shelf.counts, self._shelf.store.statistics()
        return StoreUse(
            tiers=store.tiers,
            loaded_tokens=counts["loaded_tokens"],
            kept_tokens=counts["kept_tokens"],
            missed_tokens=counts["missed_tokens"],
            dropped=counts["dropped"] + store.dropped,
            lookups_skipped=counts["skipped"],
            secret=store.secret,
            pending=self._idle.num_waiting + self._shelf.num_waiting + store.pending,
        )

    def entries(self) -> Sequence[Entry]:
        """Return what is stored, last used first."""
        return sorted(self._shelf.store.entries(), key=lambda entry: -entry.last_used)

    def pin(self, name: str, *, pinned: bool = True) -> bool:
        """Keep a chunk when room is needed, or no longer; say whether there is one."""
        return self._shelf.store.pin(name, pinned=pinned)

    def delete(self, name: str) -> bool:
        """Remove a chunk from all tiers; say whether there was one."""
        return self._shelf.store.delete(name)

    def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until all KV that came up so far is stored; say whether that was so in time.

        Raises:
            KvloomError: the engine is closed.
        """
        end_s = time.monotonic() + timeout_s
        while call(self._loop, _store_next):  # one by one: requests go on in between
            if time.monotonic() >= end_s:
                return False
        return self._shelf.flush(end_s - time.monotonic())


class AsyncStore:
    """The store of an `AsyncLLM`, with the names of `Store`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @property
    def folder(self) -> Path | None:
        """Folder of the disk tier; None if there is none."""
        return self._store.folder

    async def statistics(self) -> StoreUse:
        """Return what the store did since it was opened."""
        return await asyncio.to_thread(self._store.statistics)

    async def entries(self) -> Sequence[Entry]:
        """Return what is stored, last used first."""
        return await asyncio.to_thread(self._store.entries)

    async def pin(self, name: str, *, pinned: bool = True) -> bool:
        """Keep a chunk when room is needed, or no longer; say whether there is one."""
        return await asyncio.to_thread(self._store.pin, name, pinned=pinned)

    async def delete(self, name: str) -> bool:
        """Remove a chunk from all tiers; say whether there was one."""
        return await asyncio.to_thread(self._store.delete, name)

    async def flush(self, timeout_s: float = FLUSH_S) -> bool:
        """Wait until all KV that came up so far is stored; say whether that was so in time."""
        return await asyncio.to_thread(self._store.flush, timeout_s)


def store_of(engine: Engine, loop: EngineLoop) -> Store | None:
    """Return the store of an engine; None if it has none."""
    shelf = engine.memory.shelf
    return None if shelf is None else Store(loop, shelf, engine.idle)


def _store_next(engine: Engine) -> bool:
    return engine.idle.store_next()
