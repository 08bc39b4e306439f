"""Baselines: moved KV as systems show it that know no better, for comparisons only.

Knows: spans, and how one is made to look as if its keys stood where they were rotated.
Does not know: edits, or who compares what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from kvloom.kv.segment import Segment, SlotArrays
from kvloom.kv.span import Span
from kvloom.registry import named
from kvloom.types import SlotRange

Baseline = Callable[[Span], Span]
"""Shows a stretch in another way than kvloom would."""


def unrotated(span: Span) -> Span:
    """Return a stretch whose keys keep the rotation of their old positions, although it moved.

    No query is turned for it: the slots are shown by a segment that claims to have been computed
    where they stand now. Its lineage says what was done, so it is exact nowhere.

    Source: PIE (He et al. 2025), section 4: "conflict fast encoding".
    """
    if span.shift == 0:
        return span
    segment, start = span.segment, span.start
    origin = segment.lineage_at(start).alter(
        f"unrotated shift={span.shift}", segment.lineage_at(span.stop)
    )
    first = segment.first_slot + start
    claimed = Segment(segment.pool, first, span.length, base=span.first_pos, origin=origin)
    claimed.append(span.tokens)
    claimed.arrays = _moved(segment.arrays, start, span.stop, span.shift)
    claimed.closed = True  # the slots belong to whoever shows them, as those of any closed segment
    hidden = tuple(SlotRange(cut.start - start, cut.stop - start) for cut in span.hidden)
    return replace(span, segment=claimed, start=0, stop=span.length, shift=0, hidden=hidden)


BASELINES: Mapping[str, Baseline] = MappingProxyType({"unrotated": unrotated})
"""The baselines by name."""


def baseline(name: str) -> Baseline:
    """Return a baseline by its name.

    Raises:
        RequestError: there is none of that name.
    """
    return named(BASELINES, name, "baseline")


def _moved(arrays: SlotArrays | None, start: int, stop: int, shift: int) -> SlotArrays | None:
    if arrays is None:
        return None
    part = arrays.part(start, stop)
    return part if part.pos is None else replace(part, pos=part.pos + shift)
