from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from kvloom.decode.penalties import penalise
from kvloom.decode.state import DrawKey, SamplingState
from kvloom.params import SamplingParams
from tests.tolerances import TOLERANCE

VOCABULARY = 40
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=30)
CLOSE = {"rtol": 0, "atol": TOLERANCE["float32"]["logprobs"]}


def random_logits(rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return 4 * torch.randn(rows, VOCABULARY, generator=generator)


def state_after(
    output: list[int], prompt: tuple[int, ...] | list[int] = (), eos: int = 0, **fields: object
) -> SamplingState:
    state = SamplingState(SamplingParams(**fields), prompt, key=DrawKey(1), eos_token_ids={eos})
    for token in output:
        state.record(token)
    return state


@settings(deadline=None)
@given(TOKENS, TOKENS, st.floats(0.2, 4.0))
def test_repetition_penalty_equals_transformers(
    prompt: list[int], output: list[int], penalty: float
) -> None:
    logits = random_logits()
    state = state_after(output, prompt, repetition_penalty=penalty)
    seen = torch.tensor([prompt + output], dtype=torch.int64)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits)
    torch.testing.assert_close(penalise(logits[0], state)[None], expected, **CLOSE)


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100), min_size=1))
def test_logit_bias_equals_transformers(bias: dict[int, float]) -> None:
    logits = random_logits()
    library = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = library(torch.zeros(1, 1, dtype=torch.int64), logits)
    found = penalise(logits[0], state_after([], logit_bias=bias))[None]
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("generated", [0, 2, 3, 4])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_min_tokens_equals_transformers(generated: int, ignore_eos: bool) -> None:
    logits = random_logits()
    library = MinNewTokensLengthLogitsProcessor(0, 3, [5, 9], device="cpu")
    expected = library(torch.zeros(1, generated, dtype=torch.int64), logits)
    state = state_after(
        [1] * generated, eos=5, min_tokens=3, stop_token_ids=(9,), ignore_eos=ignore_eos
    )
    assert torch.equal(penalise(logits[0], state)[None], expected)


@settings(deadline=None)
@given(TOKENS, TOKENS, st.floats(-2, 2), st.floats(-2, 2))
def test_presence_and_frequency_count_the_output_only(
    prompt: list[int], output: list[int], presence: float, frequency: float
) -> None:
    """The formula of the OpenAI API reference: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    logits = random_logits()
    state = state_after(output, prompt, presence_penalty=presence, frequency_penalty=frequency)
    found = penalise(logits[0], state).tolist()
    for token, before in enumerate(logits[0].tolist()):
        count = output.count(token)
        expected = before - count * frequency - (count > 0) * presence
        assert math.isclose(found[token], expected, abs_tol=CLOSE["atol"])


def test_the_order_is_bias_then_repetition_then_frequency_and_the_mask_is_last() -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0]])
    state = state_after(
        [0],
        eos=1,
        logit_bias={0: 3.0, 1: 100.0},
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        min_tokens=5,
    )
    # Bias last would give 3.0, repetition last 1.75, and a bias behind the mask stays masked.
    assert penalise(logits[0], state).tolist() == [(1.0 + 3.0) / 2.0 - 0.5, -math.inf, 1.0]


@pytest.mark.parametrize("asks", [False, True])
def test_logits_are_copied_only_where_they_change(asks: bool) -> None:
    (row,) = random_logits()
    before = row.clone()
    fields = {"repetition_penalty": 3.0, "logit_bias": {4: -1.0}} if asks else {}
    found = penalise(row, state_after([1, 2], [3], **fields))
    assert torch.equal(row, before)
    assert (found is row) == (not asks)
    assert torch.equal(found, before) == (not asks)


def test_masked_logits_stay_masked() -> None:
    logits = torch.tensor([[-math.inf, 1.0]])
    state = state_after([0, 0], [0], repetition_penalty=0.5, frequency_penalty=-2.0)
    assert penalise(logits[0], state)[0] == -math.inf


def test_end_tokens_behind_the_vocabulary_are_no_error() -> None:
    state = state_after([], eos=VOCABULARY + 5, min_tokens=1)
    logits = random_logits()
    assert torch.equal(penalise(logits[0], state)[None], logits)
