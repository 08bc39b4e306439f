"""Copies KV from one place of the pool to another, bit for bit.

Knows: spans and slots.
Does not know: why a copy is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvloom.kv.doc import KVDoc
from kvloom.kv.span import Span


def append_copies(doc: KVDoc, spans: Sequence[Span]) -> None:
    """Append the tokens of exact spans to a document together with copies of their KV.

    The spans must continue the document: same lineage, same positions, nothing hidden.

    Raises:
        CapacityError: the pool has too few free blocks; the document is unchanged.
    """
    for span in spans:
        assert span.shift == 0, "copied KV that was moved"
        assert span.segment.lineage_at(span.start) == doc.lineage(), "copied KV out of its place"
        slots = torch.from_numpy(doc.append(span.tokens))
        doc.pool.copy(doc.pool, *span.pool_slots, slots)
