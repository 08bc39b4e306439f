"""What every edit must do: say what happens as plain data, and leave the document as it is."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.kv.doc import KVDoc
from kvloom.kv.edit import Append, Truncate
from kvloom.types import Edit
from tests.kv.worlds import ROOT, small_pool

MAKERS: dict[str, Callable[[int, list[int]], tuple[Edit, list[int]]]] = {
    # An edit for a document of these tokens, and the tokens that must come of it.
    "truncate": lambda number, tokens: (
        Truncate(number % (len(tokens) + 1)),
        tokens[: number % (len(tokens) + 1)],
    ),
    "append": lambda number, tokens: (
        Append(tuple(range(number % 90))),
        tokens + list(range(number % 90)),
    ),
}
every_edit = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
texts = st.lists(st.integers(0, 9), max_size=150)


def document(tokens: list[int]) -> KVDoc:
    doc = KVDoc(small_pool(8), ROOT)
    doc.append(tokens)
    return doc


@every_edit
@given(number=st.integers(0, 500), tokens=texts)
def test_doing_what_the_plan_says_gives_the_edited_text(make, number, tokens):
    doc = document(tokens)
    edit, expected = make(number, tokens)
    plan = doc.apply(edit)
    doc.truncate(plan.keep)
    doc.append(plan.recompute)
    assert doc.tokens == expected
    assert doc.exact_length() == len(expected)


@every_edit
@given(number=st.integers(0, 500), tokens=texts)
def test_planning_is_pure(make, number, tokens):
    doc = document(tokens)
    before, free = doc.version, doc.pool.free_blocks
    edit, _ = make(number, tokens)
    assert edit.plan(doc) == edit.plan(doc) == doc.apply(edit)
    assert doc.version is before
    assert doc.pool.free_blocks == free


@every_edit
def test_edits_are_plain_data(make):
    edit, _ = make(3, [1, 2, 3, 4])
    assert deepcopy(edit) == edit
    assert all(repr(getattr(edit, field.name)) in repr(edit) for field in fields(edit))
    with pytest.raises(FrozenInstanceError):
        setattr(edit, fields(edit)[0].name, None)
