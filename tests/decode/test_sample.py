from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kvloom.decode.sample import FIRST_RANKS, sample, uniform_number
from kvloom.decode.state import DrawKey, SamplingState
from kvloom.errors import KvloomError
from kvloom.params import SamplingParams
from tests.tolerances import TOLERANCE

CLOSE = TOLERANCE["float32"]["probabilities"]


def random_logits(rows: int, size: int, seed: int = 5, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(rows, size, generator=generator)


def state_at(
    step: int = 0, *, seed: int = 0, completion: int = 0, **fields: object
) -> SamplingState:
    state = SamplingState(SamplingParams(**fields), key=DrawKey(seed, completion))
    state.step = step
    return state


def sample_rows(logits: torch.Tensor, states: list[SamplingState]) -> list[int]:
    return [sample(row, state) for row, state in zip(logits, states, strict=True)]


def warped_probabilities(row: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """What transformers makes of a row, its warpers in vLLM's order."""
    scores = TemperatureLogitsWarper(params.temperature)(None, row[None].double())
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return scores.softmax(dim=-1)[0].numpy()


def assert_inverse_cdf(token: int, probabilities: np.ndarray, uniform: float) -> None:
    """The token's stretch of the distribution, in the order of ids, holds the number."""
    assert probabilities[token] > 0
    end = np.cumsum(probabilities)[token]
    assert end - probabilities[token] - CLOSE <= uniform <= end + CLOSE


@settings(max_examples=150, deadline=None)
@given(
    temperature=st.floats(0.05, 5.0),
    top_k=st.sampled_from([0, 1, 2, 7, 40, 999, 1000, 5000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)
def test_draws_are_the_inverse_cdf_of_what_transformers_keeps(
    temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    row = random_logits(1, 1000, spread=1.0 + seed % 4)
    state = state_at(3, seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    (token,) = sample_rows(row, [state])
    uniform = uniform_number(state.key, 3)
    assert_inverse_cdf(token, warped_probabilities(row[0], state.params), uniform)


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.9999])
def test_a_flat_distribution_needs_more_ranks_than_are_tried_first(top_p: float) -> None:
    row = random_logits(1, 12 * FIRST_RANKS, spread=0.3)
    for step in range(10):
        state = state_at(step, top_p=top_p)
        (token,) = sample_rows(row, [state])
        probabilities = warped_probabilities(row[0], state.params)
        assert np.count_nonzero(probabilities) > FIRST_RANKS
        assert_inverse_cdf(token, probabilities, uniform_number(state.key, step))


@pytest.mark.parametrize("size", [4, 8 * FIRST_RANKS])
def test_top_p_keeps_no_more_than_its_mass_and_the_lower_of_equal_tokens(size: int) -> None:
    row = torch.zeros(1, size)
    drawn = {sample_rows(row, [state_at(step, top_p=0.5)])[0] for step in range(400)}
    assert max(drawn) < size // 2
    assert len(drawn) > size // 16


def test_draws_follow_the_distribution() -> None:
    logits = random_logits(1, 8, spread=1.0)
    draws = 4000
    states = [state_at(step, temperature=0.8) for step in range(draws)]
    counts = np.bincount(sample_rows(logits.expand(draws, -1), states), minlength=8)
    expected = warped_probabilities(logits[0], states[0].params) * draws
    statistic = float(((counts - expected) ** 2 / expected).sum())
    # The 1 - 1e-6 quantile of chi-square with 7 degrees of freedom.
    assert statistic < 40.5


def test_the_uniform_number_is_numpys_philox() -> None:
    for seed, completion, step in [(0, 0, 0), (2**64 - 1, 127, 10**6), (17, 3, 4)]:
        bits = np.random.Philox(
            key=np.array([seed, completion], dtype=np.uint64),
            counter=np.array([step, 0, 0, 0], dtype=np.uint64),
        )
        assert uniform_number(DrawKey(seed, completion), step) == np.random.Generator(bits).random()


def test_seed_completion_and_step_each_change_the_draw() -> None:
    numbers = {
        uniform_number(DrawKey(seed, completion), step)
        for seed in range(6)
        for completion in range(6)
        for step in range(6)
    }
    assert len(numbers) == 6**3
    assert all(0 <= number < 1 for number in numbers)


PARAMETERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-6, 0.7, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 5, 50]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "seed": st.integers(0, 5),
        "completion": st.integers(0, 2),
        "step": st.integers(0, 3),
    }
)


@settings(max_examples=60, deadline=None)
@given(PARAMETERS)
def test_a_draw_is_made_again_the_same_and_changes_nothing(fields: dict) -> None:
    (row,) = random_logits(1, 700)
    before, state = row.clone(), state_at(**fields)
    assert sample(row, state) == sample(row.clone(), state_at(**fields))
    assert torch.equal(row, before)
    assert state.step == fields["step"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.booleans())
def test_top_k_of_one_is_greedy(seed: int, temperature: float, ties: bool) -> None:
    logits = random_logits(3, 50, seed=seed)
    logits = logits.round() if ties else logits
    greedy = sample_rows(logits, [state_at(temperature=0.0)] * 3)
    assert greedy == [row.index(max(row)) for row in logits.tolist()]
    assert (
        sample_rows(logits, [state_at(temperature=temperature, top_k=1, seed=seed)] * 3) == greedy
    )
    tiny_share = [state_at(temperature=temperature, top_p=1e-300, seed=seed)] * 3
    assert sample_rows(logits, tiny_share) == greedy


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300, 5e-324])
@pytest.mark.parametrize("scale", [1.0, 1e30])
@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_tiny_temperatures_are_greedy(
    temperature: float, scale: float, truncation: dict[str, float]
) -> None:
    logits = random_logits(20, 300) * scale
    states = [state_at(seed=row, temperature=temperature, **truncation) for row in range(20)]
    assert sample_rows(logits, states) == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("top_k", [2, 3, 5, 6])
