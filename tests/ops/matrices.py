"""Matrices and rows that tests of packed products draw: plain ones, and those that break things.

Knows: which values are awkward: zeros, denormals, huge ones, all equal, one above all others.
Does not know: any test.
"""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvloom.ops.packing import GROUP, PackedWeight, can_be_coded, quantize, unpack
from kvloom.ops.rows import CodedRows, dequantize_rows
from kvloom.types import WeightFormat

FORMATS: tuple[WeightFormat, ...] = ("float32", "bfloat16", "int8", "int4")
KINDS = (
    *("plain", "plain", "zeros", "negative zero", "denormal", "tiny", "huge", "one huge"),
    *("equal", "shifted"),
)
seeds = st.integers(0, 2**16)


def values(kind: str, rows: int, width: int, seed: int, huge: float = 1e30) -> Tensor:
    """Return fp32 (rows, width) of a kind."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    if kind == "one huge":
        x[:, seed % width] = huge
        return x
    return {
        "plain": x,
        "zeros": x * 0,
        "negative zero": torch.full_like(x, -0.0),
        "denormal": x * 1e-40,
        "tiny": x * 1e-35,
        "huge": x.clamp(-1, 1) * huge,
        "equal": torch.full_like(x, float(x[0, 0])),
        "shifted": x + 100,
    }[kind]


def rows_of_kinds(kinds: list[str], width: int, seed: int, huge: float = 1e30) -> Tensor:
    """Return one row per kind."""
    return torch.cat([values(kind, 1, width, seed + i, huge) for i, kind in enumerate(kinds)])


@st.composite
def weights(draw: st.DrawFn, format: WeightFormat, *, bias: bool = True) -> PackedWeight:
    """Packed matrices with outputs of no multiple of a block or panel, and odd inputs if plain."""
    coded = format in {"int8", "int4"}
    inputs = draw(st.sampled_from([32, 64, 160] if coded else [1, 2, 7, 32, 65]))
    outputs = draw(st.sampled_from([1, 5, 15, 16, 17, 48, 63, 64, 65, 130]))
    kind, seed = draw(st.sampled_from(KINDS)), draw(seeds)
    matrix = values(kind, outputs, inputs, seed, huge=1e4)
    assert not coded or can_be_coded(inputs)
    packed = quantize(matrix, format)
    if bias and draw(st.booleans()):
        packed = packed.with_bias(values("plain", 1, outputs, seed + 1)[0])
    return packed


def product_bound(weight: PackedWeight, x: Tensor) -> Tensor:
    """Return the sum of magnitudes of a product, in fp64 (rows, outputs): what errors scale with.

    Inside a group of a coded matrix a small weight is a difference of large numbers, so each counts
    as the largest of its group.
    """
    matrix = unpack(weight).double().abs()
    if weight.format in {"int8", "int4"}:
        groups = matrix.reshape(weight.outputs, -1, GROUP)
        matrix = groups.amax(-1, keepdim=True).expand_as(groups).reshape(matrix.shape)
    bound = x.double().abs() @ matrix.T
    return bound if weight.bias is None else bound + weight.bias.double().abs()


def exact_product(weight: PackedWeight, operand: Tensor | CodedRows) -> Tensor:
    """Return operand · weightᵀ + bias in fp64."""
    x = dequantize_rows(operand) if isinstance(operand, CodedRows) else operand
    return torch.nn.functional.linear(
        x.double(), unpack(weight).double(), None if weight.bias is None else weight.bias.double()
    )
