"""Views: which stretches of the pool a step's rows read, and how the readers' stretches overlap.

Knows: slots, positions, windows and shifts, as integers.
Does not know: tensors, layers or attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from kvloom.kv.doc import KVDoc
from kvloom.kv.segment import SlotArrays
from kvloom.kv.span import Span

Visibility = Literal["all", "causal", "mask"]
MIN_SHARED_SLOTS = 32
"""Shorter overlaps are read once per owner: a further piece costs more than it saves."""

MANY_CUTS = 4
"""A span with fewer cuts is read in pieces, however short it is."""
SLOTS_PER_CUT = 64
"""With fewer slots per cut, a span is read whole and its hidden slots get a bias."""


@dataclass(frozen=True, slots=True)
class View:
    """A stretch of pool slots as one document shows it, at neighbouring positions.

    Attributes:
        start: first slot in the pool.
        stop: slot behind the last.
        first_pos: position of the first slot now.
        shift: position now minus the position the keys were rotated at.
        arrays: arrays per slot, with the slot of the pool they start at; None for plain slots.
        shifts: int32 shifts per slot of `arrays`, where they differ; the positions there are those
            of now, and `shift` is 0.
    """

    start: int
    stop: int
    first_pos: int
    shift: int
    arrays: tuple[SlotArrays, int] | None = None
    shifts: np.ndarray | None = None

    @property
    def stop_pos(self) -> int:
        """Position behind the last slot's."""
        return self.first_pos + self.stop - self.start

    @property
    def slot_shifts(self) -> np.ndarray | None:
        """The shift of every slot of the view, where they differ."""
        if self.shifts is None or self.arrays is None:
            return None
        return self.shifts[self.start - self.arrays[1] : self.stop - self.arrays[1]]

    @property
    def slot_pos(self) -> np.ndarray:
        """The position of every slot now."""
        if self.arrays is None or self.arrays[0].pos is None:
            return np.arange(self.first_pos, self.stop_pos)
        first = self.arrays[1]
        return self.arrays[0].pos[self.start - first : self.stop - first].numpy() + self.shift

    @property
    def slot_bias(self) -> np.ndarray | float:
        """What is added to the logit of every slot."""
        if self.arrays is None or self.arrays[0].bias is None:
            return 0.0
        first = self.arrays[1]
        return self.arrays[0].bias[self.start - first : self.stop - first].numpy()

    def between(self, first_pos: int, stop_pos: int) -> View | None:
        """Return the part at these positions; None if there is none."""
        low, high = max(first_pos, self.first_pos), min(stop_pos, self.stop_pos)
        if low >= high:
            return None
        if low == self.first_pos and high == self.stop_pos:
            return self
        start = self.start + low - self.first_pos
        return replace(self, start=start, stop=start + high - low, first_pos=low)


@dataclass(frozen=True, slots=True)
class Reading:
    """A view together with the rows that read it.

    Attributes:
        view: what is read.
        rows: half-open ranges of packed rows, ascending and disjoint.
        visibility: `all` slots for every row, `causal` for a square of new rows, or by `mask`.
    """

    view: View
    rows: tuple[tuple[int, int], ...]
    visibility: Visibility


@dataclass(frozen=True, slots=True)
class RowRange:
    """The rows of one document in a packed step.

    Attributes:
        start: first packed row.
        stop: row behind the last.
        low: lowest position.
        high: highest position.
        ascending: whether positions rise by one from row to row.
    """

    start: int
    stop: int
    low: int
    high: int
    ascending: bool


def row_ranges(pos: Sequence[np.ndarray]) -> list[RowRange]:
    """Return where each document's rows stand in the packed step, and at which positions."""
    ranges, start = [], 0
    for rows in pos:
        count = len(rows)
        if count == 1:
            low = high = int(rows[0])
            ascending = True
        else:
            ascending = bool((np.diff(rows) == 1).all())
            low, high = (rows[0], rows[-1]) if ascending else (rows.min(), rows.max())
        ranges.append(RowRange(start, start + count, int(low), int(high), ascending))
        start += count
    return ranges


def views_of(doc: KVDoc) -> list[View]:
    """Return what a document shows, with neighbouring slots at neighbouring positions joined.

    A stretch with many hidden slots is one view with a hole at each: a piece per cut costs an
    executor more than reading the hidden slots.
    """
    views: list[View] = []
    for span in doc.spans:
        if len(span.hidden) >= MANY_CUTS and len(span.hidden) * SLOTS_PER_CUT > span.length:
            start, stop = span.pool_slots
            views.append(View(start, stop, span.first_pos, span.shift, (span.holed, start)))
        else:
            _add_stretches(views, span)
    return views


