"""A decoder as data: what it counts, and which matrices it names."""

from __future__ import annotations

import torch

from kvloom.ops.decoder import Decoder, DecoderLayer, Norm
from kvloom.ops.packing import PackedWeight, quantize
from kvloom.types import LayerSpec


def packed(outputs: int, inputs: int) -> PackedWeight:
    return quantize(torch.ones(outputs, inputs), "float32")


def layer(*, gated: bool) -> DecoderLayer:
    return DecoderLayer(
        spec=LayerSpec(index=0, heads=2, kv_heads=2, k_dim=4, v_dim=4, rope=None),
        q=packed(8, 8),
        k=packed(8, 8),
        v=packed(8, 8),
        output=packed(8, 8),
        gate=packed(16, 8) if gated else None,
        up=packed(16, 8),
        down=packed(8, 16),
        scale=0.5,
        activation="silu",
    )


def test_weights_are_named_and_a_missing_gate_is_left_out():
    names = ["q", "k", "v", "output", "gate", "up", "down"]
    assert [name for name, _ in layer(gated=True).weights()] == names
    names.remove("gate")
    assert [name for name, _ in layer(gated=False).weights()] == names


def test_a_tied_head_is_counted_once():
    embedding, inner = packed(10, 8), layer(gated=True)
    parts = sum(weight.nbytes for _, weight in inner.weights())
    tied = Decoder(layers=(inner,), embedding=embedding, head=embedding, final_norm=Norm())
    untied = Decoder(layers=(inner,), embedding=embedding, head=packed(10, 8), final_norm=Norm())
    assert tied.nbytes == parts + embedding.nbytes
    assert untied.nbytes == parts + 2 * embedding.nbytes
    assert (tied.hidden, tied.vocab_size) == (8, 10)
