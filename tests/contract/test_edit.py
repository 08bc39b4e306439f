"""What every edit must do: say what happens as plain data, and leave the document as it is."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.kv.doc import KVDoc
from kvloom.kv.edit import (
    Append,
    Delete,
    Insert,
    Move,
    Replace,
    Several,
    Splice,
    Transplant,
    Truncate,
)
from kvloom.kv.execute import add_part
from kvloom.kv.plan import Compute
from kvloom.kv.span import Span
from kvloom.types import Edit
from tests.kv.worlds import ROOT, check_books, small_pool

Made = tuple[Edit, list[int]]
FRESH = tuple(range(10, 100))


class Doc(KVDoc):
    """A document, and others over the same pool that edits take from."""

    def __init__(self, tokens: list[int]) -> None:
        super().__init__(small_pool(20), ROOT)
        self.others: list[KVDoc] = []
        self.append(tokens)
        self.close_tail()

    def spans_of(self, tokens: list[int]) -> tuple[Span, ...]:
        """Return spans of these tokens."""
        other = KVDoc(self.pool, ROOT)
        other.append(tokens)
        other.close_tail()
        self.others.append(other)
        return other.spans


def insert(doc: Doc, a: int, b: int, c: int) -> Made:
    return Insert(a, FRESH[:c]), [*doc.tokens[:a], *FRESH[:c], *doc.tokens[a:]]


def delete(doc: Doc, a: int, b: int, c: int) -> Made:
    return Delete(a, b), [*doc.tokens[:a], *doc.tokens[b:]]


def replace(doc: Doc, a: int, b: int, c: int) -> Made:
    return Replace(a, b, FRESH[:c]), [*doc.tokens[:a], *FRESH[:c], *doc.tokens[b:]]


def move(doc: Doc, a: int, b: int, c: int) -> Made:
    rest = [*doc.tokens[:a], *doc.tokens[b:]]
    to = c % (len(rest) + 1)
    return Move(a, b, to), [*rest[:to], *doc.tokens[a:b], *rest[to:]]


def splice(doc: Doc, a: int, b: int, c: int) -> Made:
    spans = doc.spans_of(list(FRESH[:c]))
    return Splice(a, spans), [*doc.tokens[:a], *FRESH[:c], *doc.tokens[a:]]


def truncate(doc: Doc, a: int, b: int, c: int) -> Made:
    return Truncate(a), doc.tokens[:a]


def append(doc: Doc, a: int, b: int, c: int) -> Made:
    return Append(FRESH[:c]), [*doc.tokens, *FRESH[:c]]


def transplant(doc: Doc, a: int, b: int, c: int) -> Made:
    spans = doc.spans_of(doc.tokens[a:b])
    return Transplant(a, b, spans, keys=c % 3 > 0, values=c % 3 < 2), doc.tokens


def several(doc: Doc, a: int, b: int, c: int) -> Made:
    edits = (Delete(a, b), Insert(a, FRESH[:1]), Append(FRESH[:c]), Truncate(doc.length))
    return Several(edits), [*doc.tokens[:a], FRESH[0], *doc.tokens[b:], *FRESH[:c]]


MAKERS: dict[str, Callable[[Doc, int, int, int], Made]] = {
    maker.__name__: maker
    for maker in (insert, delete, replace, move, splice, truncate, append, transplant, several)
}
every_edit = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
texts = st.lists(st.integers(0, 9), max_size=150)
numbers = st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(0, 89))


def made(make, doc: Doc, numbers: tuple[int, int, int]) -> Made:
    a, b = sorted(number % (doc.length + 1) for number in numbers[:2])
    return make(doc, a, b, numbers[2])


@every_edit
@given(numbers=numbers, tokens=texts)
def test_doing_what_the_plan_says_gives_the_edited_text(make, numbers, tokens):
    doc = Doc(tokens)
    edit, expected = made(make, doc, numbers)
    plan = doc.apply(edit)
    assert plan.tokens(doc) == expected
    built = KVDoc(doc.pool, ROOT)
    for part in plan.parts:
        if isinstance(part, Compute):
            built.append(part.tokens)
        else:
            add_part(built, doc, part)
    assert built.tokens == expected
    assert built.length == plan.length == built.end_pos == len(expected)
    assert sum(part.length for part in plan.parts if isinstance(part, Compute)) == plan.num_computed
    assert built.exact_length() >= plan.kept_prefix
    check_books(doc.pool, [doc, built, *doc.others])


@every_edit
@given(numbers=numbers, tokens=texts)
def test_planning_is_pure(make, numbers, tokens):
    doc = Doc(tokens)
    edit, _ = made(make, doc, numbers)
    before, free = doc.version, doc.pool.free_blocks
    assert edit.plan(doc) == edit.plan(doc) == doc.apply(edit)
    assert doc.version is before
    assert doc.pool.free_blocks == free


@every_edit
@given(numbers=numbers, tokens=texts)
def test_plans_can_be_read(make, numbers, tokens):
    doc = Doc(tokens)
    plan = doc.apply(made(make, doc, numbers)[0])
    lines = str(plan).splitlines()
    assert len(lines) == max(len(plan.parts), 1)
    for start, stop, shift in plan.moved:
        assert f"keep {start}..{stop} moved by {shift:+d}" in lines
    if plan.num_computed == plan.length > 0:
        assert plan.stale == []


@every_edit
def test_edits_are_plain_data(make):
    edit, _ = make(Doc([1, 2, 3, 4]), 1, 3, 5)
    assert not hasattr(edit, "__dict__")
    if not any(isinstance(getattr(edit, field.name), tuple) for field in fields(edit)):
        assert deepcopy(edit) == edit
    assert all(repr(getattr(edit, field.name)) in repr(edit) for field in fields(edit))
    with pytest.raises(FrozenInstanceError):
        setattr(edit, fields(edit)[0].name, None)
