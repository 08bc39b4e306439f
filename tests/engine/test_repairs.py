"""Repairs go on beside requests, and end without a trace where they cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvloom.engine.engine import Engine
from kvloom.engine.request import Failed, Repaired
from kvloom.errors import CapacityError, KvloomError
from kvloom.kv.doc import KVDoc
from kvloom.reuse.select import selector
from kvloom.types import Rows
from tests.engine.worlds import BOOKS, expected_completion, fake_engine, greedy
from tests.fake_model import FakeRunner, Oracle


def moved(engine: Engine, length: int = 150) -> KVDoc:
    """A held document whose first tokens were cut out."""
    doc = KVDoc(engine.pool, engine.memory.root)
    tokens, pos = np.array(BOOKS[0][: length + 5]), np.arange(length + 5)
    engine._runner.forward([Rows(doc, tokens, pos, "none")])
    doc.close_tail()
    held = engine.new_document()
    held.extend([doc.spans[0].sub(5, length + 5).at(0)])
    doc.close()
    return held


def logits(engine: Engine, doc: KVDoc) -> torch.Tensor:
    row = Rows(doc.fork(), np.array([5]), np.array([doc.length]), "last")
    (found,) = engine._runner.forward([row]).logits
    row.doc.close()
    assert found is not None
    return found[-1]


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner(num_layers=2)


def test_requests_run_beside_repairs(runner: FakeRunner) -> None:
    engine = fake_engine(runner=runner, step_tokens=20)
    docs = [moved(engine) for _ in range(2)]
    names = [engine.repair(doc, 1, selector("blend")) for doc in docs]
    asked = engine.submit(BOOKS[1][:30], greedy(4, ignore_eos=True))
    tokens: list[int] = []
    done: dict[str, Repaired] = {}
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Repaired):
                done[event.request_id] = event
            else:
                assert event.request_id == asked
                tokens += event.token_ids  # type: ignore[union-attr]
        engine.memory.check()
        assert max(runner.steps[-1]) <= 20
    assert list(done) == names
    wanted = expected_completion(Oracle(), BOOKS[1][:30], greedy(4, ignore_eos=True), 0, 4000)
    assert tokens == wanted[0]
    for doc, event in zip(docs, done.values(), strict=True):
        assert doc.provenance().tokens["moved"] == 150  # as it was
        assert event.receipt.repaired == 150
        assert torch.equal(logits(engine, event.doc), Oracle().logits([*doc.tokens, 5]))
        engine.release(event.doc)
        engine.release(doc)
    assert not engine.memory.in_work


@pytest.mark.parametrize("steps", range(4))
@pytest.mark.parametrize("end", ["cancel", "failure"])
def test_a_repair_that_ends_early_leaves_the_document(
    runner: FakeRunner, steps: int, end: str
) -> None:
    engine = fake_engine(runner=runner, step_tokens=50)
    doc = moved(engine)
    before, used = doc.version, engine.pool.used_bytes
    name = engine.repair(doc, 0.9, selector("blend"))
    for _ in range(steps):
        assert engine.step() == []
    if end == "cancel":
        assert engine.cancel(name) == []
    else:
        runner.failures = [ValueError("no weights")]
        (event,) = engine.step()
        assert isinstance(event, Failed)
        assert isinstance(event.error, KvloomError)
        assert "no weights" in str(event.error)
    assert not engine.has_work
    assert (doc.version, engine.pool.used_bytes) == (before, used)
    assert not engine.memory.in_work
    engine.memory.check()


@pytest.mark.parametrize("blocks", [3, 4, 5])
def test_a_repair_needs_room_beside_what_runs(runner: FakeRunner, blocks: int) -> None:
    engine = fake_engine(blocks=blocks, runner=runner)
    doc = moved(engine, 120)
    engine.repair(doc, 1, selector("first"))
    events: list[Any] = []
    while engine.has_work:
        events += engine.step()
        engine.memory.check()
    (event,) = events
    if isinstance(event, Failed):
        assert isinstance(event.error, CapacityError)
        assert "kv_memory" in str(event.error)
    else:
        assert event.receipt.repaired == 120
    assert isinstance(event, Failed) == (blocks < 4)


def test_what_a_step_was_promised_is_not_counted_twice(runner: FakeRunner) -> None:
    """A repair beside a long prompt finds the room that is there."""
    engine = fake_engine(blocks=9, runner=runner)
    doc = moved(engine, 120)
    asked = engine.submit(BOOKS[1][:180], greedy(2))
    engine.repair(doc, 1, selector("first"))
    failed = []
    while engine.has_work:
        failed += [event for event in engine.step() if isinstance(event, Failed)]
    assert not failed, str(failed)
    assert asked
