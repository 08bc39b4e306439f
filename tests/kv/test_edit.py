"""Edits say what they come to, and refuse what the document does not have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import RequestError
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
from kvloom.kv.plan import Compute, EditPlan, Keep
from tests.kv.worlds import ROOT, small_pool


def document(length: int) -> KVDoc:
    doc = KVDoc(small_pool(6), ROOT)
    doc.append([1] * length)
    return doc


@given(length=st.integers(1, 100), keep=st.integers(0, 100))
def test_truncate_keeps_the_start_and_computes_nothing(length, keep):
    plan = Truncate(min(keep, length)).plan(document(length))
    assert (plan.kept_prefix, plan.length) == (min(keep, length),) * 2
    assert (plan.num_computed, plan.moved, plan.stale) == (0, [], [])


@given(length=st.integers(0, 100), off=st.integers(1, 50))
def test_a_length_the_document_does_not_have_is_refused_in_words(length, off):
    for wrong in (-off, length + off):
        with pytest.raises(RequestError, match=f"has {length} tokens.*cut to {wrong}") as error:
            document(length).apply(Truncate(wrong))
        assert error.value.param == "length"


@given(length=st.integers(0, 100), tokens=st.lists(st.integers(0, 9), max_size=20))
def test_append_keeps_everything_and_computes_the_rest(length, tokens):
    plan = Append(tuple(tokens)).plan(document(length))
    assert (plan.kept_prefix, plan.moved, plan.stale) == (length, [], [])
    assert plan.num_computed == len(tokens)


@pytest.mark.parametrize(
    "edit",
    [
        Insert(-1, (1,)),
        Insert(11, (1,)),
        Delete(3, 11),
        Delete(4, 3),
        Delete(-2, 3),
        Replace(0, 11, ()),
        Move(2, 5, 8),
        Move(2, 11, 0),
        Move(2, 5, -1),
        Splice(11, ()),
        Transplant(8, 12, ()),
        Several((Delete(0, 1), Insert(11, (1,)))),
    ],
    ids=str,
)
def test_places_the_document_does_not_have_are_refused(edit):
    with pytest.raises(RequestError, match=r"has .* tokens"):
        document(10).apply(edit)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Delete(2, 5), Insert(3, (1,))),
        (Replace(2, 5, (7,)), Delete(4, 6)),
        (Move(2, 5, 0), Delete(3, 4)),
        (Move(2, 5, 6), Delete(8, 10)),
        (Truncate(6), Insert(8, (1,))),
    ],
    ids=str,
)
def test_edits_that_overlap_are_refused(first, second):
    for edits in ((first, second), (second, first)):
        with pytest.raises(RequestError, match="do not overlap"):
            document(10).apply(Several(edits))


def test_edits_that_touch_are_done() -> None:
    doc = document(10)
    edits = (Replace(2, 5, (7,)), Delete(5, 6), Insert(2, (3,)), Move(6, 8, 0), Truncate(9))
    assert doc.apply(Several(edits)).tokens(doc) == [1, 1, 1, 1, 3, 7, 1]


def test_edits_at_one_place_are_done_in_the_order_given() -> None:
    doc = document(4)
    edits = (Insert(2, (5,)), Insert(2, (6,)), Delete(2, 3), Insert(3, (7,)))
    assert doc.apply(Several(edits)).tokens(doc) == [1, 1, 5, 6, 7, 1]


def test_a_transplant_is_of_equal_tokens() -> None:
    doc, other = document(4), KVDoc(small_pool(1), ROOT)
    other.append([1, 2])
    with pytest.raises(RequestError, match="changes KV and no text") as error:
        doc.apply(Transplant(0, 2, other.spans))
    assert error.value.param == "spans"


def test_what_changes_nothing_keeps_everything() -> None:
    doc = document(9)
    nothing = (Insert(3, ()), Delete(2, 2), Move(2, 5, 2), Several(()), Append(()), Truncate(9))
    for edit in nothing:
        assert doc.apply(edit) == EditPlan((Keep(0, 9),))
    spans = document(9).spans
    assert doc.apply(Transplant(0, 9, spans, keys=False, values=False)) == EditPlan((Keep(0, 9),))


def test_replacing_by_equal_tokens_computes_them_again() -> None:
    plan = document(9).apply(Replace(2, 4, (1, 1)))
    assert plan.parts == (Keep(0, 2), Compute((1, 1)), Keep(4, 9))
    assert plan.moved == []
    assert plan.stale == [(4, 9)]
