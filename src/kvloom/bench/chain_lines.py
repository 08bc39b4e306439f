"""Edits as a developer types them: one line at a time, anywhere in a text.

Knows: lines.
Does not know: tokens, models, or what is measured on an edit.

Everything follows from the texts and the seed: two runs make the same edits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvloom import RequestError

_FIRST_LINE = 3
"""What all other tokens attend to most stands before it: an edit there is computed exactly."""
_KINDS = ("replace", "replace", "replace", "insert", "delete")


@dataclass(frozen=True, slots=True)
class LineEdit:
    """A change of one line.

    Attributes:
        start: line and column where it begins, from zero.
        end: line and column where it ends.
        text: what comes in between.
    """

    start: tuple[int, int]
    end: tuple[int, int]
    text: str


def typed_edits(text: str, other: Sequence[str], count: int, seed: int) -> Iterator[LineEdit]:
    """Yield edits, each of the text that those before it left; the number of lines stays about.

    Args:
        text: of more lines than stay untouched at its start.
        other: lines that are typed, without their ends.
        count: edits in all.
        seed: of the choices.

    Raises:
        RequestError: the text has too few lines.
    """
    chosen = random.Random(seed)
    lines = text.split("\n")
    wanted = len(lines)
    if wanted <= _FIRST_LINE + 1:
        raise RequestError(
            f"The document has too few lines to edit ({wanted}, of at least {_FIRST_LINE + 2}); "
            "give it a longer context.",
            param="context",
        )
    for _ in range(count):
        kind = chosen.choice(_KINDS)
        if kind != "replace":  # a text that has grown shrinks, and the other way round
            kind = "delete" if len(lines) > wanted else "insert"
        place = chosen.randrange(_FIRST_LINE, len(lines) - 1)
        typed = chosen.choice(other)
        if kind == "insert":
            lines.insert(place, typed)
            yield LineEdit((place, 0), (place, 0), typed + "\n")
        elif kind == "delete":
            del lines[place]
            yield LineEdit((place, 0), (place + 1, 0), "")
        else:
            lines[place] = typed
            yield LineEdit((place, 0), (place + 1, 0), typed + "\n")
