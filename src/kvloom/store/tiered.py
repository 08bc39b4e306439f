"""The store as the engine sees it: memory, then disk, then remote.

Knows: in which tier a chunk belongs, and what moves among them in the background.
Does not know: how any tier keeps chunks.

Reading is done by the caller's thread, or by `fetch` on a thread for reading; a remote place is
looked through on a thread of its own. All that writes below memory is done in order by one thread,
so that a deleted chunk cannot come back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from dataclasses import dataclass, replace

from kvloom.store.chunk import Chunk
from kvloom.store.disk import DiskStore
from kvloom.store.key import ChunkKey, Place
from kvloom.store.prefix import Step, find_prefix
from kvloom.store.ram import RamStore
from kvloom.store.remote import RemoteStore
from kvloom.store.secrets import SecretContexts
from kvloom.store.tier import ChunkStore, Continuation, Entry, Tally, TierStatistics
from kvloom.store.worker import Worker

logger = logging.getLogger(__name__)
MAX_LOOKS = 64
"""Prompts that may wait to be looked for remotely."""
PENDING_BYTES = 256 * 2**20
CLOSE_S = 10.0


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """Counters of a store since it was opened.

    Attributes:
        tiers: counters of each tier, by name, fastest first.
        dropped: writes that were left out because too many were waiting.
        secret: chunks that were kept in memory only because of credentials.
        pending: writes that wait or run now.
    """

    tiers: Mapping[str, TierStatistics]
    dropped: int
    secret: int
    pending: int


@dataclass(frozen=True, slots=True)
class Tiers:
    """Some of a store's tiers, to look for chunks in."""

    tiers: tuple[ChunkStore, ...]

    def continuations(self, place: Place, next_token: int | None = None) -> Sequence[Continuation]:
        """Return the chunks at a place in any of the tiers, each once."""
        found: dict[str, Continuation] = {}
        for tier in self.tiers:
            for candidate in tier.continuations(place, next_token):
                found.setdefault(candidate.key.name, candidate)
        return list(found.values())


