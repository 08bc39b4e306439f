"""Repairs end between the document as it is and the document as it should be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.kv.doc import KVDoc
from kvloom.kv.execute import add_part
from kvloom.kv.lineage import Lineage
from kvloom.kv.plan import Keep
from kvloom.kv.pool import Pool
from kvloom.model.probe import probe
from kvloom.reuse.repair import Repair, stale_rows, values_at
from kvloom.reuse.select import selector
from kvloom.types import Forward, Rows, SlotRange
from tests.fake_model import FakeRunner, Oracle
from tests.model.families import VOCABULARY
from tests.model.running import assert_same, cached, plain_logits, pool_for, prepared, some_tokens
from tests.model.tiny_models import tiny_llama

ROOT = Lineage.root(b"repairs")
TEXT = np.random.default_rng(0).integers(1, 32, 150).tolist()


def run(runner: Forward, doc: KVDoc, tokens: list[int]) -> torch.Tensor:
    """Append tokens and return the last one's logits."""
    pos = np.arange(doc.end_pos, doc.end_pos + len(tokens))
    (logits,) = runner.forward([Rows(doc, np.array(tokens), pos, "last")]).logits
    assert logits is not None
    return logits[-1]


def edited(runner: Forward, pool: Pool, old: list[int], at: int, cut: int, new: list[int]) -> KVDoc:
    """A document whose tokens behind an edit are still those of the text before it."""
    doc, built = KVDoc(pool, ROOT), KVDoc(pool, ROOT)
    run(runner, doc, old)
    doc.close_tail()
    for start, stop, tokens in ((0, at, new), (at + cut, len(old), [])):
        if start < stop:
            add_part(built, doc, Keep(start, stop))
        if tokens:
            run(runner, built, tokens)
    doc.close()
    return built


def repair(
    runner: Forward, doc: KVDoc, share: float, name: str = "blend", step_rows: int = 512
) -> Repair:
    work = Repair(doc, share, selector(name), step_rows)
    while not work.finished:
        assert work.next_rows <= step_rows
        work.advance(runner)
    return work


@pytest.mark.parametrize("name", ["blend", "first", "random"])
@settings(max_examples=12)
@given(
    at=st.integers(4, 100),
    cut=st.integers(0, 40),
    new=st.lists(st.integers(1, 31), max_size=20),
    step_rows=st.sampled_from([1, 7, 64, 512]),
)
def test_all_is_as_if_computed_fresh_and_nothing_is_as_it_was(name, at, cut, new, step_rows):
    runner = FakeRunner(num_layers=2)
    pool = Pool(runner.spec.layers, 2**17)
    doc = edited(runner, pool, TEXT, at, cut, new)
    before, tokens, steps = doc.version, doc.tokens, len(runner.steps)
    stale = len(tokens) - doc.exact_length()
    nothing = repair(runner, doc, 0, name, step_rows)
    assert (doc.version, len(runner.steps)) == (before, steps)
    assert nothing.receipt().repaired == 0
    receipt = repair(runner, doc, 1, name, step_rows).receipt()
    assert (receipt.stale, receipt.repaired) == (stale, stale)
    assert receipt.left is None
    assert doc.tokens == tokens
    assert torch.equal(run(runner, doc.fork(), [5]), Oracle().logits([*tokens, 5]))


@settings(max_examples=10)
@given(share=st.floats(0.05, 0.95), step_rows=st.sampled_from([3, 512]), seed=st.integers(0, 9))
def test_a_share_is_repaired_and_the_receipt_says_what_is_left(share, step_rows, seed):
    runner = FakeRunner(num_layers=2)
    doc = edited(runner, Pool(runner.spec.layers, 2**17), TEXT, 20, 3, [seed + 1] * 5)
    receipt = repair(runner, doc, share, "blend", step_rows).receipt()
    assert receipt.repaired == int(np.ceil(share * receipt.stale))
    assert doc.provenance().tokens["repaired"] == receipt.repaired
    assert 0 <= receipt.left <= receipt.deviation
    if receipt.repaired < receipt.stale:  # those left deviate least
        assert receipt.left <= receipt.deviation * (1 - receipt.repaired / receipt.stale) + 1e-6


