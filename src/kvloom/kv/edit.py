"""Edits: changes of a document as plain data.

Knows: which tokens of a document an edit changes.
Does not know: how rows are run; the engine executes plans.

All places and ranges count tokens of the document as it is before the edit.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from kvloom.errors import RequestError
from kvloom.kv.doc import KVDoc
from kvloom.kv.plan import Change, Compute, EditPlan, Keep, Mix, Take, plan_of
from kvloom.kv.span import Span, cut, reading_order


class SingleEdit(Protocol):
    """An edit that can be one of several."""

    def changes(self, doc: KVDoc) -> list[Change]:
        """Return what gives way to what; pure."""
        ...


class _Planned:
    """An edit that says what it changes; what that comes to follows."""

    __slots__ = ()

    def plan(self: SingleEdit, doc: KVDoc) -> EditPlan:
        """Say what the edit comes to; pure.

        Raises:
            RequestError: the edit names what the document does not have.
        """
        return plan_of(doc, self.changes(doc))


@dataclass(frozen=True, slots=True)
class Insert(_Planned):
    """Put tokens before token `at`."""

    at: int
    tokens: tuple[int, ...]

    def changes(self, doc: KVDoc) -> list[Change]:
        """Return the one change."""
        _require(doc, self.at, self.at, "at")
        return [Change(self.at, self.at, (Compute(self.tokens),))]


@dataclass(frozen=True, slots=True)
class Delete(_Planned):
    """Take tokens start to stop - 1 out."""

    start: int
    stop: int

    def changes(self, doc: KVDoc) -> list[Change]:
        """Return the one change."""
        _require(doc, self.start, self.stop)
        return [Change(self.start, self.stop, ())]


@dataclass(frozen=True, slots=True)
class Replace(_Planned):
    """Put tokens in the place of tokens start to stop - 1; equal ones are computed as well."""

    start: int
    stop: int
    tokens: tuple[int, ...]

    def changes(self, doc: KVDoc) -> list[Change]:
        """Return the one change."""
        _require(doc, self.start, self.stop)
        return [Change(self.start, self.stop, (Compute(self.tokens),))]


@dataclass(frozen=True, slots=True)
class Move(_Planned):
    """Take tokens start to stop - 1 out, and put them before token `to` of what is then left."""

    start: int
    stop: int
    to: int

    def changes(self, doc: KVDoc) -> list[Change]:
        """Return where the tokens go from and to."""
        _require(doc, self.start, self.stop)
        _require(doc, self.to, self.to, "to", doc.length - (self.stop - self.start))
        if self.to == self.start:
            return []
        goal = self.to if self.to < self.start else self.to + self.stop - self.start
        return [
            Change(self.start, self.stop, ()),
            Change(goal, goal, (Keep(self.start, self.stop),)),
        ]


@dataclass(frozen=True, slots=True)
class Splice(_Planned):
    """Put spans of another document before token `at`, with the KV they have."""

    at: int
    spans: tuple[Span, ...]

    def changes(self, doc: KVDoc) -> list[Change]:
        """Return the one change."""
        _require(doc, self.at, self.at, "at")
        return [Change(self.at, self.at, (Take(reading_order(self.spans)),))]


@dataclass(frozen=True, slots=True)
class Truncate(_Planned):
    """Keep the first `length` tokens."""

    length: int

    def changes(self, doc: KVDoc) -> list[Change]:
        """Return the one change."""
        if not 0 <= self.length <= doc.length:
            raise RequestError(
                f"The document has {doc.length} tokens and cannot be cut to {self.length}; "
                f"give a length from 0 to {doc.length}.",
                param="length",
            )
        return [Change(self.length, doc.length, ())]


@dataclass(frozen=True, slots=True)
class Append(_Planned):
    """Add tokens at the end."""

    tokens: tuple[int, ...]

    def changes(self, doc: KVDoc) -> list[Change]:
        """Return the one change."""
        return [Change(doc.length, doc.length, (Compute(self.tokens),))]


@dataclass(frozen=True, slots=True)
class Transplant(_Planned):
    """Show tokens start to stop - 1 with KV that equal tokens have in another document.

    Source: AlignIT (Agarwal et al. 2024), arXiv 2406.18893: keys and values of a concept's tokens
    replaced after the fact; here of a decoder's own tokens, whose keys stand at new positions.
    """

    start: int
    stop: int
    spans: tuple[Span, ...]
    keys: bool = True
    values: bool = True

    def changes(self, doc: KVDoc) -> list[Change]:
        """Return the one change."""
        _require(doc, self.start, self.stop)
        spans = reading_order(self.spans)
        theirs = [token for span in spans for token in span.tokens]
        ours = [token for piece in cut(doc.order, self.start, self.stop) for token in piece.tokens]
        if theirs != ours:
            raise RequestError(
                f"The {len(theirs)} tokens of the spans differ from tokens {self.start} to "
                f"{self.stop} of the document; a transplant changes KV and no text, so give spans "
                "of equal tokens.",
                param="spans",
            )
        if not self.keys and not self.values:
            return []
        if self.keys and self.values:
            return [Change(self.start, self.stop, (Take(spans),))]
        taken = "keys" if self.keys else "values"
        return [Change(self.start, self.stop, (Mix(self.start, self.stop, spans, taken),))]


@dataclass(frozen=True, slots=True)
class Several(_Planned):
    """Do several edits in one go, each in terms of the document before all of them.

    They may touch and not overlap; those at one place are done in the order given.
    """

    edits: tuple[SingleEdit, ...]

    def changes(self, doc: KVDoc) -> list[Change]:
        """Return all changes."""
        return list(chain.from_iterable(edit.changes(doc) for edit in self.edits))


def _require(
    doc: KVDoc, start: int, stop: int, param: str = "start", length: int | None = None
) -> None:
    """Make sure that a range lies in a document.

    Raises:
        RequestError: it does not.
    """
    length = doc.length if length is None else length
    if not 0 <= start <= stop <= length:
        what = f"place {start}" if start == stop else f"range {start} to {stop}"
        raise RequestError(
            f"The document has {length} tokens to edit and no {what}; give numbers from 0 to "
            f"{length}, the lower one first.",
            param=param,
        )
