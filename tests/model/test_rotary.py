"""Rotary tables are explained as frequencies, layouts and lengths."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn
from transformers import CohereConfig, GlmConfig, GptOssConfig, LlamaConfig
from transformers.models.cohere.modeling_cohere import CohereRotaryEmbedding
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as turn_interleaved
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as turn_halves

from kvloom.model.hooks import RotarySwap
from kvloom.model.rotary import constant_until, explain_tables, places, table_at
from kvloom.types import Rope
from tests.model.families_dense import DYNAMIC, LLAMA3, LONGROPE, YARN
from tests.oracles import embedded
from tests.tolerances import TOLERANCE

LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def llama_rotary(rope: dict[str, Any], positions: int = 512, head_dim: int = 16) -> nn.Module:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=positions,
        rope_parameters=copy.deepcopy(rope),
    )
    return LlamaRotaryEmbedding(config)


def watched(module: nn.Module, calls: int = 5) -> RotarySwap:
    """Return a swap that saw the module of a model work once."""
    model = nn.ModuleDict({"rotary_emb": module})
    swap = RotarySwap(model)
    swap.watch()
    module(torch.zeros(1, calls, 1), torch.arange(calls)[None])
    swap.restore()
    return swap


thetas = st.floats(1e2, 1e7)


@pytest.mark.parametrize("kind", [PLAIN, LINEAR, LLAMA3, YARN, LONGROPE, DYNAMIC])
def test_tables_of_every_kind_are_explained_at_any_theta(kind: dict[str, Any]) -> None:
    @given(thetas, st.integers(0, 60))
    def law(theta: float, position: int) -> None:
        module = llama_rotary({**kind, "rope_theta": theta})
        ropes = explain_tables(watched(module).modules, 64)
        assert {rope.layout for rope in ropes} == {"half", "interleaved"}
        half = next(rope for rope in ropes if rope.layout == "half")
        x = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(position))
        cos, sin = module(x, torch.tensor([[position]]))
        expected = turn_halves(x, x, cos, sin)[0]
        found = embedded(x.numpy(), position, half)
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-4, rtol=0)

    law()


def test_interleaved_and_partial_tables_are_explained() -> None:
    glm = GlmRotaryEmbedding(
        GlmConfig(hidden_size=64, num_attention_heads=4, head_dim=16, num_key_value_heads=2)
    )
    rope = next(r for r in explain_tables(watched(glm).modules, 64) if r.layout == "interleaved")
    assert rope.num_dims == 8
    x = torch.randn(1, 1, 1, 16)
    cos, sin = glm(x, torch.tensor([[29]]))
    expected = turn_interleaved(x, x, cos, sin)[0].numpy()
    tolerance = 10 * TOLERANCE["float32"]["rotation"]
    np.testing.assert_allclose(embedded(x.numpy(), 29, rope), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "module",
    [
        CohereRotaryEmbedding(CohereConfig(hidden_size=64, num_attention_heads=4)),
        GptOssRotaryEmbedding(GptOssConfig(hidden_size=64, num_attention_heads=4, head_dim=16)),
    ],
    ids=["repeated", "half width"],
)
def test_tables_of_any_width_are_explained(module: nn.Module) -> None:
    ropes = explain_tables(watched(module).modules, 64)
    assert {rope.num_dims for rope in ropes} == {2 * module.inv_freq.numel()}
    frequencies = {tuple(abs(f) for f in rope.inv_freq) for rope in ropes}
    assert frequencies == {tuple(module.inv_freq.tolist())}


def test_both_directions_are_candidates() -> None:
    ropes = explain_tables(watched(llama_rotary(PLAIN)).modules, 64)
    turns = {rope.inv_freq for rope in ropes}
    assert {tuple(-f for f in turn) for turn in turns} == turns


def test_yarn_scales_its_table() -> None:
    module = llama_rotary(YARN)
    ropes = explain_tables(watched(module).modules, 64)
    assert module.attention_scaling != 1
    for rope in ropes:
        assert rope.scaling == pytest.approx(module.attention_scaling)


def test_table_that_its_frequencies_do_not_give_is_unexplained() -> None:
    module = llama_rotary(PLAIN)
    swap = watched(module)
    module.inv_freq.mul_(1.01)
    assert explain_tables(swap.modules, 64), "the module reads its buffer"
    own = module.forward
    (rotary,) = swap.modules
    rotary.forward = lambda x, position_ids: own(x, position_ids + 1)
    assert explain_tables(swap.modules, 64) == []


@given(st.integers(5, 300), st.sampled_from(["longrope", "dynamic"]), st.integers(5, 600))
def test_length_dependent_tables_end_exactly_at_the_switch(
    switch: int, kind: str, limit: int
) -> None:
    if kind == "longrope":
        module = llama_rotary({**LONGROPE, "original_max_position_embeddings": switch})
    else:
        module = llama_rotary(DYNAMIC, positions=switch)
    swap = watched(module, calls=4)
    before = module.inv_freq.clone()
    assert constant_until(swap.modules, limit) == min(switch, limit)
    torch.testing.assert_close(module.inv_freq, before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [PLAIN, LINEAR, LLAMA3, YARN])
def test_other_tables_never_change(kind: dict[str, Any]) -> None:
    assert constant_until(watched(llama_rotary(kind)).modules, 10**6) == 10**6
    assert constant_until([], 77) == 77


def test_table_at_gives_the_modules_own_numbers() -> None:
    module = llama_rotary(LLAMA3)
    (rotary,) = watched(module).modules
    cos, sin = table_at(rotary, (), [3, 0, 11])
    own_cos, own_sin = module(torch.zeros(1), torch.tensor([[3, 0, 11]]))
    torch.testing.assert_close((cos, sin), (own_cos[0], own_sin[0]))


@given(st.integers(1, 40), st.integers(1, 64))
def test_places_fit_the_head(pairs: int, k_dim: int) -> None:
    rope = Rope(tuple(1.0 / (n + 1) for n in range(pairs)), 1.0, "half", 0)
    found = places([rope], k_dim)
    assert {place.first_dim for place in found} == (
        {0, k_dim - 2 * pairs} if 2 * pairs <= k_dim else set()
    )
    assert len(set(found)) == len(found)
