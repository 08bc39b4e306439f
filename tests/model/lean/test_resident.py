"""Weights in large pages are the same weights, each moved once."""

from __future__ import annotations

import torch

from kvloom.model.lean.resident import LARGE_PAGE, make_resident
from kvloom.ops.decoder import Decoder, DecoderLayer, Norm
from kvloom.ops.native.memory import ALIGNMENT
from kvloom.ops.packing import PackedWeight, quantize
from kvloom.types import LayerSpec, WeightFormat


def matrix(outputs: int, inputs: int, format: WeightFormat) -> PackedWeight:
    return quantize(torch.randn(outputs, inputs), format)


def small_decoder() -> Decoder:
    spec = LayerSpec(index=0, heads=2, kv_heads=1, k_dim=16, v_dim=16, rope=None)
    layer = DecoderLayer(
        spec=spec,
        q=matrix(32, 32, "int4"),
        k=matrix(16, 32, "int8"),
        v=matrix(16, 32, "bfloat16"),
        output=matrix(32, 32, "float32").with_bias(torch.randn(32)),
        gate=None,
        up=matrix(64, 32, "int4"),
        down=matrix(32, 64, "int4"),
        scale=0.25,
        activation="silu",
    )
    embedding = matrix(50, 32, "int8")
    return Decoder(layers=(layer,), embedding=embedding, head=embedding, final_norm=Norm())


def test_codes_are_equal_aligned_and_close_together() -> None:
    before = small_decoder()
    after = make_resident(before)
    pairs = zip(before.layers[0].weights(), after.layers[0].weights(), strict=True)
    for (name, old), (same_name, new) in pairs:
        assert name == same_name
        assert torch.equal(old.codes, new.codes)
        assert old.codes.data_ptr() != new.codes.data_ptr()
        assert new.codes.data_ptr() % ALIGNMENT == 0
        for kept, copied in ((old.scales, new.scales), (old.bias, new.bias)):
            assert (kept is None) == (copied is None)
            if kept is not None and copied is not None:
                assert torch.equal(kept, copied)
                assert kept.data_ptr() != copied.data_ptr()
    assert after.layers[0].q.codes.data_ptr() % LARGE_PAGE == 0
    assert after.nbytes == before.nbytes


def test_a_tied_head_is_moved_once() -> None:
    after = make_resident(small_decoder())
    assert after.embedding.codes.data_ptr() == after.head.codes.data_ptr()
