"""The double must tell right memory from wrong, or tests that stand on it say nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import Pool
from kvloom.types import Rows
from tests.fake_model import FakeRunner, Oracle

TEXT = [int(token) for token in np.random.default_rng(0).integers(1, 32, 150)]


def ask(runner: FakeRunner, *asked: tuple[KVDoc, list[int]]) -> list[torch.Tensor]:
    rows = [
        Rows(doc, np.array(tokens), np.arange(doc.length, doc.length + len(tokens)), "last")
        for doc, tokens in asked
    ]
    return [logits[-1] for logits in runner.forward(rows).logits if logits is not None]


@pytest.fixture
def pool() -> Pool:
    return Pool(FakeRunner().spec.layers, 2**16)


def test_a_packed_chunked_step_answers_as_the_oracle(pool: Pool) -> None:
    runner, oracle = FakeRunner(), Oracle()
    first, second = (KVDoc(pool, Lineage.root(b"")) for _ in range(2))
    ask(runner, (first, TEXT[:70]), (second, TEXT[:3]))
    shared = first.fork()
    answers = ask(runner, (first, TEXT[70:]), (shared, [5]), (second, TEXT[3:90]))
    for tokens, answer in zip((TEXT, [*TEXT[:70], 5], TEXT[:90]), answers, strict=True):
        assert torch.equal(answer, oracle.logits(tokens))


def test_every_token_before_changes_the_oracle() -> None:
    oracle = Oracle()
    for place in (0, 70, 149):
        changed = [*TEXT]
        changed[place] = changed[place] % 31 + 1
        assert not torch.equal(oracle.logits(TEXT), oracle.logits(changed))


@pytest.mark.parametrize("arena", ["keys", "values"])
def test_a_slot_that_was_overwritten_shows(pool: Pool, arena: str) -> None:
    runner = FakeRunner()
    doc = KVDoc(pool, Lineage.root(b""))
    ask(runner, (doc, TEXT[:70]))
    slot = doc.spans[0].pool_slots[0] + 69
    getattr(pool, arena)[0][0, slot, 1] += 1
    (answer,) = ask(runner, (doc, [5]))
    assert not torch.equal(answer, Oracle().logits([*TEXT[:70], 5]))
