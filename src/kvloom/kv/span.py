"""Spans: stretches of a document, and the order in which a document reads.

Knows: slots, shifts, hidden slots, and which slot stands for the token at a position.
Does not know: documents, owners of blocks, or what is exact.

A document's tokens are in the order of their positions. Its plain spans follow one another. Slots
of an overlay stand at positions of their own, and each replaces the slot hidden at its position. A
slot that is hidden without being replaced still stands for its token: it was pruned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise

import numpy as np
import torch

from kvloom.kv.segment import Segment, SlotArrays
from kvloom.ops.partial import MIN_LOGIT
from kvloom.types import SlotRange


@dataclass(frozen=True)  # without slots, for the cached property
class Span:
    """A stretch of a document: a view of a segment.

    Attributes:
        segment: where the KV lies; may be shared with other documents.
        start: first slot shown.
        stop: slot behind the last one shown.
        shift: position now minus the position the keys were rotated at.
        hidden: slots inside the stretch that this document does not show.
    """

    segment: Segment
    start: int
    stop: int
    shift: int = 0
    hidden: tuple[SlotRange, ...] = ()

    @property
    def length(self) -> int:
        """Slots of the stretch, hidden ones included."""
        return self.stop - self.start

    @property
    def tokens(self) -> list[int]:
        """Token ids of the stretch."""
        return self.segment.tokens[self.start : self.stop]

    @property
    def pool_slots(self) -> tuple[int, int]:
        """First slot, and slot behind the last, in the pool."""
        first = self.segment.first_slot
        return first + self.start, first + self.stop

    @property
    def first_pos(self) -> int:
        """Position of the first slot now."""
        return self.segment.rotated_from(self.start) + self.shift

    @property
    def stop_pos(self) -> int:
        """Position behind the last slot's now."""
        return self.segment.rotated_from(self.stop - 1) + self.shift + 1

    @property
    def pos(self) -> np.ndarray:
        """Int64 positions of all slots now."""
        arrays = self.segment.arrays
        if arrays is None or arrays.pos is None:
            return np.arange(self.first_pos, self.first_pos + self.length, dtype=np.int64)
        return arrays.pos[self.start : self.stop].numpy().astype(np.int64) + self.shift

    @property
    def visible(self) -> np.ndarray:
        """Whether each slot is shown, bool."""
        shown = np.ones(self.length, dtype=bool)
        for cut in self.hidden:
            shown[cut.start - self.start : cut.stop - self.start] = False
        return shown

    @cached_property
    def holed(self) -> SlotArrays:
        """The segment's arrays for this stretch, with a hole in the biases at every hidden slot."""
        bias, pos = torch.zeros(self.length), None
        arrays = self.segment.arrays
        if arrays is not None:
            pos = None if arrays.pos is None else arrays.pos[self.start : self.stop]
            if arrays.bias is not None:
                bias = arrays.bias[self.start : self.stop].float().clone()
        bias[torch.from_numpy(~self.visible)] = MIN_LOGIT
        return SlotArrays(pos=pos, bias=bias)

    def sub(self, start: int, stop: int) -> Span:
        """Return slots start to stop - 1 of the stretch."""
        first, last = self.start + start, self.start + stop
        hidden = tuple(
            SlotRange(max(cut.start, first), min(cut.stop, last))
            for cut in self.hidden
            if cut.start < last and cut.stop > first
        )
        return replace(self, start=first, stop=last, hidden=hidden)

    def at(self, pos: int) -> Span:
        """Return the stretch moved so that its first slot stands at a position."""
        shift = self.shift + pos - self.first_pos
        return self if shift == self.shift else replace(self, shift=shift)

    def without(self, pos: np.ndarray) -> Span:
        """Return the stretch with its slots at these positions hidden."""
        hit = np.isin(self.pos, pos)
        if not hit.any():
            return self
        return replace(self, hidden=tuple(_ranges(hit | ~self.visible, self.start)))


