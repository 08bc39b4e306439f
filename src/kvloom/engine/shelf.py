"""The shelf: prefixes that outlive the pool and the process, between documents and the store.

Knows: which part of a document is stored already, and how stored chunks become spans again.
Does not know: tiers, files, or when requests run.

Only KV that equals a fresh prefill is shelved. A failed read is a miss: the tokens are computed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvloom.kv.carrying import carried_in, carried_out, fits
from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import Pool, blocks_for
from kvloom.kv.slots import Slots
from kvloom.kv.span import Span, cut
from kvloom.store.chunk import Chunk, ChunkDType
from kvloom.store.key import Place, context_of, hash_tokens
from kvloom.store.prefix import Step, find_prefix
from kvloom.store.worker import Worker

if TYPE_CHECKING:
    from kvloom.store.tiered import TieredStore

logger = logging.getLogger(__name__)

MIN_LOADED = 32
"""A stored beginning is loaded where it saves at least so many tokens."""
OVERLAP_TOKENS = 64
"""So many tokens before a chunk are scanned with it, lest it hold the rest of a credential."""
SCANNED_BYTES = 512 * 2**20
"""KV that may wait to be scanned; what comes above is dropped and counted."""
CLOSE_S = 10.0


@dataclass(slots=True)
class Loading:
    """Chunks on their way to a request.

    Attributes:
        steps: which chunks, in order.
        futures: one per chunk.
    """

    steps: list[Step]
    futures: list[Future[Chunk | None]]

    @property
    def num_blocks(self) -> int:
        """Blocks that they take in the pool; each chunk begins one."""
        return sum(blocks_for(step.num_tokens) for step in self.steps)

    def wait(self, timeout_s: float) -> None:
        """Wait until all have arrived or failed, or the time is over."""
        wait(self.futures, timeout_s)

    @property
    def done(self) -> bool:
        """Whether all have arrived or failed."""
        return all(future.done() for future in self.futures)


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
        self._waiting: dict[KVDoc, str] = {}
        self._scanner = Worker("kvloom-secret-scanner", SCANNED_BYTES)

    def look(self, tokens: Sequence[int], known: int, tenant: str) -> Loading | None:
        """Begin to load the stored beginning of a prompt; None if it adds little to what is known.

        Args:
            tokens: of the prompt, as far as they need no logits.
            known: of these, tokens whose KV is in the pool.
            tenant: `hash_tenant` of whoever asks.
        """
        steps = find_prefix(self.store, self._fingerprint, tokens, tenant)
        if sum(step.num_tokens for step in steps) - known < MIN_LOADED:
            return None
        return Loading(steps, [self.store.fetch(step.key) for step in steps])

    def take(self, loading: Loading) -> KVDoc:
        """Return a document of what has arrived, up to the first chunk that has not.

        Raises:
            CapacityError: the pool has too few free blocks; nothing is left behind.
        """
        doc = KVDoc(self._pool, self._root)
        try:
            for step, future in zip(loading.steps, loading.futures, strict=True):
                chunk = future.result() if future.exception() is None else None
                slots = None if chunk is None else Slots.of_tensors(chunk.tensors, chunk.layout)
                if chunk is None or slots is None or not fits(self._pool, slots, len(chunk.tokens)):
                    self.counts["missed"] += 1
                    break
                tokens = chunk.tokens[: step.num_tokens].tolist()
                holder = carried_in(self._pool, slots, tokens, chunk.base, chunk.origin)
                doc.extend(holder.spans)
                holder.close()
                self.counts["loaded_tokens"] += step.num_tokens
        except BaseException:
            doc.close()
            raise
        return doc

    def put_by(self, doc: KVDoc, tenant: str) -> None:
        """Take a fork of a document, to be stored when there is time."""
        self._waiting[doc] = tenant

    @property
    def next_waiting(self) -> KVDoc | None:
        """The document that is stored next."""
        return next(iter(self._waiting), None)

    def keep_next(self) -> None:
        """Store the next document that waits."""
        doc = next(iter(self._waiting))
        self._keep(doc, self._waiting.pop(doc))

    def close(self) -> None:
        """Write what waits, as far as time allows."""
        self._scanner.close(CLOSE_S)
        self.store.close()

    def _keep(self, doc: KVDoc, tenant: str) -> None:
        """Store what a document holds exactly and the store does not have yet."""
        length = doc.exact_length()
        tokens = doc.tokens[:length]
        steps = find_prefix(self.store, self._fingerprint, tokens, tenant)
        start = sum(step.num_tokens for step in steps)
        if start >= length:
            return
        doc.seal()
        spans = list(cut(doc.order, start, length))
        chunk = self._chunk(spans, tokens, start, tenant)
        # What stands before is scanned again as far as a credential could reach across.
        scanned = tokens[max(start - OVERLAP_TOKENS, 0) : length]

        def put() -> None:
            self.store.put(chunk, secret=bool(self._scan(scanned)))

        if self._scanner.submit(put, size=chunk.nbytes) is None:
            self.counts["dropped"] += 1
            return
        self.counts["kept_tokens"] += length - start

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
            dtype=_dtype_name(slots),
            num_slots=slots.num_slots,
            tensors=slots.tensors,
            origin=origin,
        )


def _dtype_name(slots: Slots) -> ChunkDType:
    name = str(slots.dtype).removeprefix("torch.")
    assert name in {"float32", "bfloat16", "int8"}, f"no chunk holds {name}"
    return name  # type: ignore[return-value]
