"""The shelf: KV that outlives the pool and the process, between documents and the store.

Knows: which part of a document is stored already, and how stored chunks become spans again.
Does not know: tiers, files, or when requests run.

Only KV that was computed plainly is shelved: beginnings of prompts, and chunks behind their sink. A
failed read is a miss: the tokens are computed.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvloom.kv.carrying import carried_in, carried_out, fits
from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import Pool, blocks_for
from kvloom.kv.slots import Slots
from kvloom.kv.span import Span, cut
from kvloom.store.chunk import Chunk, ChunkDType
from kvloom.store.key import ChunkKey, Place, context_of, hash_tokens
from kvloom.store.prefix import Step, find_prefix
from kvloom.store.tier import Tally
from kvloom.store.worker import Worker

if TYPE_CHECKING:
    from kvloom.store.tiered import TieredStore

logger = logging.getLogger(__name__)

MIN_LOADED = 32
"""A stored beginning is loaded where it saves at least so many tokens."""
LOADING_S = 2.0
"""A request waits so long for its stored beginning; then it is computed."""
LOOKING_S = 1.0
"""A request waits so long until far places say what they have of it; then near ones do."""
OVERLAP_TOKENS = 64
"""So many tokens before a chunk are scanned with it, lest it hold the rest of a credential."""
SCANNED_BYTES = 512 * 2**20
"""KV that may wait to be scanned; what comes above is dropped and counted."""
CLOSE_S = 10.0
_DTYPE_NAMES: Mapping[torch.dtype, ChunkDType] = MappingProxyType(
    {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}
)


@dataclass(slots=True)
class Looking:
    """A prompt that is looked for where answers take time.

    Attributes:
        near: the chunks of it that answered at once.
        known: tokens that are in the pool.
        far: the chunks of it in all places.
        late_s: when nobody waits any longer, in `time.monotonic`.
    """

    near: list[Step]
    known: int
    far: Future[list[Step]]
    late_s: float

    def wait(self, timeout_s: float) -> None:
        """Wait for the answer, or until the time is over."""
        wait([self.far], timeout_s)

    @property
    def over(self) -> bool:
        """Whether the answer has come, or comes too late."""
        return self.far.done() or time.monotonic() >= self.late_s


@dataclass(slots=True)
class Loading:
    """Chunks on their way to a request.

    Attributes:
        steps: which chunks, in order.
        futures: one per chunk.
        late_s: when nobody waits for them any longer, in `time.monotonic`.
    """

    steps: list[Step]
    futures: list[Future[Chunk | None]]
    late_s: float

    @property
    def num_blocks(self) -> int:
        """Blocks that they take in the pool; each chunk begins one."""
        return sum(blocks_for(step.num_tokens) for step in self.steps)

    def wait(self, timeout_s: float) -> None:
        """Wait until all have arrived or failed, or the time is over."""
        wait(self.futures, timeout_s)

    @property
    def over(self) -> bool:
        """Whether all have arrived or failed, or the rest comes too late."""
        return all(future.done() for future in self.futures) or time.monotonic() >= self.late_s


class Shelf:
    """Stored prefixes of one engine.

    Args:
        store: keeps chunks.
        pool: where they are loaded to.
        root: lineage of the empty document.
        fingerprint: of the passport.
        scan: returns what credentials a text of tokens seems to hold.
    """

    def __init__(
        self,
        store: TieredStore,
        pool: Pool,
        root: Lineage,
        fingerprint: bytes,
        scan: Callable[[Sequence[int]], Sequence[str]],
    ) -> None:
        self.store = store
        self._pool = pool
        self._root = root
        self._fingerprint = fingerprint
        self._scan = scan
        self.counts: Counter[str] = Counter()
        self._late: list[Future[Chunk | None]] = []
        self._late_look: Future[list[Step]] | None = None
        self._tally = Tally(logger)
        self._scanner = Worker("kvloom-secret-scanner", SCANNED_BYTES)

    def look(self, tokens: Sequence[int], known: int, tenant: str) -> Looking | Loading | None:
        """Look for the stored beginning of a prompt; None if it adds little to what is known.

        What is near is found at once, and loading begins. Far places are asked where that leaves
        enough tokens to compute; what was found near is loaded when they have answered.

        Args:
            tokens: of the prompt, as far as they need no logits.
            known: of these, tokens whose KV is in the pool.
            tenant: `hash_tenant` of whoever asks.
        """
        self._late = [future for future in self._late if not future.done()]
        if self._late:  # it hangs: nobody waits for it before it has answered
            self.counts["skipped"] += 1
            return None
        near = find_prefix(self.store.near, self._fingerprint, tokens, tenant)
        if len(tokens) - max(known, _length(near)) >= MIN_LOADED:
            far = self._look_far(tokens, tenant)
            if far is not None:
                return Looking(near, known, far, time.monotonic() + LOOKING_S)
        return self._load(near, known)

    def load(self, looking: Looking) -> Loading | None:
        """Begin to load what was found, where it adds enough to what is known."""
        steps = looking.near
        if not looking.far.done() and not looking.far.cancel():
            self._late_look = looking.far
        elif not looking.far.cancelled() and looking.far.exception() is None:
            steps = max(steps, looking.far.result(), key=_length)
        return self._load(steps, looking.known)

    def take(self, loading: Loading) -> KVDoc:
        """Return a document of what has arrived, up to the first chunk that has not."""
        doc = KVDoc(self._pool, self._root)
        for step, future in zip(loading.steps, loading.futures, strict=True):
            chunk = self._arrived(future)
            try:
                taken = chunk is not None and self._append(doc, chunk, step.num_tokens)
            except Exception as error:  # computed instead, whatever is wrong with it
                taken = False
                self._tally.say_once("load", "stored KV is not used: %s", error)
            if not taken:
                self.counts["missed"] += 1
                break
            self.counts["loaded_tokens"] += step.num_tokens
        expected = sum(step.num_tokens for step in loading.steps)
        self.counts["missed_tokens"] += expected - doc.length
        self._late += [future for future in loading.futures if not self._is_off(future)]
        return doc

    @property
    def num_waiting(self) -> int:
        """Stretches of KV that wait to be scanned."""
        return self._scanner.num_tasks

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was kept is written; say whether that was so in time."""
        end_s = time.monotonic() + timeout_s
        return self._scanner.drain(timeout_s) and self.store.flush(end_s - time.monotonic())

    def close(self) -> None:
        """Write what waits, as far as time allows."""
        self._scanner.close(CLOSE_S)
        self.store.close()

    def keep(self, doc: KVDoc, tenant: str) -> None:
        """Store what a document holds exactly and the store does not have yet."""
        length = doc.exact_length()
        tokens = doc.tokens[:length]
        start = _length(find_prefix(self.store.near, self._fingerprint, tokens, tenant))
        if start >= length:
            return
        doc.seal()
        spans = list(cut(doc.order, start, length))
        chunk = self._chunk(spans, tokens, start, tenant)
        # What stands before is scanned again as far as a credential could reach across.
        self._put(chunk, tokens[max(start - OVERLAP_TOKENS, 0) : length])

    def keep_chunk(self, doc: KVDoc, tenant: str) -> None:
        """Store a document of nothing but a chunk, under the lineage that it was computed behind.

        Its tokens are from the first on what one pass made; nothing of it moved or was repaired.
        """
        self._put(self._chunk(list(doc.order), doc.tokens, 0, tenant), doc.tokens)

    def key(self, tokens: Sequence[int], behind: Lineage, tenant: str) -> ChunkKey:
        """Return the key of a chunk that was computed behind something."""
        place = Place(self._fingerprint, "", context_of(behind), tenant)
        return place.key(hash_tokens(tokens))

    def fetch(self, key: ChunkKey) -> Future[Chunk | None]:
        """Begin to read a chunk; may be called from any thread."""
        return self.store.fetch(key)

    def take_chunk(self, key: ChunkKey, base: int, future: Future[Chunk | None]) -> KVDoc | None:
        """Return a document of a chunk that was read; None, and counted, if it cannot be used.

        Args:
            key: it was asked for with.
            base: position that its first key must be rotated at.
            future: of `fetch`; if it has not ended, nobody waits for it any longer.
        """
        chunk = self._arrived(future)
        doc = None
        try:
            if chunk is not None and (chunk.key, chunk.base) == (key, base):
                doc = self._carried_in(chunk)
        except Exception as error:  # computed instead, whatever is wrong with it
            self._tally.say_once("load", "stored KV is not used: %s", error)
        if doc is None:
            self.counts["missed"] += 1
        else:
            self.counts["loaded_tokens"] += doc.length
        if not self._is_off(future):
            self._late.append(future)
        return doc

    def _put(self, chunk: Chunk, scanned: Sequence[int]) -> None:
        """Scan tokens for credentials, and store a chunk, both in the background."""

        def put() -> None:
            if not self.store.has(chunk.name):
                self.store.put(chunk, secret=bool(self._scan(scanned)))

        future = self._scanner.submit(put, size=chunk.nbytes)
        if future is None:
            self.counts["dropped"] += 1
            return
        future.add_done_callback(self._report)
        self.counts["kept_tokens"] += len(chunk.tokens)

    def _look_far(self, tokens: Sequence[int], tenant: str) -> Future[list[Step]] | None:
        """Ask far places for a prompt, unless they have yet to answer somebody who has gone."""
        if self._late_look is not None and not self._late_look.done():
            self.counts["skipped"] += 1
            return None
        self._late_look = None
        return self.store.find_far(self._fingerprint, tokens, tenant)

    def _load(self, steps: list[Step], known: int) -> Loading | None:
        if _length(steps) - known < MIN_LOADED:
            return None
        late_s = time.monotonic() + LOADING_S
        return Loading(steps, [self.store.fetch(step.key) for step in steps], late_s)

    def _report(self, future: Future[None]) -> None:
        if (error := future.exception()) is not None:
            self.counts["dropped"] += 1
            self._tally.say_once("scan", "KV was not stored: %s", error)

    def _arrived(self, future: Future[Chunk | None]) -> Chunk | None:
        if not future.done() or future.cancelled() or future.exception() is not None:
            return None
        return future.result()

    def _is_off(self, future: Future[Chunk | None]) -> bool:
        """Whether a read has ended or will not begin."""
        return future.done() or future.cancel()

    def _append(self, doc: KVDoc, chunk: Chunk, num_tokens: int) -> bool:
        """Show a chunk's first tokens at a document's end; say whether its format is the pool's."""
        holder = self._carried_in(chunk, num_tokens)
        if holder is None:
            return False
        try:
            doc.extend(holder.spans)
        finally:
            holder.close()
        return True

    def _carried_in(self, chunk: Chunk, num_tokens: int | None = None) -> KVDoc | None:
        """Return a document of a chunk's first tokens; None if its format is not the pool's."""
        slots = Slots.of_tensors(chunk.tensors, chunk.layout)
        if not fits(self._pool, slots, len(chunk.tokens)):
            return None
        tokens = chunk.tokens[:num_tokens].tolist()
        return carried_in(self._pool, slots, tokens, chunk.base, chunk.origin)

    def _chunk(self, spans: list[Span], tokens: list[int], start: int, tenant: str) -> Chunk:
        slots = carried_out(self._pool, spans)
        origin = spans[0].segment.lineage_at(spans[0].start)
        array = np.array(tokens[start:], dtype=np.int64)
        place = Place(self._fingerprint, "", context_of(origin), tenant)
        return Chunk(
            key=place.key(hash_tokens(array)),
            tokens=array,
            base=spans[0].first_pos,
            layout=slots.layout,
            dtype=_DTYPE_NAMES[slots.dtype],
            num_slots=slots.num_slots,
            tensors=slots.tensors,
            origin=origin,
        )


def _length(steps: Sequence[Step]) -> int:
    return sum(step.num_tokens for step in steps)
