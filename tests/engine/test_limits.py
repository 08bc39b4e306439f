from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from kvloom.engine.limits import Limits
from kvloom.errors import RequestError


def limits(model: int = 100, memory: int = 100, user: int | None = None) -> Limits:
    return Limits(vocab_size=10, model_positions=model, memory_tokens=memory, user_tokens=user)


@pytest.mark.parametrize("sizes", [*itertools.permutations([7, 8, 9])])
def test_the_smallest_limit_counts_and_all_are_named(sizes: tuple[int, int, int]) -> None:
    bounds = limits(*sizes)
    assert bounds.max_tokens == 7
    assert bounds.check([1] * 7, generates=False) == [1] * 7
    assert bounds.check([1] * 6, generates=True) == [1] * 6
    for length, generates in ((8, False), (7, True)):
        with pytest.raises(RequestError) as refused:
            bounds.check([1] * length, generates=generates)
        for size in sizes:
            assert str(size) in str(refused.value)
        assert refused.value.param == "prompt"


@pytest.mark.parametrize(
    "prompt", [[], [10], [-1], [1.0], [True], ["a"], [None], [np.float32(1)], [1, [2]], "ab"]
)
def test_what_is_no_token_of_the_model_is_refused(prompt: Any) -> None:
    with pytest.raises(RequestError) as refused:
        limits().check(prompt, generates=True)
    assert refused.value.param == "prompt"


def test_the_caller_s_list_is_not_kept() -> None:
    prompt = [1, 2]
    checked = limits().check(prompt, generates=True)
    prompt.append(3)
    assert checked == [1, 2]
