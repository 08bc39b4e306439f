"""Layers in groups, and rotary tables in few words."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvloom.cli.layers import describe_layers, ranges, rope_base, rope_words
from kvloom.types import LayerSpec, Rope


def layer(index: int, **changes: object) -> LayerSpec:
    settings = {"heads": 4, "kv_heads": 2, "k_dim": 8, "v_dim": 8, "rope": None}
    return LayerSpec(index=index, **{**settings, **changes})  # type: ignore[arg-type]


@given(st.sets(st.integers(0, 60), min_size=1))
def test_ranges_can_be_read_back(numbers: set[int]) -> None:
    read: list[int] = []
    for part in ranges(sorted(numbers)).split(", "):
        first, _, last = part.partition("-")
        read += range(int(first), int(last or first) + 1)
    assert read == sorted(numbers)


def test_ranges_are_short() -> None:
    assert ranges([0, 1, 2, 4, 6, 7]) == "0-2, 4, 6-7"


def test_equal_layers_share_an_entry_and_none_is_lost() -> None:
    layers = [layer(i, window=64 if i % 3 else None) for i in range(7)]
    kinds = describe_layers(layers)
    assert [(kind["index"], kind["window"]) for kind in kinds] == [
        ([0, 3, 6], None),
        ([1, 2, 4, 5], 64),
    ]


@given(st.floats(10, 1e7), st.sampled_from([4, 16, 64, 128]))
def test_the_base_of_a_table_of_transformers_is_found(theta: float, dim: int) -> None:
    config = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        head_dim=dim,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    table = LlamaRotaryEmbedding(config).inv_freq
    base = rope_base([float(value) for value in table])
    assert base is not None
    assert abs(base - theta) <= 1e-3 * theta


def test_a_stretched_table_has_no_base() -> None:
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=parameters
    )
    table, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    rope = Rope(tuple(map(float, table)), 1.0, "half", 0)
    assert rope_base(rope.inv_freq) is None
    assert "own table" in rope_words(rope)


def test_words_name_layout_dims_and_scaling() -> None:
    table = tuple(float(10_000 ** (-i / 4)) for i in range(4))
    words = rope_words(Rope(table, 1.25, "interleaved", 8))
    assert words == "interleaved, dims 8-15, base 10,000, scaling 1.25"
    assert rope_words(None) == "none"
    assert rope_base([1.0]) is None
