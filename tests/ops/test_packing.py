"""Laws of packed matrices: packing moves numbers, quantising rounds them within a bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.ops.packing import (
    GROUP,
    PackedWeight,
    can_be_coded,
    codes_bytes,
    pack_int4,
    pack_int8,
    pack_plain,
    quantize,
    quantize_int4,
    quantize_int8,
    unpack,
)
from tests.ops.matrices import FORMATS, KINDS, seeds, values, weights

HALF = 2.0**-11
"""Relative rounding error of fp16, above its smallest normal number."""
LEAST_HALF = 2.0**-25
"""Absolute rounding error of fp16, below its smallest normal number."""

outputs = st.integers(1, 130)
groups = st.integers(1, 4)
kinds = st.sampled_from(KINDS)


def by_group(matrix: Tensor) -> Tensor:
    return matrix.reshape(len(matrix), -1, GROUP)


def codes_and_scales(n: int, g: int, low: int, high: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(low, high, (n, g * GROUP), generator=generator)
    return codes, *torch.randn(2, n, g, generator=generator).to(torch.float16).float()


@given(n=outputs, g=groups, seed=seeds)
def test_int4_codes_come_back_exactly(n, g, seed):
    codes, scale, minimum = codes_and_scales(n, g, 0, 16, seed)
    packed = pack_int4(codes.to(torch.uint8), scale, minimum)
    expected = by_group(codes.float()) * scale[..., None] + minimum[..., None]
    assert torch.equal(unpack(packed), expected.reshape(codes.shape))


@given(n=outputs, g=groups, seed=seeds)
def test_int8_codes_come_back_exactly(n, g, seed):
    codes, scale, _ = codes_and_scales(n, g, -128, 128, seed)
    packed = pack_int8(codes.to(torch.int8), scale)
    expected = by_group(codes.float()) * scale[..., None]
    assert torch.equal(unpack(packed), expected.reshape(codes.shape))


@given(n=outputs, k=st.integers(1, 70), kind=kinds, seed=seeds)
def test_plain_formats_come_back_as_torch_rounds_them(n, k, kind, seed):
    matrix = values(kind, n, k, seed)
    whole, rounded = pack_plain(matrix, "float32"), pack_plain(matrix, "bfloat16")
    assert torch.equal(unpack(whole).view(torch.int32), matrix.view(torch.int32)), "-0 included"
    expected = matrix.to(torch.bfloat16).float()
    assert torch.equal(unpack(rounded).view(torch.int32), expected.view(torch.int32))


@given(n=outputs, g=groups, kind=kinds, seed=seeds)
def test_int8_errs_by_half_a_step(n, g, kind, seed):
    matrix = values(kind, n, g * GROUP, seed, huge=6e4)
    most = by_group(matrix).abs().amax(-1, keepdim=True)
    bound = most / 254 + most * 2 * HALF + 127 * LEAST_HALF
    error = by_group(unpack(quantize_int8(matrix)) - matrix).abs()
    assert (error <= bound).all()


@given(n=outputs, g=groups, kind=kinds, seed=seeds)
def test_int4_is_no_worse_than_half_a_step_of_the_whole_range(n, g, kind, seed):
    matrix = values(kind, n, g * GROUP, seed, huge=6e4)
    grouped = by_group(matrix)
    width, most = grouped.amax(-1) - grouped.amin(-1), grouped.abs().amax(-1)
    bound = width / 30 + 2 * HALF * (width + most) + 32 * LEAST_HALF
    error = by_group(unpack(quantize_int4(matrix)) - matrix).square().mean(-1).sqrt()
    assert (error <= bound).all()


@given(n=outputs, g=groups, seed=seeds)
def test_what_was_quantised_is_quantised_to_itself(n, g, seed):
    once = unpack(quantize_int8(values("plain", n, g * GROUP, seed)))
    again = unpack(quantize_int8(once))
    step = by_group(once).abs().amax(-1, keepdim=True) * 2 * HALF
    assert (by_group(again - once).abs() <= step).all()


@pytest.mark.parametrize("kind", ["zeros", "negative zero"])
@pytest.mark.parametrize("format", FORMATS)
def test_zeros_stay_zeros(format, kind):
    assert (unpack(quantize(values(kind, 3, 64, 0), format)) == 0).all()


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
def test_sizes_are_those_that_are_stated(format, data):
    packed = data.draw(weights(format))
    assert packed.codes.dtype == torch.uint8
    assert packed.codes.is_contiguous()
    assert packed.codes.numel() == codes_bytes(packed.format, packed.outputs, packed.inputs)
    parts = [part for part in (packed.codes, packed.scales, packed.bias) if part is not None]
    assert packed.nbytes == sum(part.numel() * part.element_size() for part in parts)
    assert unpack(packed).shape == (packed.outputs, packed.inputs)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_what_cannot_be_coded_is_kept_as_it_is(format):
    assert not can_be_coded(48)
    for matrix in (
        values("plain", 5, 48, 0),
        values("huge", 5, 64, 0),
        values("one huge", 5, 64, 0),
        torch.full((5, 64), torch.nan),
    ):
        for stored in (matrix, matrix.to(torch.bfloat16), matrix.to(torch.bfloat16).float()):
            packed = quantize(stored, format)
            whole = stored is matrix or bool(stored.isnan().any())
            assert packed.format == ("float32" if whole else "bfloat16")
            torch.testing.assert_close(
                unpack(packed), stored.float(), rtol=0, atol=0, equal_nan=True
            )


def test_a_bias_is_kept_in_fp32():
    packed = pack_plain(torch.ones(3, 2), "float32")
    bias = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with_bias = packed.with_bias(bias)
    assert isinstance(with_bias, PackedWeight)
    assert with_bias.bias is not None
    assert with_bias.bias.dtype == torch.float32
    assert not with_bias.bias.requires_grad
    assert with_bias.with_bias(None).bias is None
