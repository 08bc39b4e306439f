"""Edit plans: what an edit comes to, as plain data in the order of the new document.

Knows: which tokens are kept and where they stand then, which are computed, whose KV is taken.
Does not know: how rows are run, or edits; they only make plans.

A token's position is its place in the document plus the document's first position, so the parts
alone decide what moves. Ranges of the old document are named old, those of the new one new.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvloom.errors import RequestError, UnsupportedModelError
from kvloom.kv.doc import KVDoc
from kvloom.kv.span import Span, cut
from kvloom.types import ModelSpec


@dataclass(frozen=True, slots=True)
class Keep:
    """Show tokens start to stop - 1 of the old document, wherever they come to stand."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Compute:
    """Run tokens as rows that see what stands before them in the new document."""

    tokens: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Take:
    """Show spans of another document, in reading order."""

    spans: tuple[Span, ...]

    @property
    def length(self) -> int:
        """Tokens in all."""
        return sum(span.length for span in self.spans)


@dataclass(frozen=True, slots=True)
class Mix:
    """Show old tokens with either their keys or their values taken from spans of equal tokens.

    Attributes:
        start: first old token.
        stop: old token behind the last.
        spans: stretches of another document, in reading order.
        taken: what is taken of the spans.
    """

    start: int
    stop: int
    spans: tuple[Span, ...]
    taken: str

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.stop - self.start


Part = Keep | Compute | Take | Mix


@dataclass(frozen=True, slots=True)
class Change:
    """Old tokens start to stop - 1 give way to other parts."""

    start: int
    stop: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class EditPlan:
    """What an edit comes to.

    Attributes:
        parts: what the new document is made of, in order; no two neighbours could be one.
        start_pos: position of the document's first token.
    """

    parts: tuple[Part, ...]
    start_pos: int = 0

    @property
    def length(self) -> int:
        """Tokens of the new document."""
        return sum(part.length for part in self.parts)

    @property
    def kept_prefix(self) -> int:
        """Tokens at the start that stay as they are, exact ones exact."""
        first = self.parts[0] if self.parts else None
        return first.stop if isinstance(first, Keep) and first.start == 0 else 0

    @property
    def moved(self) -> list[tuple[int, int, int]]:
        """Old tokens (start, stop) that stand elsewhere now, with the distance."""
        return [
            (part.start, part.stop, place - part.start)
            for place, part in self.placed()
            if isinstance(part, Keep) and place != part.start
        ]

    @property
    def stale(self) -> list[tuple[int, int]]:
        """New ranges that are shown without being computed behind what stands before them now.

        Whether one is exact all the same is for the document to say.
        """
        return [
            (place, place + part.length)
            for place, part in self.placed()
            if not isinstance(part, Compute)
            and not (isinstance(part, Keep) and place == 0 == part.start)
        ]

    @property
    def num_computed(self) -> int:
        """Tokens to run."""
        return sum(part.length for part in self.parts if isinstance(part, Compute))

    def placed(self) -> Iterator[tuple[int, Part]]:
        """Yield the parts, each with the place of its first token in the new document."""
        place = 0
        for part in self.parts:
            yield place, part
            place += part.length

    def tokens(self, doc: KVDoc) -> list[int]:
        """Return the new document's token ids, given the old document."""
        old, new = doc.tokens, list[int]()
        for part in self.parts:
            if isinstance(part, Compute):
                new += part.tokens
            elif isinstance(part, Take):
                new += (token for span in part.spans for token in span.tokens)
            else:
                new += old[part.start : part.stop]
        return new

    def __str__(self) -> str:
        return "\n".join(_line(place, part) for place, part in self.placed()) or "nothing is left"


def plan_of(doc: KVDoc, changes: Iterable[Change]) -> EditPlan:
    """Return what changes of a document come to, all of them in terms of the old document.

    Changes at one place are done in the order given.

    Raises:
        RequestError: two changes overlap.
    """
    parts: list[Part] = []
    edge = 0
    for change in sorted(changes, key=lambda change: (change.start, change.stop)):
        if change.start < edge:
            raise RequestError(
                f"Two edits meet: tokens {change.start} to {change.stop} are changed after those "
                f"up to {edge}; give edits that do not overlap, or one after the other.",
                param="edits",
            )
        parts += (Keep(edge, change.start), *change.parts)
        edge = change.stop
    parts.append(Keep(edge, doc.length))
    return EditPlan(merged(parts), doc.start_pos)


def merged(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Return parts without empty ones and with neighbours as one where they could be."""
    found: list[Part] = []
    for part in parts:
        _add(found, part)
    return tuple(found)


def shown(doc: KVDoc, part: Keep | Take, place: int) -> list[Span]:
    """Return the spans that show a part of a document's plan, with its first token at a place.

    They are in reading order, and of the old document's closed segments.
    """
    if isinstance(part, Keep):
        return placed_at(cut(doc.order, part.start, part.stop), doc.start_pos + place)
    return placed_at(part.spans, doc.start_pos + place)


def placed_at(pieces: Iterable[Span], pos: int) -> list[Span]:
    """Return pieces in reading order moved so that their tokens stand from a position on."""
    moved = []
    for piece in pieces:
        moved.append(piece.at(pos))
        pos += piece.length
    return moved


def require_movable(plan: EditPlan, spec: ModelSpec) -> None:
    """Make sure that a model can show what a plan moves.

    Raises:
        UnsupportedModelError: it moves KV, and the model's positions are fixed.
    """
    if spec.positions == "movable":
        return
    for place, part in plan.placed():
        if isinstance(part, Compute):
            continue
        if isinstance(part, Keep):
            distance = place - part.start
        else:
            spans = placed_at(part.spans, plan.start_pos + place)
            distance = next((span.shift for span in spans if span.shift), 0)
        if distance:
            why = "; ".join(spec.notes) or f"its positions are {spec.positions}"
            raise UnsupportedModelError(
                f"The edit moves KV by {distance:+d} positions ({_line(place, part)}), which this "
                f"model does not allow: {why}. Compute everything behind the edit again."
            )


def _add(parts: list[Part], part: Part) -> None:
    """Add a part, as one with the last where it goes on."""
    if part.length == 0:
        return
    last = parts[-1] if parts else None
    if isinstance(last, Keep) and isinstance(part, Keep) and last.stop == part.start:
        parts[-1] = Keep(last.start, part.stop)
    elif isinstance(last, Compute) and isinstance(part, Compute):
        parts[-1] = Compute(last.tokens + part.tokens)
    else:
        parts.append(part)


def _line(place: int, part: Part) -> str:
    match part:
        case Keep(start, stop):
            distance = f" moved by {place - start:+d}" if place != start else ""
            return f"keep {start}..{stop}{distance}"
        case Compute(tokens):
            return f"compute {_tokens(tokens)} at {place}"
        case Take():
            return f"take {part.length} tokens of another document at {place}"
        case Mix(start, stop, _, taken):
            distance = f" moved by {place - start:+d}" if place != start else ""
            return f"keep {start}..{stop} with {taken} of another document{distance}"


def _tokens(tokens: Sequence[int]) -> str:
    return "1 token" if len(tokens) == 1 else f"{len(tokens)} tokens"
