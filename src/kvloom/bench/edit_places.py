"""Places: which part of an edited file is a document, and which tokens behind it are scored.

Knows: what an edit replaced, token by token.
Does not know: models or KV.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

SINK_TOKENS = 4
"""kvloom computes an edit within so many first tokens exactly, whatever is asked for."""


class Replaced(Protocol):
    """A range of old tokens, and what comes in its place."""

    @property
    def start(self) -> int:
        """First old token."""
        ...

    @property
    def stop(self) -> int:
        """Old token behind the last."""
        ...

    @property
    def tokens(self) -> tuple[int, ...]:
        """What comes in their place."""
        ...


@dataclass(frozen=True, slots=True)
class Places:
    """Where a document starts and ends in the old and the new file, in tokens.

    Attributes:
        old_start: first token of the old document.
        old_stop: token behind its last; both files go on alike there.
        new_start: first token of the new document.
        new_stop: token behind its last, where scoring starts.
        hunks: changes inside the document.
        first_change: tokens of the new document before the first of them.
        first_stop: tokens of the new document up to its end.
    """

    old_start: int
    old_stop: int
    new_start: int
    new_stop: int
    hunks: int
    first_change: int
    first_stop: int


@dataclass(frozen=True, slots=True)
class PlaceRule:
    """How places are chosen.

    Attributes:
        behind: unchanged tokens between the last change and what is scored.
        scored: tokens that are scored.
        context: tokens of a document at most; earlier ones are cut off.
    """

    behind: int = 20
    scored: int = 24
    context: int = 4000


def choose_places(
    replaced: Sequence[Replaced],
    new_length: int,
    rule: PlaceRule,
    is_stable: Callable[[int, int], bool] = lambda start, stop: True,
) -> Places | str:
    """Return the places of an edit, or why it has none.

    The last change is taken that enough unchanged tokens follow. Places are moved right, into the
    unchanged tokens, until the tokenizer makes the same tokens of the document's text alone.

    Args:
        replaced: the edit, ascending.
        new_length: tokens of the new file.
        rule: how far behind the change, how many, and how long.
        is_stable: whether new tokens start to stop - 1 are those of their own text.
    """
    hunks = _new_ranges(replaced)
    if not hunks:
        return "nothing changes"
    ends = [*(start for start, _, _ in hunks[1:]), new_length]
    for last in range(len(hunks) - 1, -1, -1):
        stop, room = hunks[last][1] + rule.behind, ends[last] - rule.scored
        if stop <= room:
            break
    else:
        return f"no change is followed by {rule.behind + rule.scored} unchanged tokens"
    for new_stop in range(stop, min(stop + rule.behind, room) + 1):
        new_start = _start(hunks[: last + 1], new_stop - rule.context)
        if new_start is None:
            return f"the context of {rule.context} tokens holds nothing before the last change"
        if not is_stable(new_start, new_stop) or not is_stable(new_stop, new_stop + rule.scored):
            continue
        inside = [hunk for hunk in hunks[: last + 1] if hunk[0] >= new_start]
        before = sum(growth for start, _, growth in hunks[: last + 1] if start < new_start)
        growth = sum(growth for _, _, growth in hunks[: last + 1])
        return Places(
            old_start=new_start - before,
            old_stop=new_stop - growth,
            new_start=new_start,
            new_stop=new_stop,
            hunks=len(inside),
            first_change=inside[0][0] - new_start,
            first_stop=inside[0][1] - new_start,
        )
    return "no place behind the last change is a border of tokens"


def _new_ranges(replaced: Sequence[Replaced]) -> list[tuple[int, int, int]]:
    """Return (first new token, new token behind the last, growth) of each change."""
    ranges, shift = [], 0
    for part in replaced:
        start, growth = part.start + shift, len(part.tokens) - (part.stop - part.start)
        ranges.append((start, start + len(part.tokens), growth))
        shift += growth
    return ranges


def _start(hunks: Sequence[tuple[int, int, int]], earliest: int) -> int | None:
    """Return the first token from a place on that no change is at or near; None if none is left."""
    if earliest <= 0:
        return 0
    start = earliest
    for first, stop, _ in hunks:
        behind = max(stop, first + 1)  # a token behind what was only taken out
        if first - SINK_TOKENS < start < behind:
            start = behind
    return start if hunks[-1][0] >= start else None
