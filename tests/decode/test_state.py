from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.decode.state import (
    DrawKey,
    SamplingState,
    TokenCounts,
    check_vocabulary,
    draw_keys,
)
from kvloom.errors import RequestError
from kvloom.params import SamplingParams

TOKENS = st.lists(st.integers(0, 60), max_size=100)


@settings(deadline=None)
@given(TOKENS, TOKENS)
def test_counts_equal_a_counter(prompt: list[int], output: list[int]) -> None:
    counts = TokenCounts(prompt)
    for token in output:
        counts.add(token)
    found = dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))
    expected = Counter(output)
    assert found == {token: expected[token] for token in {*prompt, *output}}


def test_counts_are_kept_only_where_a_penalty_asks() -> None:
    def counts(**fields: float) -> TokenCounts | None:
        return SamplingState(SamplingParams(**fields), [1, 2], key=DrawKey(0)).counts

    assert counts(temperature=0.5, top_p=0.5) is None
    assert counts(presence_penalty=0.1).ids.tolist() == []
    assert counts(frequency_penalty=-0.1).ids.tolist() == []
    assert counts(repetition_penalty=1.1).ids.tolist() == [1, 2]


def test_completions_share_the_seed_and_differ_by_number() -> None:
    keys = draw_keys(SamplingParams(n=3, seed=9))
    assert keys == (DrawKey(9, 0), DrawKey(9, 1), DrawKey(9, 2))
    unseeded = draw_keys(SamplingParams(n=2))
    assert unseeded[0].seed == unseeded[1].seed
    assert unseeded != draw_keys(SamplingParams(n=2))


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**64 - 1])
def test_every_allowed_seed_becomes_an_unsigned_number(seed: int) -> None:
    (key,) = draw_keys(SamplingParams(seed=seed))
    assert 0 <= key.seed < 2**64
    assert (key.seed - seed) % 2**64 == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {100: 1.0}}, "logit_bias"),
        ({"stop_token_ids": (3, 100)}, "stop_token_ids"),
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused(fields: dict, param: str) -> None:
    params = SamplingParams(**fields)
    check_vocabulary(params, 101)
    with pytest.raises(RequestError, match="100") as caught:
        check_vocabulary(params, 100)
    assert caught.value.param == param


def test_the_end_is_masked_until_min_tokens() -> None:
    params = SamplingParams(min_tokens=2, stop_token_ids=(7,))
    state = SamplingState(params, key=DrawKey(0), eos_token_ids={3})
    masked = []
    for token in range(4):
        masked.append(state.masks_end)
        state.record(token)
    assert masked == [True, True, False, False]
    assert state.end_ids.tolist() == [3, 7]