def test_a_second_edit_makes_repaired_rows_stale_again():
    runner = FakeRunner(num_layers=2)
    doc = edited(runner, Pool(runner.spec.layers, 2**17), TEXT, 20, 3, [7] * 5)
    repair(runner, doc, 1)
    assert stale_rows(doc).place.tolist() == list(range(25, doc.length))
    built = KVDoc(doc.pool, ROOT)
    add_part(built, doc, Keep(0, 10))
    run(runner, built, [9, 9])
    add_part(built, doc, Keep(12, doc.length))
    repair(runner, built, 1)
    assert torch.equal(run(runner, built.fork(), [5]), Oracle().logits([*built.tokens, 5]))


@pytest.mark.parametrize("name", ["first", "random"])
def test_no_row_sees_what_stands_behind_it(name):
    """Two texts that differ at the end only: what is repaired before it is the same."""
    found = []
    for end in ([3] * 20, [4] * 20):
        runner = FakeRunner(num_layers=2)
        text = [*TEXT[:100], *end]
        doc = edited(runner, Pool(runner.spec.layers, 2**17), text, 20, 3, [7] * 5)
        work = Repair(doc, 0.5, selector(name), 512)
        while not work.finished:
            work.advance(runner)
        places = np.arange(25, 100)
        found.append(values_at(doc, 1, places))
    assert torch.equal(*found)


@settings(max_examples=15)
@given(low=st.integers(0, 160), length=st.integers(0, 80), share=st.sampled_from([0.3, 1.0]))
def test_a_repair_within_a_range_leaves_everything_else(low, length, share):
    runner = FakeRunner(num_layers=2)
    pool = Pool(runner.spec.layers, 2**17)
    doc = edited(runner, pool, TEXT, 40, 10, [7, 8])
    stale = stale_rows(doc).place
    inside = stale[(stale >= low) & (stale < low + length)]
    work = Repair(doc, share, selector("blend"), 16, within=SlotRange(low, low + length))
    while not work.finished:
        work.advance(runner)
    assert work.receipt().repaired == math.ceil(share * len(inside))
    repaired = [span.pos for span in doc.order if span.segment.placed]
    found = np.concatenate([np.empty(0, dtype=np.int64), *repaired])
    assert set(found) <= set(inside)
    assert len(found) == work.receipt().repaired
    doc.close()


@pytest.mark.parametrize("positions", [True, False])
def test_rows_and_values_are_read_in_the_order_of_tokens(positions):
    runner = FakeRunner(num_layers=2)
    doc = edited(runner, Pool(runner.spec.layers, 2**17), TEXT, 20, 3, [7] * 5 if positions else [])
    repair(runner, doc, 0.3)
    places = np.arange(doc.length)[:: 3 if positions else 1]
    one_by_one = [values_at(doc, 1, places[n : n + 1]) for n in range(len(places))]
    assert torch.equal(values_at(doc, 1, places), torch.cat(one_by_one, dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_with_all_rows_repaired_answers_as_after_a_fresh_prefill(dtype):
    plain, runner = prepared("llama", dtype)
    pool = pool_for(runner, 40, dtype)
    old = some_tokens(120)
    doc = edited(runner, pool, old.tolist(), 30, 5, some_tokens(9, 1).tolist())
    shifted = doc.fork()
    receipt = repair(runner, doc, 1, step_rows=50).receipt()
    assert receipt.repaired == 85
    tokens = np.array([*doc.tokens, 7])
    kind = str(dtype).removeprefix("torch.")
    expected = run(runner, cached(runner, pool, tokens[:-1]), [7])
    assert_same(run(runner, doc, [7]), expected, kind)
    if dtype is torch.float32:
        assert_same(expected, plain_logits(plain, tokens)[-1], kind)
    half = repair(runner, shifted.fork(), 0.5).receipt()
    assert half.deviation is not None
    assert 0 < half.left < half.deviation


@pytest.mark.parametrize("name", ["blend", "first"])
def test_a_model_of_one_layer_keeps_nothing_that_could_deviate(name):
    runner = probe(
        tiny_llama(num_hidden_layers=1, vocab_size=VOCABULARY, max_position_embeddings=512)
    )
    pool = pool_for(runner, 40)
    doc = edited(runner, pool, some_tokens(120).tolist(), 30, 5, some_tokens(9, 1).tolist())
    expected = run(runner, cached(runner, pool, np.array(doc.tokens)), [7])
    assert_same(run(runner, doc.fork(), [7]), expected)
    receipt = repair(runner, doc, 0.5, name).receipt()
    assert (receipt.stale, receipt.repaired) == (85, 43)
    if name == "blend":
        assert receipt.deviation == pytest.approx(0, abs=1e-6)
    assert_same(run(runner, doc, [7]), expected)