def reading_order(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Return stretches in the order of their tokens, none of whose slots is replaced by another.

    What is hidden inside them was pruned.
    """
    overlays = [span for span in spans if span.segment.placed]
    if not overlays:
        return tuple(spans)
    runs, taken = _runs(overlays)
    order: list[Span] = []
    upcoming = 0
    for span in spans:
        if span.segment.placed:
            continue
        for part in _unreplaced(span, taken):
            while upcoming < len(runs) and runs[upcoming][0] <= part.first_pos:
                order.append(runs[upcoming][1])
                upcoming += 1
            order.append(part)
    return (*order, *(run for _, run in runs[upcoming:]))


def assembled(pieces: Iterable[Span]) -> tuple[Span, ...]:
    """Return the fewest spans that show pieces given in reading order: its inverse.

    Pieces of one segment that stand as they were computed are joined, over what an overlay
    replaces too; overlays come last, each behind those whose slots it replaces.
    """
    pieces = [piece for piece in pieces if piece.length]
    taken = {pos for piece in pieces if piece.segment.placed for pos in piece.pos.tolist()}
    plain: list[list[Span]] = []
    over: dict[Segment, list[list[Span]]] = {}
    for piece in pieces:
        groups = over.setdefault(piece.segment, []) if piece.segment.placed else plain
        if groups and _continues(groups[-1][-1], piece, taken):
            groups[-1].append(piece)
        else:
            groups.append([piece])
    overlays = [group for groups in over.values() for group in groups]
    return (*(_joined(group) for group in plain), *_ordered(overlays))


def cut(pieces: Iterable[Span], start: int, stop: int) -> Iterator[Span]:
    """Yield what stands for tokens start to stop - 1 of pieces in reading order."""
    place = 0
    for piece in pieces:
        if place >= stop:
            return
        first, last = max(start - place, 0), min(stop - place, piece.length)
        if first < last:
            yield piece if last - first == piece.length else piece.sub(first, last)
        place += piece.length


def _runs(overlays: Sequence[Span]) -> tuple[list[tuple[int, Span]], np.ndarray]:
    """Return what overlays show, cut where slots or positions do not go on, and all positions.

    The runs are in order, each with its first position. Of several slots at one position the
    visible one counts; if none is, the last.
    """
    pos = np.concatenate([span.pos for span in overlays])
    visible = np.concatenate([span.visible for span in overlays])
    number = np.concatenate([np.full(span.length, n) for n, span in enumerate(overlays)])
    slot = np.concatenate([np.arange(span.length) for span in overlays])
    order = np.lexsort((number, visible, pos))
    last = np.append(pos[order][1:] != pos[order][:-1], True)
    order = order[last]
    pos, number, slot = pos[order], number[order], slot[order]
    breaks = (np.diff(pos) != 1) | (np.diff(number) != 0) | (np.diff(slot) != 1)
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(pos)]
    runs = []
    for first, stop in pairwise(edges):
        start = int(slot[first])
        run = overlays[int(number[first])].sub(start, start + stop - first)
        runs.append((int(pos[first]), run))
    return runs, pos


def _unreplaced(span: Span, taken: np.ndarray) -> Iterator[Span]:
    """Yield the parts of a plain span whose slots are not replaced at these positions."""
    replaced = ~span.visible & np.isin(span.pos, taken) if span.hidden else np.zeros(1, dtype=bool)
    if not replaced.any():
        yield span
        return
    pruned = bool((~span.visible & ~replaced).any())
    for start, stop in _ranges(~replaced, 0):
        if pruned:
            yield span.sub(start, stop)
        else:
            yield replace(span, start=span.start + start, stop=span.start + stop, hidden=())


def _continues(last: Span, piece: Span, taken: set[int]) -> bool:
    """Whether a piece goes on where the last one of its segment ended, or behind an overlay."""
    if (last.segment, last.shift) != (piece.segment, piece.shift) or piece.start < last.stop:
        return False
    if piece.start == last.stop:
        return True
    between = range(last.stop, piece.start)
    return all(last.segment.rotated_from(slot) + last.shift in taken for slot in between)


def _ordered(groups: Sequence[Sequence[Span]]) -> list[Span]:
    """Join the pieces of overlays, so that of several slots at a position the last one counts.

    Where two would replace slots of each other, pieces stay as they are and hold no replaced slot.
    """
    shown_by = {
        pos: n for n, group in enumerate(groups) for piece in group for pos in piece.pos.tolist()
    }
    before: dict[int, set[int]] = {n: set() for n in range(len(groups))}
    for n, group in enumerate(groups):
        for last, piece in pairwise(group):
            for slot in range(last.stop, piece.start):
                before[shown_by[last.segment.rotated_from(slot) + last.shift]].add(n)
    try:
        return [_joined(groups[n]) for n in TopologicalSorter(before).static_order()]
    except CycleError:
        return [piece for group in groups for piece in group]


def _joined(group: Sequence[Span]) -> Span:
    if len(group) == 1:
        return group[0]
    hidden = list(group[0].hidden)
    for last, piece in pairwise(group):
        gap = [SlotRange(last.stop, piece.start)] if last.stop < piece.start else []
        for cut in (*gap, *piece.hidden):
            if hidden and hidden[-1].stop == cut.start:
                hidden[-1] = SlotRange(hidden[-1].start, cut.stop)
            else:
                hidden.append(cut)
    return replace(group[0], stop=group[-1].stop, hidden=tuple(hidden))


def _ranges(wanted: np.ndarray, first: int) -> list[SlotRange]:
    """Return the runs of true entries as ranges; entry 0 stands for slot `first`."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], wanted, [False])))) + first
    return [SlotRange(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