def _add_stretches(views: list[View], span: Span) -> None:
    """Add a view per stretch between hidden slots."""
    segment = span.segment
    arrays = None if segment.arrays is None else (segment.arrays, segment.first_slot)
    edge = span.start
    for cut in (*span.hidden, None):
        stop = span.stop if cut is None else cut.start
        if edge < stop:
            first = segment.first_slot + edge
            first_pos = segment.base + edge + span.shift
            join(views, View(first, first + stop - edge, first_pos, span.shift, arrays))
        edge = stop if cut is None else cut.stop


def join(views: list[View], view: View) -> None:
    """Add a view, as a part of the last one where it goes on in slots and positions."""
    if views:
        last = views[-1]
        if (last.stop, last.stop_pos, last.shift) == (view.start, view.first_pos, view.shift) and (
            last.arrays is None and view.arrays is None
        ):
            views[-1] = replace(last, stop=view.stop)
            return
    views.append(view)


def read(view: View, rows: RowRange, window: int | None) -> Iterator[Reading]:
    """Yield the readings by which a document's rows see one view; nothing for an unseen one."""
    span = ((rows.start, rows.stop),)
    if view.arrays is not None:
        yield Reading(view, span, "mask")
        return
    oldest = view.first_pos if window is None else rows.low - window + 1
    seen = view.between(oldest, rows.high + 1)
    if seen is None:
        return
    if rows.ascending and rows.start + 1 < rows.stop:
        # The newest row of a window sees least: what even it sees, all rows see.
        seen_by_all = view.first_pos if window is None else rows.high - window + 1
        past, fresh = seen.between(seen_by_all, rows.low), seen.between(rows.low, rows.high + 1)
        edge = seen.between(oldest, min(seen_by_all, rows.low))
        if edge is not None:
            yield Reading(edge, span, "mask")
        if past is not None:
            yield Reading(past, span, "all")
        if fresh is not None:
            square = fresh.stop - fresh.start == rows.stop - rows.start
            whole = window is None or window > rows.high - rows.low
            yield Reading(fresh, span, "causal" if square and whole else "mask")
        return
    all_seen = seen.stop_pos <= rows.low + 1 and (
        window is None or seen.first_pos > rows.high - window
    )
    yield Reading(seen, span, "all" if all_seen else "mask")


def share(readings: Iterable[Reading]) -> list[Reading]:
    """Let readings of the same slots at the same shift become one, so that each is read once.

    Source: BatchLLM (Zheng et al. 2024), section 5: prefix attention once for all its requests;
    here for any overlap of slots, at any position of the documents.
    """
    singles: list[Reading] = []
    by_shift: dict[int, list[Reading]] = {}
    for reading in readings:
        if reading.visibility == "all" and reading.view.arrays is None:
            by_shift.setdefault(reading.view.shift, []).append(reading)
        else:
            singles.append(reading)
    shared: list[Reading] = []
    for group in by_shift.values():
        group.sort(key=lambda reading: (reading.view.start, reading.view.stop))
        for cluster in _overlapping(group):
            shared += cluster if len(cluster) == 1 else _share_cluster(cluster)
    return shared + singles


def _overlapping(readings: Sequence[Reading]) -> Iterator[list[Reading]]:
    cluster: list[Reading] = []
    end = -1
    for reading in readings:
        if cluster and reading.view.start >= end:
            yield cluster
            cluster = []
        cluster.append(reading)
        end = max(end, reading.view.stop)
    if cluster:
        yield cluster


def _share_cluster(cluster: list[Reading]) -> list[Reading]:
    """Cut overlapping readings where owners join or leave; keep short overlaps apart."""
    cuts = sorted({edge for r in cluster for edge in (r.view.start, r.view.stop)})
    pieces: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for reading in cluster:
        view, rows = reading.view, reading.rows[0]
        pending = view.start
        for low, high in pairwise(cuts):
            if low < view.start or high > view.stop:
                continue
            owners = sum(r.view.start <= low and high <= r.view.stop for r in cluster)
            if owners > 1 and high - low >= MIN_SHARED_SLOTS:
                if pending < low:
                    pieces.setdefault((pending, low, rows[0]), []).append(rows)
                pieces.setdefault((low, high, -1), []).append(rows)
                pending = high
        if pending < view.stop:
            pieces.setdefault((pending, view.stop, rows[0]), []).append(rows)
    origin = cluster[0].view
    return [
        Reading(
            replace(
                origin, start=start, stop=stop, first_pos=origin.first_pos + start - origin.start
            ),
            _join_ranges(rows),
            "all",
        )
        for (start, stop, _), rows in pieces.items()
    ]


def _join_ranges(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)
