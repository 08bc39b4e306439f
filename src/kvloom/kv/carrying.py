"""Carries the KV of a stretch of tokens out of a pool and into one, bit for bit.

Knows: documents, slots and layouts.
Does not know: where what is carried is kept, or why.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import PAGE_SLOTS, Pool, blocks_for
from kvloom.kv.slots import Slots
from kvloom.kv.span import Span


def carried_out(pool: Pool, spans: Sequence[Span]) -> Slots:
    """Return copies of what spans show, from slot 0 on, in the pool's layout.

    Slots behind the last, which fill up a tile, hold zeros: others' KV stays where it is.
    """
    length = sum(span.length for span in spans)
    size = blocks_for(length) * PAGE_SLOTS if pool.layout == "tiled" else length
    slots = Slots.empty(pool.layers, size, pool.dtype, pool.layout)
    place = 0
    for span in spans:
        assert not span.hidden, "carried a stretch with hidden slots"
        slots.copy(pool, *span.pool_slots, torch.arange(place, place + span.length))
        place += span.length
    return slots


def carried_in(
    pool: Pool, slots: Slots, tokens: Sequence[int], base: int, origin: Lineage
) -> KVDoc:
    """Return a document that holds the KV of tokens, copied from slot 0 on.

    Args:
        pool: of the same dtype.
        slots: where the KV lies; may be mapped from a file.
        tokens: one per slot.
        base: position that the first token's keys are rotated at.
        origin: lineage of what the first token attended to.

    Raises:
        CapacityError: the pool has too few free blocks; nothing is left behind.
    """
    doc = KVDoc(pool, origin, start_pos=base)
    try:
        pool.copy(slots, 0, len(tokens), torch.from_numpy(doc.append(tokens)))
        doc.close_tail()
    except BaseException:
        doc.close()
        raise
    return doc


def fits(pool: Pool, slots: Slots, num_tokens: int) -> bool:
    """Whether slots have the format of a pool and hold so many tokens."""
    mine, theirs = pool.tensors, slots.tensors
    return (
        slots.dtype == pool.dtype
        and mine.keys() == theirs.keys()
        and all(
            x.dtype == y.dtype and (x.shape[0], x.shape[2:]) == (y.shape[0], y.shape[2:])
            for x, y in zip(mine.values(), theirs.values(), strict=True)
        )
        and all(arena.shape[1] >= num_tokens for arena in theirs.values())
    )
