from __future__ import annotations

import math

import pytest
import torch

from kvloom.decode.draw import draw
from kvloom.decode.logprobs import token_logprobs
from kvloom.decode.state import DrawKey, SamplingState
from kvloom.errors import KvloomError
from kvloom.params import SamplingParams

from .texts import LibraryText


def random_logits(rows: int) -> torch.Tensor:
    return 3 * torch.randn(rows, 60, generator=torch.Generator().manual_seed(8))


def state_of(eos: int = 0, **fields: object) -> SamplingState:
    return SamplingState(
        SamplingParams(**fields), [1, 2], key=DrawKey(4), eos_token_ids=frozenset({eos})
    )


def test_reported_probabilities_come_before_bias_and_temperature(metaspace: LibraryText) -> None:
    logits = random_logits(1)
    unlikely = int(logits.argmin())
    state = state_of(temperature=0.3, logit_bias={unlikely: 100.0}, logprobs=2)
    drawn = draw(logits[0], state, metaspace)
    assert drawn.token_id == unlikely
    assert drawn.logprobs[unlikely].rank == 60
    assert drawn.logprobs == token_logprobs(logits, [unlikely], [2], metaspace)[0]


def test_only_rows_that_ask_get_probabilities(metaspace: LibraryText) -> None:
    states = [state_of(), state_of(logprobs=0), state_of(logprobs=3), state_of(temperature=0.0)]
    rows = zip(random_logits(4), states, strict=True)
    draws = [draw(row, state, metaspace) for row, state in rows]
    chosen = [drawn.token_id for drawn in draws]
    assert [None if found.logprobs is None else len(found.logprobs) for found in draws] in (
        [None, 1, 3, None],
        [None, 1, 4, None],
    )
    assert list(draws[1].logprobs) == [chosen[1]]
    assert next(iter(draws[2].logprobs)) == chosen[2]


def test_broken_logits_are_an_error(metaspace: LibraryText) -> None:
    with_nan = state_of(logprobs=1)
    all_masked = state_of(temperature=0.0, eos=5, min_tokens=1)
    # The broken logit is masked before the draw, but its row has no probabilities.
    masked = state_of(temperature=0.0, eos=6, min_tokens=1, logprobs=1)
    logits = random_logits(3)
    logits[0, 3] = math.nan
    logits[1] = -math.inf
    logits[1, 5] = 1.0
    logits[2, 6] = math.nan
    for row, state in zip(logits, (with_nan, all_masked, masked), strict=True):
        with pytest.raises(KvloomError) as failed:
            draw(row, state, metaspace)
        assert ("min_tokens" in str(failed.value)) == (state is all_masked)


def test_drawing_changes_neither_logits_nor_states(metaspace: LibraryText) -> None:
    logits = random_logits(1)
    before = logits.clone()
    state = state_of(repetition_penalty=2.0, logit_bias={3: 1.0}, logprobs=5)
    again = [draw(logits[0], state, metaspace) for _ in range(2)]
    assert again[0] == again[1]
    assert torch.equal(logits, before)
    assert state.step == 0
