"""kvloom's worker generates what it should, and says what it reused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvloom import RequestError
from kvloom.bench.peers.kvloom_worker import KvloomWorker, operations

from .conftest import NEW_TOKENS, PROMPTS


def silent(description: str, done: int, total: int) -> None:
    """Take note of nothing."""


@pytest.fixture
def worker(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[KvloomWorker]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    worker = KvloomWorker(silent)
    loaded = worker.load(
        {"model": str(model_folder), "dtype": "float32", "threads": None, "kv_memory": "1MiB"}
    )
    assert loaded.model_path == str(model_folder)
    assert loaded.dtype == "float32"
    assert loaded.threads > 0
    assert {"kvloom", "torch"} <= set(loaded.versions)
    yield worker
    worker.close()


def ask(prompts: list[list[int]], **changes: Any) -> dict[str, Any]:
    return {"prompts": prompts, "new_tokens": NEW_TOKENS, "shared_tokens": 0, **changes}


def test_many_prompts_and_single_ones_generate_the_same(
    worker: KvloomWorker, expected: list[list[int]]
) -> None:
    done = worker.complete(ask(PROMPTS))
    assert done.token_ids == expected
    assert done.cached_tokens == 0
    assert 0 < done.first_token_s < done.total_s
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        done = worker.complete(ask([prompt]))
        assert done.token_ids == [tokens]
        assert 0 < done.first_token_s < done.total_s


def test_what_was_remembered_is_reused_and_counted(
    worker: KvloomWorker, expected: list[list[int]]
) -> None:
    prompt = PROMPTS[2]
    worker.remember({"tokens": prompt[:4]})
    done = worker.complete(ask([prompt], shared_tokens=4))
    assert done.token_ids == [expected[2]]
    assert done.cached_tokens == 4


@pytest.mark.parametrize("way", ["repaired", "shifted"])
def test_a_change_keeps_what_is_behind_it_and_says_what_it_computed(
    worker: KvloomWorker, way: str
) -> None:
    text = "def add(left, right):\n    return left + right\n\n\ndef halve(number):\n    return 1\n"
    changed = text.replace("left + right", "right + left + 0")
    old, new = (worker.tokenize({"text": t}).tokens for t in (text, changed))
    worker.remember({"tokens": old})
    done = worker.complete(ask([new], way=way))
    assert len(done.token_ids[0]) == NEW_TOKENS
    assert 0 < done.first_token_s < done.total_s
    behind = len(new) - len(text.split("left + right")[1])
    assert done.cached_tokens is not None
    assert 0 < len(new) - done.cached_tokens < len(new) // 2
    if way == "shifted":
        assert done.cached_tokens > behind // 2
    exactly = worker.complete(ask([new]))
    assert exactly.cached_tokens is not None
    assert exactly.cached_tokens < done.cached_tokens


def test_after_a_restart_all_but_the_last_token_is_there(
    model_folder: Path, tmp_path: Path
) -> None:
    prompt = [1 + number * 7 % 90 for number in range(150)]
    fields = {"model": str(model_folder), "dtype": "float32", "threads": None}
    fields |= {"kv_memory": "1MiB", "store": str(tmp_path / "store")}
    cached, outputs = [], []
    for _ in range(2):
        worker = KvloomWorker(silent)
        assert "restarted" in worker.load(fields).ways
        done = worker.complete(ask([prompt], way="restarted"))
        outputs.append(done.token_ids)
        cached.append(done.cached_tokens)
        worker.close()
    assert outputs[0] == outputs[1]
    assert cached == [0, len(prompt) - 1]


def test_tokens_are_the_tokenizers_own(worker: KvloomWorker) -> None:
    tokenized = worker.tokenize({"text": "def add(left, right):"})
    assert tokenized.leading == []
    assert tokenized.tokens
    assert worker.tokenize({"text": ""}).tokens == []


def test_a_prompt_that_does_not_fit_is_an_error_and_the_worker_goes_on(
    worker: KvloomWorker, expected: list[list[int]]
) -> None:
    with pytest.raises(RequestError, match="at most 255 fit"):
        worker.complete(ask([[1] * 300]))
    assert worker.complete(ask([PROMPTS[0]])).token_ids == [expected[0]]


def test_nothing_is_answered_before_a_model_is_loaded() -> None:
    with pytest.raises(RuntimeError, match="ask for `load` first"):
        KvloomWorker(silent).complete(ask(PROMPTS))


def test_the_worker_answers_these_requests() -> None:
    assert set(operations(silent)) == {"load", "tokenize", "remember", "complete"}