class TieredStore:
    """Memory in front of an optional folder and an optional remote place.

    Args:
        ram: the first tier; secrets stay here.
        disk: the second tier.
        remote: the third tier.
        pending_bytes: KV that may wait to be written; what comes above is dropped and counted.

    Attributes:
        folder: of the second tier; None if there is none.
        near: the tiers that answer at once.
    """

    name = "tiered"

    def __init__(
        self,
        ram: RamStore,
        disk: DiskStore | None = None,
        remote: RemoteStore | None = None,
        *,
        pending_bytes: int = PENDING_BYTES,
    ) -> None:
        self.folder = None if disk is None else disk.folder
        self._ram = ram
        self._lower: list[ChunkStore] = [tier for tier in (disk, remote) if tier is not None]
        self._secrets = SecretContexts()
        self._secret_names: set[str] = set()
        self._num_dropped = 0
        self._num_secret = 0
        self._tally = Tally(logger)
        self._writer = Worker("kvloom-store-writer", pending_bytes)
        self._reader = Worker("kvloom-store-reader", 2**63)
        self._seeker = None if remote is None else Worker("kvloom-store-seeker", MAX_LOOKS)
        self.near = Tiers((ram,) if disk is None else (ram, disk))

    def get(self, key: ChunkKey) -> Chunk | None:
        """Return a chunk from the first tier that has it, and copy it up in the background."""
        passed: list[ChunkStore] = []
        for tier in (self._ram, *self._lower):
            chunk = tier.get(key)
            if chunk is not None:
                self._promote(chunk, passed)
                return chunk
            passed.append(tier)
        return None

    def fetch(self, key: ChunkKey) -> Future[Chunk | None]:
        """Do what `get` does on another thread."""
        future = self._reader.submit(lambda: self.get(key), must=True)
        if future is None:  # closed
            future = Future()
            future.set_result(None)
        return future

    def find_far(
        self, fingerprint: bytes, tokens: Sequence[int], tenant: str
    ) -> Future[list[Step]] | None:
        """Look for a prompt's beginning in all tiers, on another thread.

        None where no tier is far away, or where too many wait for it.
        """
        if self._seeker is None:
            return None
        return self._seeker.submit(lambda: find_prefix(self, fingerprint, tokens, tenant))

    def put(self, chunk: Chunk, *, secret: bool = False) -> bool:
        """Keep a chunk in memory now and below it soon; say whether any tier takes it.

        A chunk with credentials, or one that attended to such a chunk, stays in memory; copies
        that lower tiers may have of it are removed.
        """
        known = chunk.name in self._secret_names or self.is_secret_context(chunk.key.context)
        if secret or known:
            return self._put_secret(chunk)
        kept = self._ram.put(chunk)
        return self._write(chunk, self._lower) or kept

    def is_secret_context(self, context: bytes | None) -> bool:
        """Whether KV at a context has attended to a chunk with credentials."""
        return context in self._secrets

    def has(self, name: str) -> bool:
        """Whether any tier has such a chunk."""
        return self.tier_of(name) is not None

    def tier_of(self, name: str) -> str | None:
        """Return the name of the first tier that has such a chunk; None if none has."""
        return next((t.name for t in (self._ram, *self._lower) if t.has(name)), None)

    def pin(self, name: str, *, pinned: bool = True) -> bool:
        """Keep a chunk when room is needed, or no longer; say whether any tier does so."""
        done = [tier.pin(name, pinned=pinned) for tier in (self._ram, *self._lower)]
        return any(done)

    def delete(self, name: str) -> bool:
        """Remove a chunk from all tiers, behind the writes that wait; say whether there was one."""

        def delete() -> bool:
            done = [tier.delete(name) for tier in (self._ram, *self._lower)]
            return any(done)

        future = self._writer.submit(delete, must=True)
        if future is None:
            return False
        with suppress(FutureTimeoutError):
            return future.result(CLOSE_S)
        self._tally.say_once("delete", "a chunk is removed later: writing takes long")
        return False

    def entries(self) -> Sequence[Entry]:
        """Return the catalogue of all tiers, one entry per chunk."""
        found: dict[str, Entry] = {}
        for tier in (self._ram, *self._lower):
            for entry in tier.entries():
                name = entry.key.name
                found[name] = _joined(found[name], entry) if name in found else entry
        return list(found.values())

    def continuations(self, place: Place, next_token: int | None = None) -> Sequence[Continuation]:
        """Return the chunks at a place in any tier, each once."""
        return Tiers((self._ram, *self._lower)).continuations(place, next_token)

    def statistics(self) -> StoreStatistics:
        """Return the counters."""
        tiers = {tier.name: tier.statistics() for tier in (self._ram, *self._lower)}
        return StoreStatistics(tiers, self._num_dropped, self._num_secret, self._writer.num_tasks)

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until everything is written; say whether that was so in time."""
        return self._writer.drain(timeout_s)

    def close(self, timeout_s: float = CLOSE_S) -> bool:
        """Write what waits and let go; say whether everything was written in time."""
        self._reader.close(0.0)
        if self._seeker is not None:
            self._seeker.close(0.0)
        done = self._writer.close(timeout_s)
        if not done:
            logger.warning("the store is closed before all chunks were written")
        for tier in (self._ram, *self._lower):
            tier.close()
        return done

    def _put_secret(self, chunk: Chunk) -> bool:
        self._num_secret += 1
        self._secrets.add(chunk.origin, chunk.tokens)
        name = chunk.name
        self._secret_names.add(name)
        for tier in self._lower:
            self._writer.submit(self._purge(tier, name), must=True)
        return self._ram.put(chunk)

    def _purge(self, tier: ChunkStore, name: str) -> Callable[[], None]:
        """Return the task that removes a chunk that was kept, and all that has attended to it."""

        def purge() -> None:
            found = tier.delete(name)
            while found:
                behind = [e.key for e in tier.entries() if self.is_secret_context(e.key.context)]
                found = bool(behind)
                for key in behind:
                    chunk = tier.get(key)
                    if chunk is not None:
                        self._secrets.add(chunk.origin, chunk.tokens)
                    found &= tier.delete(key.name)  # what cannot be removed is not tried for ever

        return purge

    def _promote(self, chunk: Chunk, tiers: Sequence[ChunkStore]) -> None:
        useful = [t for t in tiers if t is not self._ram or self._ram.takes(chunk.nbytes)]
        # Memory of its own: a mapped file's bytes are not the first tier's.
        self._write(chunk, useful, copy=True)

    def _write(self, chunk: Chunk, tiers: Sequence[ChunkStore], *, copy: bool = False) -> bool:
        """Put a chunk into tiers in the background; say whether there was room in the queue."""
        if not tiers:
            return False

        def write() -> None:
            if chunk.name in self._secret_names or self.is_secret_context(chunk.key.context):
                return  # that has become known since
            whole = chunk.copied() if copy else chunk
            for tier in tiers:
                tier.put(whole)

        future = self._writer.submit(write, size=chunk.nbytes)
        if future is None:
            self._num_dropped += 1
            self._tally.say_once("dropped", "chunks are not stored: too many wait to be written")
            return False
        future.add_done_callback(self._report)
        return True

    def _report(self, future: Future[None]) -> None:
        if (error := future.exception()) is not None:
            self._tally.say_once("write", "a chunk was not stored: %s", error)


def _joined(upper: Entry, lower: Entry) -> Entry:
    return replace(
        upper,
        nbytes=max(upper.nbytes, lower.nbytes),
        tiers=upper.tiers + lower.tiers,
        hits=upper.hits + lower.hits,
        created=min(upper.created, lower.created),
        last_used=max(upper.last_used, lower.last_used),
        pinned=upper.pinned or lower.pinned,
    )
