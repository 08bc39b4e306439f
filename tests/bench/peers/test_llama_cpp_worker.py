"""llama.cpp's worker hands over whole contexts and computes only what is new."""

from __future__ import annotations

import sys

import pytest

from kvloom.bench.peers.llama_cpp_worker import LlamaCppWorker, operations

from .fake_engines import FakeLlama, greedy
from .laws import EDITED, PROMPTS, ask, check_worker, load_fields


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLlama:
    fake = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake.module())
    return fake


@pytest.fixture
def worker(fake: FakeLlama) -> LlamaCppWorker:
    worker = LlamaCppWorker()
    loaded = worker.load(load_fields("model.gguf"))
    assert (loaded.dtype, loaded.threads, fake.params.n_threads) == ("toy Q4_1", 3, 3)
    assert loaded.ways == ("exact", "shifted")
    return worker


def test_its_tokens_are_those_of_the_rule(worker: LlamaCppWorker) -> None:
    check_worker(worker)


def test_only_what_is_new_is_computed(worker: LlamaCppWorker, fake: FakeLlama) -> None:
    worker.remember({"tokens": PROMPTS[2]})
    before = fake.computed
    done = worker.complete(ask([EDITED], new_tokens=1))
    assert done.cached_tokens == 3
    assert fake.computed - before == len(EDITED) - 3


def test_a_repeated_prompt_computes_its_last_token(worker: LlamaCppWorker, fake: FakeLlama) -> None:
    worker.remember({"tokens": PROMPTS[2]})
    before = fake.computed
    assert worker.complete(ask([PROMPTS[2]], new_tokens=1)).cached_tokens == len(PROMPTS[2]) - 1
    assert fake.computed == before + 1


@pytest.mark.parametrize(
    "new",
    [
        [99, 100, 7, 8, 9, 103, 104, 105],
        [99, 100, 103, 104, 105],
        [99, 7, 100, 101, 102, 103, 104, 105],
        [7, 105],
        [99, 100, 101, 102, 103, 104, 7],
        PROMPTS[2],
    ],
    ids=["replaced", "deleted", "inserted", "nearly all", "the end", "nothing"],
)
def test_a_change_is_shifted_by_hand_and_only_what_is_new_is_computed(
    worker: LlamaCppWorker, fake: FakeLlama, new: list[int]
) -> None:
    old = PROMPTS[2]
    worker.remember({"tokens": old})
    before = fake.computed
    done = worker.complete({**ask([new], new_tokens=3), "way": "shifted"})
    # The rule adds up all tokens, wherever they stand: what is missing or doubled shows.
    assert done.token_ids == [greedy(new, 3)]
    assert done.cached_tokens is not None
    assert fake.computed - before == len(new) - done.cached_tokens + 2
    assert not fake.sequences.get(1), "cells are left aside"
    worker.remember({"tokens": old})
    assert worker.complete(ask([old], new_tokens=1)).token_ids == [greedy(old, 1)]


def test_a_shifted_change_computes_the_new_tokens_and_the_last(worker: LlamaCppWorker) -> None:
    worker.remember({"tokens": PROMPTS[2]})
    new = [99, 100, 7, 8, 9, 103, 104, 105]
    done = worker.complete({**ask([new], new_tokens=1), "way": "shifted"})
    assert done.cached_tokens == len(new) - 3 - 1


def test_failures_are_errors(worker: LlamaCppWorker, fake: FakeLlama) -> None:
    fake.status = 1
    with pytest.raises(RuntimeError, match="status 1"):
        worker.complete(ask(PROMPTS))
    with pytest.raises(RuntimeError, match="cannot read"):
        worker.load(load_fields("model.bin"))


def test_the_worker_answers_these_requests() -> None:
    assert set(operations(lambda *_: None)) == {"load", "remember", "complete"}
