"""The plain operations on rows equal torch's own modules, and rounding keeps to its bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.ops.decoder import Norm
from kvloom.ops.packing import GROUP, quantize, unpack
from kvloom.ops.rows import (
    LEAST,
    as_operand,
    dequantize_rows,
    embed,
    gate,
    linear,
    normalize,
    quantize_rows,
)
from tests.ops.matrices import FORMATS, KINDS, rows_of_kinds, seeds, values
from tests.tolerances import RELATIVE

row_kinds = st.lists(st.sampled_from(KINDS), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@given(heads=st.integers(1, 3), width=st.integers(2, 40), seed=seeds)
def test_norms_equal_those_of_torch(kind, heads, width, seed):
    weight, bias = values("plain", 2, width, seed)
    x = values("plain", 3, heads * width, seed + 1)
    parts = x.reshape(3, heads, width)
    if kind == "layer":
        expected = torch.nn.functional.layer_norm(parts, (width,), weight, bias, 1e-5)
        out = normalize(Norm("layer", width, 1e-5, weight, bias), x)
    else:
        expected = torch.nn.functional.rms_norm(parts, (width,), weight, 1e-5)
        out = normalize(Norm("rms", width, 1e-5, weight), x)
    torch.testing.assert_close(out, expected.reshape(x.shape), rtol=1e-5, atol=1e-5)


def test_no_norm_changes_nothing():
    x = values("plain", 2, 8, 0)
    assert normalize(Norm(), x) is x


@given(kinds=row_kinds, groups=st.integers(1, 3), seed=seeds)
def test_rows_are_rounded_by_half_a_step(kinds, groups, seed):
    x = rows_of_kinds(kinds, groups * GROUP, seed)
    rows = quantize_rows(x)
    grouped = x.reshape(len(x), -1, GROUP)
    most = grouped.abs().amax(-1, keepdim=True)
    error = (dequantize_rows(rows).reshape(grouped.shape) - grouped).abs()
    assert (error <= (most / 254 * (1 + 1e-4)).clamp(min=LEAST)).all()
    assert torch.equal(rows.counts, rows.codes.int().reshape(grouped.shape).sum(-1).int())
    assert rows.codes.min() >= -127
    assert rows.scales.isfinite().all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_broken_rows_stay_broken(broken):
    x = values("plain", 1, 64, 0)
    x[0, 3] = broken
    assert not dequantize_rows(quantize_rows(x))[0, :GROUP].isfinite().any()
    assert dequantize_rows(quantize_rows(x))[0, GROUP:].isfinite().all()


@pytest.mark.parametrize("format", FORMATS)
@given(seed=seeds)
def test_products_are_those_of_what_was_rounded(format, seed):
    weight = quantize(values("plain", 21, 64, seed), format).with_bias(
        values("plain", 1, 21, seed + 1)[0]
    )
    x = values("plain", 3, 64, seed + 2)
    operand, matrix = as_operand(x, weight), unpack(weight)
    out = linear(weight, x)
    expected = operand.double() @ matrix.double().T + weight.bias.double()
    bound = operand.double().abs() @ matrix.double().abs().T + weight.bias.double().abs()
    assert ((out - expected).abs() <= RELATIVE["product"] * bound).all()
    assert torch.equal(out, linear(weight, x, unpacked=matrix))


def test_rows_meet_a_matrix_in_its_format():
    x = values("plain", 2, 64, 0)
    operands = {f: as_operand(x, quantize(torch.ones(1, 64), f)) for f in FORMATS}
    assert torch.equal(operands["float32"], x)
    assert torch.equal(operands["bfloat16"], x.to(torch.bfloat16).float())
    assert torch.equal(operands["int8"], dequantize_rows(quantize_rows(x)))
    assert torch.equal(operands["int4"], operands["int8"])


def test_gates_multiply_and_ungated_rows_are_activated():
    x, up = values("plain", 2, 5, 0), values("plain", 2, 5, 1)
    assert torch.equal(gate("silu", x, up), torch.nn.functional.silu(x) * up)
    assert torch.equal(gate("gelu", None, up), torch.nn.functional.gelu(up))
    tanh = torch.nn.functional.gelu(x, approximate="tanh")
    assert torch.equal(gate("gelu_tanh", x, up), tanh * up)


@pytest.mark.parametrize("format", FORMATS)
def test_embedded_rows_are_scaled_rows_of_the_matrix(format):
    weight = quantize(values("plain", 21, 64, 0), format)
    tokens = torch.tensor([20, 0, 0])
    assert torch.equal(embed(weight, tokens, 3.0), unpack(weight)[tokens] * 3.0)
