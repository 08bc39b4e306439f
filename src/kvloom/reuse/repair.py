"""Repair: a share of a document's stale rows is computed again, chunk by chunk.

Knows: documents, a runner, and the two passes: compare values at one layer, then run what was
chosen.
Does not know: requests, or why a document is stale. Who drives it decides when the next chunk runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvloom.kv.doc import KVDoc
from kvloom.reuse.select import Selector, StaleRows
from kvloom.types import Forward, Rows, SlotRange, Taint


@dataclass(frozen=True, slots=True)
class RepairReceipt:
    """What a repair did.

    Attributes:
        stale: rows that were not exact before.
        repaired: of these, rows that were computed again.
        deviation: mean over the stale rows of the change of their values at the check layer, as a
            share of the values' own square; None where nobody compared.
        left: the part of that deviation that rows which were not repaired still have.
    """

    stale: int
    repaired: int
    deviation: float | None
    left: float | None


class Repair:
    """A repair of one document under way.

    Args:
        doc: repaired in place; whoever may need its old state holds a fork.
        share: of the stale rows, 0 to 1.
        rule: chooses them.
        step_rows: rows of one forward pass at most.
        marked: bool per token of the document, for rules that ask for marks.
        within: repair between these places of the document only; its share is of stale rows there.
    """

    def __init__(
        self,
        doc: KVDoc,
        share: float,
        rule: Selector,
        step_rows: int,
        marked: np.ndarray | None = None,
        within: SlotRange | None = None,
    ) -> None:
        self.doc = doc
        self._tokens = np.array(doc.tokens, dtype=np.int64)
        self._rows = stale_rows(doc) if within is None else stale_rows(doc).within(within)
        self._marked = marked
        self._rule = rule
        self._step_rows = step_rows
        self._count = min(math.ceil(share * len(self._rows.place)), len(self._rows.place))
        self._check_layer: int | None = None
        if rule.check_layer is not None and 0 < self._count < len(self._rows.place):
            # A model of one layer has no other; there no edit changes a value, and none deviates.
            self._check_layer = min(rule.check_layer, len(doc.pool.values) - 1)
        compares = self._check_layer is not None
        self._to_compare = self._rows.place if compares else self._rows.place[:0]
        self._changes: list[np.ndarray] = []
        self._norms: list[np.ndarray] = []
        self._chosen: np.ndarray | None = None
        self._done = 0

    @property
    def finished(self) -> bool:
        """Whether everything chosen is computed."""
        return self._chosen is not None and self._done == len(self._chosen)

    @property
    def next_rows(self) -> int:
        """Rows that the next pass runs, so that room can be made for them."""
        left = len(self._to_compare) - self._compared or self._count - self._done
        return min(left, self._step_rows)

    def advance(self, runner: Forward) -> None:
        """Run one forward pass.

        Raises:
            CapacityError: the pool is too small for the rows.
        """
        if self._compared < len(self._to_compare):
            self._compare(runner)
        if self._chosen is None and self._compared == len(self._to_compare):
            self._choose()
            return
        if self._chosen is not None:
            places = self._chosen[self._done : self._done + self._step_rows]
            if len(places):
                runner.forward([self._rows_at(places, keep=True)])
                self._done += len(places)

    def receipt(self) -> RepairReceipt:
        """Return what was done."""
        assert self._chosen is not None, "asked for the receipt of a repair that goes on"
        deviation = left = None
        if self._changes:
            change = np.concatenate(self._changes)
            norm = max(float(np.concatenate(self._norms).sum()), 1e-30)
            kept = ~np.isin(self._rows.place, self._chosen)
            deviation, left = float(change.sum()) / norm, float(change[kept].sum()) / norm
        return RepairReceipt(len(self._rows.place), len(self._chosen), deviation, left)

    @property
    def _compared(self) -> int:
        return sum(map(len, self._changes))

    def _compare(self, runner: Forward) -> None:
        """Measure how far the values of the next rows are from what they would be now.

        Values at layer 1 depend on keys and values of layer 0 only, which no edit changes: the
        chunks need not see each other's.
        """
        layer = self._check_layer
        assert layer is not None
        places = self._to_compare[self._compared :][: self._step_rows]
        seen = _Values(layer)
        runner.forward([self._rows_at(places, keep=False)], observe=seen, stop_after=layer)
        assert seen.values is not None, "the runner did not show the check layer"
        fresh = seen.values.float()
        cached = values_at(self.doc, layer, places).float()
        self._changes.append((fresh - cached).square().sum(dim=(0, 2)).cpu().numpy())
        self._norms.append(fresh.square().sum(dim=(0, 2)).cpu().numpy())

    def _choose(self) -> None:
        if self._count == len(self._rows.place):
            self._chosen = self._rows.place
        elif self._count == 0:
            self._chosen = self._rows.place[:0]
        else:
            deviation = np.concatenate(self._changes) if self._changes else None
            marked = None if self._marked is None else self._marked[self._rows.place]
            rows = StaleRows(self._rows.place, self._rows.part, deviation, marked)
            self._chosen = self._rule.choose(rows, self._count)

    def _rows_at(self, places: np.ndarray, *, keep: bool) -> Rows:
        pos = places + self.doc.start_pos
        return Rows(self.doc, self._tokens[places], pos, "none", "overlay" if keep else "none")


class _Values:
    """Keeps the values of one layer."""

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self.values: Tensor | None = None

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep v (g, s, d) of the layer that is asked for."""
        if layer == self._layer:
            self.values = v.clone()


def stale_rows(doc: KVDoc) -> StaleRows:
    """Return a document's rows that are not exact.

    Repaired ones are among them: what stands before them may have changed since.
    """
    places: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    place = 0
    for number, (span, taint) in enumerate(doc.taints()):
        if taint is not Taint.EXACT:
            places.append(np.arange(place, place + span.length, dtype=np.int64))
            parts.append(np.full(span.length, number, dtype=np.int32))
        place += span.length
    if not places:
        return StaleRows(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32))
    return StaleRows(np.concatenate(places), np.concatenate(parts))


def values_at(doc: KVDoc, layer: int, places: np.ndarray) -> Tensor:
    """Return the cached values (g, s, d) of a layer at ascending places of a document."""
    found: list[Tensor] = []
    place = 0
    for span in doc.order:
        low, high = np.searchsorted(places, (place, place + span.length))
        if low < high:
            slots = places[low:high] - place + span.pool_slots[0]
            first, stop = int(slots[0]), int(slots[-1]) + 1
            _, v = doc.pool.read(layer, first, stop)
            found.append(v[:, torch.from_numpy(slots - first)])
        place += span.length
    return torch.cat(found, dim=1)
