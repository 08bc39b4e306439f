"""Edits say what they come to, and refuse what the document does not have."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import RequestError
from kvloom.kv.doc import KVDoc
from kvloom.kv.edit import Append, Truncate
from kvloom.types import EditPlan
from tests.kv.worlds import ROOT, small_pool


def document(length: int) -> KVDoc:
    doc = KVDoc(small_pool(4), ROOT)
    doc.append([1] * length)
    return doc


@given(length=st.integers(0, 100), keep=st.integers(0, 100))
def test_truncate_keeps_the_start_and_computes_nothing(length, keep):
    keep = min(keep, length)
    assert Truncate(keep).plan(document(length)) == EditPlan(keep=keep)


@given(length=st.integers(0, 100), off=st.integers(1, 50))
def test_a_length_the_document_does_not_have_is_refused_in_words(length, off):
    for wrong in (-off, length + off):
        with pytest.raises(RequestError, match=f"has {length} tokens.*cut to {wrong}") as error:
            document(length).apply(Truncate(wrong))
        assert error.value.param == "length"


@given(length=st.integers(0, 100), tokens=st.lists(st.integers(0, 9), max_size=20))
def test_append_keeps_everything_and_computes_the_rest(length, tokens):
    plan = Append(tuple(tokens)).plan(document(length))
    assert (plan.keep, plan.shifts, plan.recompute) == (length, (), tuple(tokens))