def test_equal_logits_rank_by_token_id(top_k: int) -> None:
    row = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0, 0.0, 1.0]])
    ranked = sorted(range(8), key=lambda token: (-row[0, token].item(), token))
    for truncation in ({"top_k": top_k}, {"top_p": None}):
        if truncation == {"top_p": None}:
            weights = row[0].double().softmax(0)[ranked].cumsum(0)
            truncation["top_p"] = float(weights[top_k - 1]) - 1e-4
        drawn = {sample_rows(row, [state_at(step, **truncation)])[0] for step in range(300)}
        assert drawn == set(ranked[:top_k])


def test_masked_tokens_are_never_drawn() -> None:
    logits = random_logits(1, 30)
    allowed = [3, 17, 29]
    masked = torch.full_like(logits, -math.inf)
    masked[0, allowed] = logits[0, allowed]
    for fields in ({}, {"top_k": 10}, {"top_p": 0.999999}, {"min_p": 1e-9}):
        states = [state_at(step, temperature=50.0, **fields) for step in range(200)]
        assert set(sample_rows(masked.expand(200, -1), states)) == set(allowed)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_usable_logits_says_so(broken: float, temperature: float) -> None:
    (row,) = random_logits(1, 20)
    if broken == -math.inf:
        row[:] = broken
    else:
        row[7] = broken
    with pytest.raises(KvloomError) as failed:
        sample(row, state_at(temperature=temperature))
    assert ("every logit is minus infinity" in str(failed.value)) == (broken == -math.inf)


def test_half_precision_logits_are_sampled_in_single_precision() -> None:
    logits = random_logits(1, 200).bfloat16()
    states = [state_at(step) for step in range(50)]
    expected = [sample_rows(logits.float(), [state])[0] for state in states]
    assert sample_rows(logits.expand(50, -1), states) == expected
