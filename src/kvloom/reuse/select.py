"""Selectors: which of a document's stale rows are worth computing again.

Knows: rows that were computed behind something else than what stands before them now.
Does not know: models, or how rows are run; a selector sees numbers and names rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import numpy as np

from kvloom.registry import named
from kvloom.types import SlotRange


@dataclass(frozen=True, slots=True)
class StaleRows:
    """Rows of one document that are not exact.

    Attributes:
        place: int64 place of each row's token in the document, ascending.
        part: int32 number of the stretch each row belongs to: rows of one stretch were computed
            together.
        deviation: fp32 change of each row's values at the check layer; None if nobody compared.
        marked: bool, rows that name what the edit changed; None unless the rule asks for marks.
    """

    place: np.ndarray
    part: np.ndarray
    deviation: np.ndarray | None = None
    marked: np.ndarray | None = None

    def within(self, places: SlotRange) -> StaleRows:
        """Return the rows between two places of the document."""
        low, high = np.searchsorted(self.place, places)
        return StaleRows(
            self.place[low:high],
            self.part[low:high],
            None if self.deviation is None else self.deviation[low:high],
            None if self.marked is None else self.marked[low:high],
        )


class Selector(Protocol):
    """Chooses rows; pure."""

    @property
    def name(self) -> str:
        """How it is asked for."""
        ...

    @property
    def check_layer(self) -> int | None:
        """The layer at which values are compared before it chooses; None needs no comparison."""
        ...

    @property
    def wants_marks(self) -> bool:
        """Whether it asks which rows name what the edit changed."""
        ...

    def choose(self, rows: StaleRows, count: int) -> np.ndarray:
        """Return the places of `count` rows, ascending, int64."""
        ...


@dataclass(frozen=True, slots=True)
class HighestDeviation:
    """The rows whose values change most at one layer.

    Source: CacheBlend (Yao et al. 2025), section 4.3, insight 1; the deviation is that of the
    authors' code: the sum over heads and dimensions of the squared difference of the values.
    Deviation: one set of rows for all layers behind the check layer, as in that code, and no
    gradual schedule; selected rows see the keys before their position and no others (the code's
    mask lets them see later ones).
    """

    name: str = "blend"
    check_layer: int | None = 1
    wants_marks: bool = False

    def choose(self, rows: StaleRows, count: int) -> np.ndarray:
        """Return the places of the rows that deviate most."""
        assert rows.deviation is not None, "chose by a deviation that nobody measured"
        most = np.argsort(-rows.deviation, kind="stable")[:count]
        return np.sort(rows.place[most])


@dataclass(frozen=True, slots=True)
class Mentions:
    """The rows that name what the edit changed, and those whose values change most.

    A renamed identifier lives on in the rows that named it; their values need not change much at
    an early layer, so that no deviation finds them. An edit may change words that stand
    everywhere, so that mentions get half of the rows at most.
    """

    name: str = "mentions"
    check_layer: int | None = 1
    wants_marks: bool = True

    def choose(self, rows: StaleRows, count: int) -> np.ndarray:
        """Return the places of marked rows and of those that deviate most."""
        assert rows.deviation is not None, "chose by a deviation that nobody measured"
        assert rows.marked is not None, "chose by marks that nobody made"
        by_deviation = np.argsort(-rows.deviation, kind="stable")
        named = by_deviation[rows.marked[by_deviation]][: count // 2]
        rest = by_deviation[~np.isin(by_deviation, named)][: count - len(named)]
        return np.sort(rows.place[np.concatenate([named, rest])])


@dataclass(frozen=True, slots=True)
class FirstRows:
    """The first rows of every part, whose own attention sink stands in the middle now.

    Source: EPIC (Hu et al. 2024), LegoLink: the first tokens of each chunk only.
    """

    name: str = "first"
    check_layer: int | None = None
    wants_marks: bool = False

    def choose(self, rows: StaleRows, count: int) -> np.ndarray:
        """Return the places of as many first rows of each part as come to the count."""
        starts = np.flatnonzero(np.diff(rows.part, prepend=rows.part[:1] - 1))
        within = np.arange(len(rows.part)) - np.repeat(starts, np.diff([*starts, len(rows.part)]))
        foremost = np.argsort(within, kind="stable")[:count]
        return np.sort(rows.place[foremost])


@dataclass(frozen=True, slots=True)
class RandomRows:
    """Rows by chance, the same for the same rows: a baseline."""

    name: str = "random"
    check_layer: int | None = None
    wants_marks: bool = False
    seed: int = 0

    def choose(self, rows: StaleRows, count: int) -> np.ndarray:
        """Return the places of rows drawn without replacement."""
        generator = np.random.default_rng(self.seed)
        return np.sort(generator.choice(rows.place, count, replace=False))


SELECTORS: Mapping[str, Selector] = MappingProxyType(
    {rule.name: rule for rule in (HighestDeviation(), Mentions(), FirstRows(), RandomRows())}
)
"""The selectors by name."""


def selector(name: str) -> Selector:
    """Return a selector by its name.

    Raises:
        RequestError: there is none of that name.
    """
    return named(SELECTORS, name, "selector")
