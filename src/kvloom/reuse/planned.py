"""Planned rows: the repairs of a plan as one selector, so that one repair carries them all out.

Knows: which places of a document each repair is about.
Does not know: why a repair was planned, or how rows are run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvloom.reuse.actions import Action, Repair, Wanted
from kvloom.reuse.planner import places
from kvloom.reuse.select import StaleRows, selector
from kvloom.types import SlotRange


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """Chooses the rows that a plan repairs, and no others.

    Attributes:
        repairs: with the place of the part's first token in the document, and its length.
        name: how it is called.
    """

    repairs: tuple[tuple[int, int, Repair], ...]
    name: str = "planned"

    @property
    def wants_marks(self) -> bool:
        """Whether it asks for rows that an edit names; a plan was made without one."""
        return False

    @property
    def check_layer(self) -> int | None:
        """The last layer at which a repair's selector compares; None if none does."""
        layers = [
            layer
            for _, _, repair in self.repairs
            if repair.rows is None and (layer := selector(repair.selector).check_layer) is not None
        ]
        return max(layers, default=None)

    @property
    def count(self) -> int:
        """Rows that are repaired, where all of them are stale."""
        return sum(self._count(length, repair) for _, length, repair in self.repairs)

    def choose(self, rows: StaleRows, count: int) -> np.ndarray:
        """Return the places that the plan repairs; how many is the plan's to say."""
        chosen = [np.empty(0, dtype=np.int64)]
        for start, length, repair in self.repairs:
            inside = rows.within(SlotRange(start, start + length))
            if repair.rows is not None:
                planned = np.array(repair.rows, dtype=np.int64) + start
                chosen.append(planned[np.isin(planned, inside.place)])
            else:
                wanted = min(self._count(length, repair), len(inside.place))
                chosen.append(selector(repair.selector).choose(inside, wanted))
        return np.sort(np.concatenate(chosen))

    def _count(self, length: int, repair: Repair) -> int:
        return math.ceil(repair.share * length) if repair.rows is None else len(repair.rows)


def planned_rows(want: Wanted, actions: Sequence[Action]) -> PlannedRows:
    """Return the selector of a plan's repairs."""
    where = {place.number: place for place in places(want)}
    return PlannedRows(
        tuple(
            (where[one.part].start, len(where[one.part].part.tokens), one)
            for one in actions
            if isinstance(one, Repair)
        )
    )
