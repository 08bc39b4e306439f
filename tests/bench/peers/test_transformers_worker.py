"""transformers generates what it should: padded, without an end, and behind a kept cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvloom.bench.peers.transformers_worker import TransformersWorker, operations

from .conftest import NEW_TOKENS, PROMPTS


def silent(description: str, done: int, total: int) -> None:
    """Take note of nothing."""


def load(folder: Path, **changes: Any) -> dict[str, Any]:
    fields = {"model": str(folder), "dtype": "float32", "threads": None, "kv_memory": "1MiB"}
    return {**fields, **changes}


def ask(prompts: list[list[int]], shared_tokens: int = 0) -> dict[str, Any]:
    return {"prompts": prompts, "new_tokens": NEW_TOKENS, "shared_tokens": shared_tokens}


@pytest.fixture
def worker(model_folder: Path) -> TransformersWorker:
    worker = TransformersWorker()
    worker.load(load(model_folder))
    return worker


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_loading_says_what_is_used(model_folder: Path, threads: int) -> None:
    worker = TransformersWorker()
    loaded = worker.load(load(model_folder, dtype="bfloat16", threads=1))
    assert (loaded.dtype, loaded.threads) == ("bfloat16", 1)
    assert loaded.versions["torch"] == torch.__version__


def test_a_padded_batch_generates_what_each_prompt_does_alone(
    worker: TransformersWorker, expected: list[list[int]]
) -> None:
    assert worker.complete(ask(PROMPTS)).token_ids == expected
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        done = worker.complete(ask([prompt]))
        assert done.token_ids == [tokens]
        assert 0 < done.first_token_s < done.total_s
        assert done.cached_tokens == 0


def test_a_kept_cache_is_cut_back_and_reused(
    worker: TransformersWorker, expected: list[list[int]]
) -> None:
    prompt = PROMPTS[2]
    worker.remember({"tokens": prompt[:4]})
    for _ in range(3):
        done = worker.complete(ask([prompt], shared_tokens=4))
        assert done.token_ids == [expected[2]]
        assert done.cached_tokens == 4


def test_a_kept_cache_is_what_answers(worker: TransformersWorker) -> None:
    prompt = PROMPTS[2]
    worker.remember({"tokens": [200, 201, 202, 203]})
    other = worker.complete(ask([prompt], shared_tokens=4)).token_ids
    cold = worker.complete(ask([[200, 201, 202, 203, *prompt[4:]]])).token_ids
    assert other == cold


def test_a_cold_request_drops_the_cache(worker: TransformersWorker) -> None:
    worker.remember({"tokens": [1, 2, 3]})
    worker.complete(ask([[1, 2, 3, 4]]))
    with pytest.raises(RuntimeError, match="ask for `remember` first"):
        worker.complete(ask([[1, 2, 3, 4]], shared_tokens=3))


def test_layers_with_a_window_keep_their_cache_by_copy(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        max_position_embeddings=128,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path)
    worker = TransformersWorker()
    worker.load(load(tmp_path))
    prompt = list(range(20, 34))
    cold = worker.complete(ask([prompt])).token_ids
    worker.remember({"tokens": prompt[:10]})
    warm = [worker.complete(ask([prompt], shared_tokens=10)).token_ids for _ in range(3)]
    assert warm == [cold] * 3


def test_a_folder_without_a_model_is_an_error_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match="config"):
        TransformersWorker().load(load(tmp_path))


def test_the_worker_answers_these_requests() -> None:
    assert set(operations(silent)) == {"load", "remember", "complete"}
