"""Transplants of one half: the keys of one context beside the values of another.

Knows: how such KV is copied into segments of its own, and whose lineage it has.
Does not know: edits, or where the tokens come to stand.

What both contexts computed alike is shown and not copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch

from kvloom.kv.doc import KVDoc
from kvloom.kv.plan import Mix
from kvloom.kv.span import Span, cut


@contextmanager
def mixed(doc: KVDoc, part: Mix) -> Iterator[list[Span]]:
    """Give spans of mixed KV in reading order, held until the context ends.

    Keys keep the positions they were rotated at, so the spans must still be placed.

    Raises:
        CapacityError: the pool has too few free blocks; nothing is left behind.
    """
    ours, theirs = list(cut(doc.order, part.start, part.stop)), part.spans
    keys, values = (theirs, ours) if part.taken == "keys" else (ours, theirs)
    spans: list[Span] = []
    holders: list[KVDoc] = []
    try:
        for key, value in _aligned(list(keys), list(values)):
            hidden = np.arange(key.length)[~(key.visible & value.visible)]
            if key.segment.lineage_at(key.stop) == value.segment.lineage_at(value.stop):
                spans.append(key.without(key.pos[hidden]))
                continue
            holder = _copied(doc, key, value, part.taken)
            holders.append(holder)
            pos = hidden + holder.start_pos
            spans += [span.without(pos) for span in holder.spans]
        yield spans
    finally:
        for holder in holders:
            holder.close()


def _aligned(keys: list[Span], values: list[Span]) -> Iterator[tuple[Span, Span]]:
    """Yield the stretches of two lists cut at the same places."""
    edges = sorted({0, *_edges(keys), *_edges(values)})
    for start, stop in pairwise(edges):
        (key,), (value,) = cut(keys, start, stop), cut(values, start, stop)
        yield key, value


def _edges(pieces: Iterable[Span]) -> Iterator[int]:
    place = 0
    for piece in pieces:
        place += piece.length
        yield place


def _copied(doc: KVDoc, key: Span, value: Span, taken: str) -> KVDoc:
    """Return a document that holds copies of one stretch's keys and of another's values."""
    pool, segment = doc.pool, key.segment
    origin = segment.lineage_at(key.start).alter(
        f"transplant {taken}", value.segment.lineage_at(value.stop)
    )
    holder = KVDoc(pool, origin, start_pos=segment.rotated_from(key.start))
    slots = torch.from_numpy(holder.append(key.tokens))
    for layer in range(len(pool.keys)):
        k, _ = pool.read(layer, *key.pool_slots)
        _, v = pool.read(layer, *value.pool_slots)
        pool.write(layer, slots, k.clone(), v.clone())
    holder.close_tail()
    return holder
