"""Watched rows are computed as any others, and what they attend to adds up."""

from __future__ import annotations

import numpy as np
import pytest

from kvloom.engine.engine import Engine
from kvloom.errors import CapacityError, KvloomError
from kvloom.store.key import ANYBODY
from kvloom.types import SlotRange
from tests.engine.worlds import BOOKS, expected_completion, fake_engine, greedy
from tests.fake_model import FakeRunner, Oracle

STRETCHES = [SlotRange(3, 50), SlotRange(50, 90)]


def watched(engine: Engine, steps: list[int]) -> list[np.ndarray]:
    doc = engine.new_document()
    engine.memory.protect(doc)
    found = []
    for start, stop in zip([0, *steps], [*steps, 90], strict=True):
        found.append(engine.watcher.run(doc, BOOKS[0][start:stop], STRETCHES).mass)
    engine.memory.publish(doc, ANYBODY)
    engine.release(doc)
    return found


def test_watched_rows_answer_as_computed_ones() -> None:
    engine = fake_engine(runner=FakeRunner(num_layers=2))
    mass = np.concatenate(watched(engine, [20, 64]), axis=1)
    assert mass.shape == (2, 90, 3)
    np.testing.assert_allclose(mass.sum(axis=2), 1.0, atol=1e-5)
    np.testing.assert_allclose(mass[:, :50, 1], 0.0)  # nobody sees what stands behind
    prompt = [*BOOKS[0][:90], 5]
    engine.submit(prompt, greedy(2))
    tokens: list[int] = []
    while engine.has_work:
        for event in engine.step():
            tokens += event.token_ids  # type: ignore[union-attr]
    assert tokens == expected_completion(Oracle(), prompt, greedy(2), 0, 4000)[0]


def test_without_room_nothing_is_left_behind() -> None:
    engine = fake_engine(blocks=1)
    with pytest.raises(CapacityError):
        watched(engine, [])
    engine.memory.check()


def test_a_pass_that_fails_is_said() -> None:
    runner = FakeRunner()
    runner.failures = [ValueError("no weights")]
    with pytest.raises(KvloomError, match="no weights"):
        watched(fake_engine(runner=runner), [])
