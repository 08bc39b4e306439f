"""Planners: load, shift, repair or recompute, for every part of a prompt.

Knows: what each method repairs of a chunk that stands behind other text than it was computed
behind, and what every choice would cost.
Does not know: how actions are carried out.

All planners agree on three things: KV of the expected lineage is taken as it is; what takes longer
than computing the part loses to computing it; `exact` takes nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Protocol

from kvloom.cost import MEMORY, CostModel
from kvloom.kv.lineage import Lineage
from kvloom.outputs import Fidelity
from kvloom.registry import named
from kvloom.reuse.actions import (
    Action,
    Held,
    Inventory,
    Load,
    Part,
    Planner,
    Recompute,
    Repair,
    Shift,
    Wanted,
)
from kvloom.reuse.craft import ALPHA, FLOOR, Context, fix_overhead, rows_to_fix
from kvloom.reuse.select import SELECTORS

LEAST_SHARE = 0.15
"""Source: CacheBlend (Yao et al. 2025), figure 16: the least share without a loss of quality."""
FIRST_ROWS = 4
"""Source: EPIC (Hu et al. 2024), LegoLink; four rows are an attention sink (Xiao et al. 2024)."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part of a prompt stands.

    Attributes:
        number: of the part.
        part: the part.
        start: tokens before it.
        expected: lineage that a fresh prefill would have before it.
        now: chunks before it.
    """

    number: int
    part: Part
    start: int
    expected: Lineage
    now: Context

    @property
    def stop(self) -> int:
        """Tokens before the next part."""
        return self.start + len(self.part.tokens)


@dataclass(frozen=True, slots=True)
class Fix:
    """What a method would repair of a chunk.

    Attributes:
        share: of the chunk's rows; 0 repairs nothing, 1 computes the chunk.
        selector: chooses them.
        rows: or these places in the chunk.
    """

    share: float
    selector: str = "blend"
    rows: tuple[int, ...] | None = None


class Method(Protocol):
    """Says what to repair; pure."""

    def fix(self, place: Place, held: Held) -> Fix:
        """Return what to repair of a variant that is shown at a place and is not exact there."""
        ...


@dataclass(frozen=True, slots=True)
class Blend:
    """Repair the rows whose values change most at the check layer.

    Source: CacheBlend, section 4.3. Deviations: the share is of every chunk, not of the prompt, so
    that what is repaired of a chunk does not depend on the chunks behind it; and it is never raised
    to what loading hides (section 5), since a chunk is loaded whole before its rows run.
    """

    share: float = LEAST_SHARE

    def fix(self, place: Place, held: Held) -> Fix:
        """Return the share."""
        return Fix(self.share, "blend")


@dataclass(frozen=True, slots=True)
class Craft:
    """Repair the rows that attended most to other chunks, as many as no longer stand before them.

    Source: Cache-Craft (Agarwal et al. 2025). Where a chunk has no statistics, or was computed
    alone, old attention says nothing of which rows: they are chosen as `blend` chooses them.
    """

    alpha: float = ALPHA
    floor: float = FLOOR

    def fix(self, place: Place, held: Held) -> Fix:
        """Return the fix overhead and the rows."""
        statistics = held.statistics
        if statistics is None:
            return Fix(min(self.alpha * self.floor, 1.0), "blend")
        overhead = fix_overhead(statistics, place.now, alpha=self.alpha, floor=self.floor)
        if not statistics.behind.names:
            return Fix(overhead, "blend")
        return Fix(overhead, "craft", rows_to_fix(statistics, overhead))


@dataclass(frozen=True, slots=True)
class First:
    """Repair the first rows of every chunk, whose own attention sink stands in the middle now.

    Attributes:
        share: of the chunk's rows; None for a sink's.
    """

    share: float | None = None

    def fix(self, place: Place, held: Held) -> Fix:
        """Return the first rows."""
        length = len(place.part.tokens)
        rows = FIRST_ROWS if self.share is None else math.ceil(self.share * length)
        count = min(rows, length)
        return Fix(count / length, "first", tuple(range(count)))


@dataclass(frozen=True, slots=True)
class ByChance:
    """Repair rows by chance: a baseline."""

    share: float = LEAST_SHARE

    def fix(self, place: Place, held: Held) -> Fix:
        """Return the share."""
        return Fix(self.share, "random")


@dataclass(frozen=True, slots=True)
class Joining:
    """Repair nothing: a baseline.

    Source: Prompt Cache (Gim et al. 2024).
    """

    def fix(self, place: Place, held: Held) -> Fix:
        """Return nothing to repair."""
        return Fix(0.0)


@dataclass(frozen=True, slots=True)
class Everything:
    """Repair all rows, which is to compute a chunk behind what stands before it."""

    def fix(self, place: Place, held: Held) -> Fix:
        """Return everything."""
        return Fix(1.0)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What can be done with a part, in order of preference, and the seconds it takes."""

    inexact: bool
    share: float
    seconds: float
    actions: tuple[Action, ...]

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Exact ones first, then the least to repair (Cache-Craft), then the fastest."""
        return self.inexact, self.share, self.seconds


@dataclass(frozen=True, slots=True)
class PartPlanner:
    """Plans part by part, with one method for what is not exact."""

    name: str
    method: Method
    learns: bool = False

    def plan(
        self, want: Wanted, have: Inventory, cost: CostModel, fidelity: Fidelity
    ) -> list[Action]:
        """Return what is done, part by part in order."""
        actions: list[Action] = []
        for place in places(want):
            variants = have.get(place.part.chunk, ()) if place.part.chunk is not None else ()
            choices = [
                choice
                for held in variants
                if (choice := self._choice(want, place, held, cost, fidelity)) is not None
            ]
            best = min(choices, key=lambda choice: choice.rank, default=None)
            actions += (Recompute(place.number),) if best is None else best.actions
        return actions

    def _choice(
        self, want: Wanted, place: Place, held: Held, cost: CostModel, fidelity: Fidelity
    ) -> _Choice | None:
        """Return what a variant allows; None if computing the part is as good."""
        number, length = place.number, len(place.part.tokens)
        distance = want.start_pos + place.start - held.base
        exact = held.origin == place.expected and distance == 0
        if length == 0 or (not exact and fidelity == "exact") or (distance and not want.movable):
            return None
        fix = Fix(0.0)
        if not exact and fidelity == "repaired":
            fix = self.method.fix(place, held)
        count = math.ceil(fix.share * length) if fix.rows is None else len(fix.rows)
        check_layer = SELECTORS[fix.selector].check_layer if fix.rows is None else None
        seconds = cost.load_s(length, held.tier)
        seconds += cost.repair_s(count, length, place.start, check_layer)
        if count == length or seconds >= cost.prefill_s(length, place.start):
            return None
        actions: list[Action] = []
        if held.tier != MEMORY:
            actions.append(Load(number, held.id, held.tier))
        actions.append(Shift(number, held.id, distance))
        if count:
            actions.append(Repair(number, fix.share, fix.selector, fix.rows))
        return _Choice(not exact, fix.share, seconds, tuple(actions))


PLANNERS: Mapping[str, PartPlanner] = MappingProxyType(
    {
        one.name: one
        for one in (
            PartPlanner("blend", Blend()),
            PartPlanner("craft", Craft(), learns=True),
            PartPlanner("first", First()),
            PartPlanner("random", ByChance()),
            PartPlanner("none", Joining()),
        )
    }
)
"""The planners by name."""


def planner(name: str, share: float | None = None) -> Planner:
    """Return a planner by its name.

    Args:
        name: of `PLANNERS`.
        share: of the rows of a chunk, 0 to 1; None for the method's own. `craft` repairs so many
            of a chunk that attended to nothing before it, and others in proportion.

    Raises:
        RequestError: there is none of that name.
    """
    found = named(PLANNERS, name, "planner")
    if share is None or name == "none":
        return found
    if share >= 1.0:
        return replace(found, method=Everything())
    methods: Mapping[str, Method] = {
        "blend": Blend(share),
        "craft": Craft(alpha=share / FLOOR),
        "first": First(share),
        "random": ByChance(share),
    }
    return replace(found, method=methods[name])


def places(want: Wanted) -> Iterator[Place]:
    """Yield where the parts of a prompt stand."""
    expected, start = want.root, 0
    for number, part in enumerate(want.parts):
        yield Place(number, part, start, expected, want.context(number))
        expected = expected.extend(part.tokens)
        start += len(part.tokens)
