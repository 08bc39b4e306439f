"""Compaction: a document that many edits have scattered over half-empty blocks moves together.

Knows: which blocks a document fills badly, and how its KV is copied into others, bit for bit.
Does not know: when there is time for it.

Nothing is computed and no key is turned: every stretch keeps its shift, its lineage and what is
hidden in it, and only lies elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np
import torch

from kvloom.kv.doc import KVDoc
from kvloom.kv.pool import PAGE_SLOTS, blocks_for
from kvloom.kv.segment import Segment
from kvloom.kv.span import Span
from kvloom.types import SlotRange

BADLY_FILLED = PAGE_SLOTS * 3 // 4
"""A block of which a document holds fewer slots may be emptied."""
WORTH_BLOCKS = 4
"""Fewer blocks are not worth the time."""
WORTH_SHARE = 0.25
"""Nor is a smaller share of the blocks that a document fills when it lies together."""


def tidy(doc: KVDoc) -> bool:
    """Compact a document if that is worth its time; say whether it was done."""
    bad, num_moved = _badly_filled(doc)
    saved = len(bad) - blocks_for(num_moved)
    worth = max(WORTH_BLOCKS, WORTH_SHARE * blocks_for(doc.length))
    return saved >= worth and compact(doc)


def compact(doc: KVDoc) -> bool:
    """Move what lies in badly filled blocks into one run of others; say whether any is saved.

    Blocks that others own as well stay: they would not be freed. Without a free run of the length
    nothing is done.
    """
    doc.close_tail()
    bad, num_moved = _badly_filled(doc)
    if blocks_for(num_moved) >= len(bad):
        return False
    run = doc.pool.allocate_whole(blocks_for(num_moved))
    if run is None:
        return False
    first = run.first_block * PAGE_SLOTS
    try:
        doc.replace_beginning(_moved(doc, bad, first))
    finally:
        doc.pool.release(first, first + run.num_blocks * PAGE_SLOTS)
    return True


def _badly_filled(doc: KVDoc) -> tuple[set[int], int]:
    """Return the blocks that are worth emptying, and how many tokens stand in them."""
    pool = doc.pool
    mine = np.zeros(pool.num_blocks, dtype=np.int64)
    for first, stop in doc.owned_ranges():
        mine[first // PAGE_SLOTS : blocks_for(stop)] += 1
    held = _slots_by_block(doc.spans, pool.num_blocks)
    bad = (mine > 0) & (held < BADLY_FILLED) & (pool.owners() == mine)
    shown = _slots_by_block(doc.order, pool.num_blocks)
    return set(np.flatnonzero(bad).tolist()), int(shown[bad].sum())


def _slots_by_block(spans: Iterable[Span], num_blocks: int) -> np.ndarray:
    counts = np.zeros(num_blocks, dtype=np.int64)
    for span in spans:
        for block, start, stop in _by_block(span):
            counts[block] += stop - start
    return counts


def _by_block(span: Span) -> Iterator[tuple[int, int, int]]:
    """Yield the blocks a stretch lies in, each with the part of the stretch that does."""
    first, stop = span.pool_slots
    edges = [first, *range((first // PAGE_SLOTS + 1) * PAGE_SLOTS, stop, PAGE_SLOTS), stop]
    for low, high in pairwise(edges):
        yield low // PAGE_SLOTS, low - first, high - first


def _moved(doc: KVDoc, blocks: set[int], first_slot: int) -> list[Span]:
    """Copy what lies in these blocks to slots from the first one on; return the pieces then."""
    pieces: list[Span] = []
    from_slots: list[np.ndarray] = []
    place = first_slot
    for piece in doc.order:
        for start, stop, moves in _parts(piece, blocks):
            part = piece.sub(start, stop)
            if moves:
                from_slots.append(np.arange(*part.pool_slots))
                part = _at_slot(part, place)
                place += part.length
            pieces.append(part)
    if from_slots:
        slots = torch.arange(first_slot, place)
        doc.pool.copy_slots(torch.from_numpy(np.concatenate(from_slots)), slots)
        doc.pool.give_rest_back(place)
    return pieces


def _parts(piece: Span, blocks: set[int]) -> Iterator[tuple[int, int, bool]]:
    """Yield the longest parts of a piece that move, and those that stay."""
    begin, moves = 0, False
    for block, start, _ in _by_block(piece):
        if (block in blocks) != moves:
            if begin < start:
                yield begin, start, moves
            begin, moves = start, not moves
    yield begin, piece.length, moves


def _at_slot(part: Span, first_slot: int) -> Span:
    """Return a stretch as it is shown of a segment that lies elsewhere."""
    segment, start = part.segment, part.start
    base, origin = segment.base + start, segment.lineage_at(start)
    moved = Segment(segment.pool, first_slot, part.length, base=base, origin=origin)
    moved.append(part.tokens)
    if segment.arrays is not None:
        moved.arrays = segment.arrays.part(start, part.stop)
    moved.closed = True  # its slots belong to whoever shows them, as those of any closed segment
    hidden = tuple(SlotRange(cut.start - start, cut.stop - start) for cut in part.hidden)
    return Span(moved, 0, part.length, part.shift, hidden)
