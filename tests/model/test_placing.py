"""Rows get their places for one step, and a step that fails leaves documents as they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import CapacityError
from kvloom.kv.doc import KVDoc
from kvloom.kv.pool import Pool
from kvloom.model.placing import placed, split_logits, wanted_rows
from kvloom.types import LogitsMode, Rows, WriteMode
from tests.kv.worlds import ROOT, check_books, small_pool

modes = st.sampled_from(["none", "last", "all"])


def rows(doc: KVDoc, pos: list[int], mode: LogitsMode = "all", write: WriteMode = "append") -> Rows:
    tokens = np.arange(len(pos), dtype=np.int64)
    return Rows(doc, tokens, np.array(pos, dtype=np.int64), mode, write)


def document(pool: Pool, length: int) -> KVDoc:
    doc = KVDoc(pool, ROOT)
    doc.append(list(range(length)))
    return doc


@given(entries=st.lists(st.tuples(st.integers(1, 9), modes), min_size=1, max_size=6))
def test_logits_are_split_as_they_were_wanted(entries):
    doc = KVDoc(small_pool(1), ROOT)
    step = [rows(doc, list(range(count)), mode) for count, mode in entries]
    counts, places = wanted_rows(step)
    numbers = torch.arange(sum(count for count, _ in entries), dtype=torch.float32)[:, None]
    output = split_logits(numbers[torch.from_numpy(places)], counts).logits
    start = 0
    for (count, mode), found in zip(entries, output, strict=True):
        expected = numbers[start : start + count]
        if mode == "none":
            assert found is None
        else:
            assert torch.equal(found, expected[-1:] if mode == "last" else expected)
        start += count


def test_appended_rows_stay_and_others_leave_no_trace() -> None:
    pool = small_pool(10)
    docs = [document(pool, 70), document(pool, 5)]
    step = [
        rows(docs[0], [70, 71]),
        rows(docs[1], [3, 1], write="none"),
        rows(docs[0], [70], write="none"),
    ]
    with placed(step) as (shown, slots):
        assert shown[0] is docs[0]
        assert not {id(doc) for doc in shown[1:]} & {id(doc) for doc in docs}
        assert [len(part) for part in slots] == [2, 2, 1]
        assert len(np.unique(np.concatenate(slots))) == 5
        assert shown[2].length == 71
    assert [doc.length for doc in docs] == [72, 5]
    check_books(pool, docs)


@pytest.mark.parametrize("write", ["append", "none"])
def test_a_step_that_fails_gives_everything_back(write: WriteMode) -> None:
    pool = small_pool(10)
    docs = [document(pool, 70), document(pool, 5)]
    before = [doc.tokens for doc in docs]
    pos = [70, 71] if write == "append" else [3, 9]
    with (
        pytest.raises(ValueError, match="inside"),
        placed([rows(docs[1], [5, 6, 7]), rows(docs[0], pos, write=write)]),
    ):
        raise ValueError("inside")
    assert [doc.tokens for doc in docs] == before
    check_books(pool, docs)


def test_rows_that_do_not_fit_give_everything_back() -> None:
    pool = small_pool(3)
    docs = [document(pool, 60), document(pool, 60)]
    entered = False
    with (
        pytest.raises(CapacityError),
        placed([rows(docs[0], list(range(60, 80))), rows(docs[1], list(range(60, 200)))]),
    ):
        entered = True
    assert not entered
    assert [doc.length for doc in docs] == [60, 60]
    for doc in docs:
        doc.shrink()
    check_books(pool, docs)
    assert pool.free_blocks == 1


def test_rows_that_stay_must_continue_their_document() -> None:
    doc = document(small_pool(4), 10)
    for pos in ([11], [9], [11, 10]):
        with pytest.raises(AssertionError, match="must continue"), placed([rows(doc, pos)]):
            pass
        assert doc.length == 10
