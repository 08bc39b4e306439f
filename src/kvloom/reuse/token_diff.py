"""The difference of two token sequences as few replaced ranges.

Knows: tokens as numbers.
Does not know: text or documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MIN_KEPT = 4
"""Fewer equal tokens between two hunks are replaced too: each hunk is a step of its own."""


class Hunk(NamedTuple):
    """Tokens old_start to old_stop - 1 of the old sequence become the new one's."""

    old_start: int
    old_stop: int
    new_start: int
    new_stop: int


def hunks(old: Sequence[int], new: Sequence[int], min_kept: int = MIN_KEPT) -> list[Hunk]:
    """Return where two sequences differ, ascending.

    Source: Hyyrö (2003), bit-parallel edit distance, as rapidfuzz has it; with `min_kept` of 1
    the fewest tokens are inserted, deleted or replaced.
    """
    from rapidfuzz.distance import Levenshtein  # few runs edit a text

    found: list[Hunk] = []
    for op in Levenshtein.opcodes(old, new):
        if op.tag == "equal":
            continue
        hunk = Hunk(op.src_start, op.src_end, op.dest_start, op.dest_end)
        if found and hunk.old_start - found[-1].old_stop < min_kept:
            found[-1] = Hunk(found[-1][0], hunk.old_stop, found[-1][2], hunk.new_stop)
        else:
            found.append(hunk)
    return found
