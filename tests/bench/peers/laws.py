"""What every worker must do, whatever its engine."""

from __future__ import annotations

from typing import Any

from .fake_engines import greedy

PROMPTS = [[5, 6, 7, 8, 9], [40, 41], [99, 100, 101, 102, 103, 104, 105]]
EDITED = [99, 100, 101, 7, 103, 104, 105]
EXPECTED = [greedy(prompt, 6) for prompt in PROMPTS]


def load_fields(model: str = "folder", threads: int | None = 3) -> dict[str, Any]:
    return {"model": model, "dtype": "float32", "threads": threads, "kv_memory": "1MiB"}


def ask(prompts: list[list[int]], shared_tokens: int = 0, new_tokens: int = 6) -> dict[str, Any]:
    return {"prompts": prompts, "new_tokens": new_tokens, "shared_tokens": shared_tokens}


def check_worker(worker: Any) -> None:
    """One prompt, many, a shared start and an edit all give the tokens of the rule."""
    done = worker.complete(ask(PROMPTS))
    assert done.token_ids == EXPECTED
    assert 0 < done.first_token_s <= done.total_s
    for prompt, tokens in zip(PROMPTS, EXPECTED, strict=True):
        assert worker.complete(ask([prompt])).token_ids == [tokens]
    for _ in range(2):
        worker.remember({"tokens": PROMPTS[2][:4]})
        for _ in range(3):
            done = worker.complete(ask([PROMPTS[2]], shared_tokens=4))
            assert done.token_ids == [EXPECTED[2]]
            assert done.cached_tokens in (None, 3, 4, 5, 6)
        worker.remember({"tokens": PROMPTS[2]})
        done = worker.complete(ask([EDITED], shared_tokens=3))
        assert done.token_ids == [greedy(EDITED, 6)]
        assert worker.complete(ask([PROMPTS[2]], new_tokens=1)).token_ids == [EXPECTED[2][:1]]
        assert worker.complete(ask(PROMPTS)).token_ids == EXPECTED
