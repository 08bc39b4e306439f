"""What a planner is asked and what it answers, as plain data.

Knows: parts of a prompt, who holds KV of a chunk, and the four things that can be done with a part.
Does not know: how one is chosen, or carried out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvloom.cost import MEMORY, CostModel
from kvloom.kv.lineage import Lineage
from kvloom.outputs import Fidelity
from kvloom.reuse.craft import ChunkStatistics, Context


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a prompt.

    Attributes:
        tokens: its token ids.
        chunk: what tells its text from others, the same for the same tokens; None for text that is
            computed wherever it stands, such as a question.
    """

    tokens: tuple[int, ...]
    chunk: str | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A prompt of parts.

    Attributes:
        root: lineage of the empty document.
        parts: in order.
        start_pos: position of the first token.
        movable: whether the model can show KV at other positions than it was computed at.
    """

    root: Lineage
    parts: tuple[Part, ...]
    start_pos: int = 0
    movable: bool = True

    def context(self, number: int) -> Context:
        """Return the chunks before a part; other text is no part of the context."""
        chunks = [part for part in self.parts[:number] if part.chunk is not None]
        names = tuple(str(part.chunk) for part in chunks)
        return Context(names, tuple(len(part.tokens) for part in chunks))


@dataclass(frozen=True, slots=True)
class Held:
    """KV of a chunk's tokens that somebody holds: one of its variants.

    Attributes:
        id: how its holder finds it.
        origin: lineage of what its first row attended to; None where its KV was altered since.
        base: position that its first key was rotated at.
        tier: where it lies; `memory` is the pool.
        statistics: what it attended to; None where nobody took note.
    """

    id: str
    origin: Lineage | None
    base: int
    tier: str = MEMORY
    statistics: ChunkStatistics | None = None


Inventory = Mapping[str, Sequence[Held]]
"""The variants of every chunk, by its name."""


@dataclass(frozen=True, slots=True)
class Load:
    """Bring a variant of a part's chunk from a tier into the pool."""

    part: int
    held: str
    tier: str


@dataclass(frozen=True, slots=True)
class Shift:
    """Show a variant in place of a part, so many positions from where its keys were rotated."""

    part: int
    held: str
    distance: int


@dataclass(frozen=True, slots=True)
class Repair:
    """Compute some rows of a part that is shown again, once all parts stand where they belong.

    Attributes:
        part: number of the part.
        share: of its rows.
        selector: chooses them (`kvloom.reuse.select`), where `rows` does not say which.
        rows: places in the part, ascending; None leaves the choice to the selector.
    """

    part: int
    share: float
    selector: str
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Recompute:
    """Compute a part behind whatever stands before it."""

    part: int


Action = Load | Shift | Repair | Recompute


class Planner(Protocol):
    """Says how the KV of a prompt comes about; pure."""

    @property
    def name(self) -> str:
        """How it is asked for."""
        ...

    @property
    def learns(self) -> bool:
        """Whether it wants to know what a chunk that is computed attends to."""
        ...

    def plan(
        self, want: Wanted, have: Inventory, cost: CostModel, fidelity: Fidelity
    ) -> list[Action]:
        """Return what is done, part by part in order.

        A part is recomputed, or loaded if it must be, then shifted, then repaired if it should be.
        `exact` takes only KV of the expected lineage; `shifted` repairs nothing.
        """
        ...
