"""Chunks: stretches of text whose KV was computed before, to be shown at any place.

Knows: which chunks are in memory, in which variants, and that room may be made at their expense.
Does not know: prompts, or how chunks are repaired.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvloom.engine.memory import EngineMemory
from kvloom.engine.shelf import Shelf
from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.span import Span
from kvloom.reuse.craft import ChunkStatistics
from kvloom.store.key import context_of, hash_tokens

MAX_VARIANTS = 5
"""Variants of one chunk that are kept, as in the example of Cache-Craft (Agarwal et al. 2025)."""
_Key = tuple[bytes, str]


@dataclass(slots=True, eq=False)
class Variant:
    """KV of a chunk's tokens, as it was computed behind one context.

    Attributes:
        id: what tells it from the chunk's other variants; the same for the same context.
        doc: shows the chunk and nothing else, at the positions that it was computed at.
        origin: lineage of what stood before it then.
        statistics: what it attended to then; None where nobody took note.
        saved_rows: rows that did not have to be computed thanks to it.
    """

    id: str
    doc: KVDoc
    origin: Lineage
    statistics: ChunkStatistics | None
    saved_rows: float = 0.0

    @property
    def base(self) -> int:
        """Position that its first key is rotated at."""
        return self.doc.start_pos


class Chunks:
    """The chunks of one engine.

    Args:
        memory: holds the documents, and forgets them when room is needed.
    """

    def __init__(self, memory: EngineMemory) -> None:
        self._memory = memory
        self._variants: dict[_Key, list[Variant]] = {}

    def __len__(self) -> int:
        return len(self._variants)

    def variants(self, tokens: Sequence[int], tenant: str) -> list[Variant]:
        """Return what is held of a chunk; only the engine's thread may look into it."""
        self._drop_forgotten()
        return list(self._variants.get(_key(tokens, tenant), ()))

    def take(
        self, tokens: Sequence[int], tenant: str, variant_id: str, saved_rows: float = 0.0
    ) -> KVDoc | None:
        """Return a fork of a variant's document; None if there is none.

        The fork is protected from being forgotten until the receiver lets go of it.

        Args:
            tokens: of the chunk.
            tenant: whose it is.
            variant_id: which variant.
            saved_rows: what this use saves; counts when a variant must go.
        """
        for variant in self.variants(tokens, tenant):
            if variant.id == variant_id:
                variant.saved_rows += saved_rows
                self._memory.hold(variant.doc)
                return self._memory.fork_protected(variant.doc)
        return None

    def add(
        self,
        pieces: Iterable[Span],
        tenant: str,
        statistics: ChunkStatistics | None = None,
    ) -> str:
        """Keep a chunk as pieces in reading order show it, and return the variant's name.

        The pieces were computed plainly one behind the other, and their segments are closed.
        """
        pieces = list(pieces)
        first = pieces[0]
        assert not any(piece.shift for piece in pieces), "kept KV that was moved"
        origin = first.segment.lineage_at(first.start)
        doc = KVDoc(self._memory.pool, origin, pieces, start_pos=first.first_pos)
        added = Variant(variant_id(origin), doc, origin, statistics)
        self._memory.hold(doc)
        self._drop_forgotten()
        kept = self._variants.setdefault(_key(doc.tokens, tenant), [])
        for same in [variant for variant in kept if variant.id == added.id]:
            kept.remove(same)
            added.saved_rows = same.saved_rows
            added.statistics = added.statistics or same.statistics
            self._memory.forget(same.doc)
        if len(kept) == MAX_VARIANTS:
            least = min(kept, key=lambda variant: variant.saved_rows)
            kept.remove(least)
            self._memory.forget(least.doc)
        kept.append(added)
        return added.id

    def store(self, tokens: Sequence[int], tenant: str, variant_id: str, shelf: Shelf) -> None:
        """Let a variant outlive the pool, as far as it is still held."""
        for variant in self.variants(tokens, tenant):
            if variant.id == variant_id:
                shelf.keep_chunk(variant.doc, tenant)

    def clear(self) -> None:
        """Let go of all chunks."""
        for variant in (one for kept in self._variants.values() for one in kept):
            self._memory.forget(variant.doc)
        self._variants.clear()

    def _drop_forgotten(self) -> None:
        for key, kept in list(self._variants.items()):
            for variant in [one for one in kept if one.doc.length == 0]:
                kept.remove(variant)
                self._memory.forget(variant.doc)
            if not kept:
                del self._variants[key]


def variant_id(origin: Lineage) -> str:
    """Return the name of the variant of any chunk that was computed behind something."""
    return context_of(origin).hex()[:16]


def _key(tokens: Sequence[int], tenant: str) -> _Key:
    return hash_tokens(tokens), tenant
