"""Masks are read as causal or windowed, or not at all."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_overlay,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from kvloom.model.masks import FARTHEST_POSITION, MaskRecorder, Reach, reach_of

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def chunked(size: int) -> Mask:
    mask: Mask = and_masks(chunked_overlay(size, torch.zeros(1, dtype=int)), causal_mask_function)
    return mask


@given(st.integers(1, 5000))
def test_causal_mask_reaches_everywhere(limit: int) -> None:
    assert reach_of(causal_mask_function, limit) == Reach(None, limit)


@given(st.integers(1, 600), st.integers(1, 5000))
def test_window_is_recovered(window: int, limit: int) -> None:
    expected = window if window < limit else None
    assert reach_of(sliding_window_causal_mask_function(window), limit) == Reach(expected, limit)


@given(st.integers(2, 600), st.integers(1, 5000))
def test_chunk_is_causal_up_to_its_end_and_no_window(size: int, limit: int) -> None:
    assert reach_of(chunked(size), limit) == Reach(None, min(size, limit))


def test_chunk_is_no_window_where_the_limit_is_a_multiple() -> None:
    for multiple in range(2, 9):
        assert reach_of(chunked(64), 64 * multiple) == Reach(None, 64)


@given(st.integers(1, 20), st.integers(24, 400))
def test_window_with_a_sink_at_the_start_is_no_window(sinks: int, limit: int) -> None:
    def first_ones(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < sinks

    streaming = and_masks(or_masks(sliding_window_overlay(2), first_ones), causal_mask_function)
    assert reach_of(streaming, limit) == Reach(None, sinks + 2)


def test_masks_of_other_kinds_are_not_explained() -> None:
    def everywhere(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key >= 0

    def strictly_before(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key < query

    for function in (everywhere, strictly_before):
        assert reach_of(function, 512) is None


def test_packed_documents_are_no_window() -> None:
    packed = and_masks(
        packed_sequence_mask_function(torch.tensor([[0] * 40 + [1] * 60])), causal_mask_function
    )
    reach = reach_of(packed, 98)
    assert reach is not None
    assert (reach.window, reach.valid_until) == (None, 40)


def test_far_positions_are_capped() -> None:
    reach = reach_of(sliding_window_causal_mask_function(4096), 10 * FARTHEST_POSITION)
    assert reach == Reach(4096, FARTHEST_POSITION)


@pytest.fixture
def recorder() -> MaskRecorder:
    return MaskRecorder("kvloom_test_masks")


def recorded(function: Mask, kv_length: int = 7) -> Tensor:
    builder = AttentionMaskInterface()["kvloom_test_masks"]
    mask: Tensor = builder(
        batch_size=1, q_length=5, kv_length=kv_length, mask_function=function, dtype=torch.float32
    )
    return mask


def test_recorder_knows_its_masks_again(recorder: MaskRecorder) -> None:
    window = sliding_window_causal_mask_function(3)
    functions = [causal_mask_function, window] * 60
    masks = [recorded(function) for function in functions]
    for mask, function in zip(masks, functions, strict=True):
        assert mask.shape == (1, 1, 5, 7)
        for seen in (mask, mask[:, :, :, :4], mask.expand(2, 4, 5, 7), mask.to(torch.bfloat16)):
            assert recorder.function_of(seen) is function
    recorder.remove()


def test_recorder_disowns_what_a_model_made(recorder: MaskRecorder) -> None:
    mask = recorded(causal_mask_function)
    changed = mask.clone()
    changed[..., 0] = torch.finfo(torch.float32).min
    own = [
        changed,
        mask + 1.0 * torch.arange(7),
        torch.zeros(1, 1, 5, 7),
        torch.ones(1, 1, 5, 7),
        torch.ones(1, 1, 5, 7, dtype=torch.bool),
        torch.full((1, 1, 5, 7), torch.finfo(torch.float32).min),
        torch.empty(1, 1, 0, 0),
        mask - 1,
    ]
    assert [recorder.function_of(one) for one in own] == [None] * len(own)
    recorder.remove()
    recorder.remove()
    assert "kvloom_test_masks" not in AttentionMaskInterface()
