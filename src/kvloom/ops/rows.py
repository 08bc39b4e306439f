"""The operations of a decoder on rows, in plain torch: obvious, and the oracle of `ops.native`.

Knows: norms, products with packed matrices, gates and embeddings, in fp32.
Does not know: documents, layers or speed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from kvloom.ops.decoder import Activation, Norm
from kvloom.ops.packing import GROUP, PackedWeight, unpack

LEAST = 1e-36
"""Groups of rows whose largest magnitude is below become zeros."""


class CodedRows(NamedTuple):
    """Rows in int8 with a scale per group of 32.

    Attributes:
        codes: int8 (s, k).
        scales: fp32 (s, groups).
        counts: int32 (s, groups), the sums of the codes.
    """

    codes: Int8[Tensor, "s k"]
    scales: Float[Tensor, "s g"]
    counts: Int[Tensor, "s g"]


def normalize(norm: Norm, x: Float[Tensor, "*s k"]) -> Float[Tensor, "*s k"]:
    """Normalise the last dimension, in stretches of the norm's width."""
    if norm.kind == "none":
        return x
    shape = x.shape
    y = x.float().reshape(*shape[:-1], -1, norm.width)
    if norm.kind == "layer":
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.epsilon)
    if norm.weight is not None:
        y = y * norm.weight
    if norm.bias is not None:
        y = y + norm.bias
    return y.reshape(shape)


def quantize_rows(x: Float[Tensor, "s k"]) -> CodedRows:
    """Round rows to int8: the largest magnitude of each group becomes 127.

    A group of nothing above `LEAST` becomes zeros: 127 divided by less is no fp32 number.
    """
    grouped = x.float().reshape(len(x), -1, GROUP)
    most = grouped.abs().amax(-1)
    most = torch.where(most < LEAST, torch.zeros(()), most)
    inverse = torch.where(most > 0, 127.0 / most, torch.zeros(()))
    # Where a value is no number, the scale alone makes the product none.
    codes = (grouped * inverse[..., None]).round().nan_to_num(nan=0.0)
    counts = codes.sum(-1).to(torch.int32)
    return CodedRows(codes.to(torch.int8).reshape(x.shape), most / 127.0, counts)


def dequantize_rows(rows: CodedRows) -> Float[Tensor, "s k"]:
    """Return what coded rows stand for."""
    grouped = rows.codes.float().reshape(len(rows.codes), -1, GROUP)
    return (grouped * rows.scales[..., None]).reshape(rows.codes.shape)


def as_operand(x: Float[Tensor, "s k"], weight: PackedWeight) -> Float[Tensor, "s k"]:
    """Round rows to the format in which they meet a matrix."""
    if weight.format in {"int4", "int8"}:
        return dequantize_rows(quantize_rows(x))
    return x.to(torch.bfloat16).float() if weight.format == "bfloat16" else x.float()


def linear(
    weight: PackedWeight, x: Float[Tensor, "s k"], *, unpacked: Tensor | None = None
) -> Float[Tensor, "s n"]:
    """Return x · weightᵀ + bias in fp32, with rows rounded as the weight's format asks.

    Args:
        weight: the matrix.
        x: rows.
        unpacked: the matrix in fp32, where the caller keeps it.
    """
    matrix = unpack(weight) if unpacked is None else unpacked
    return torch.nn.functional.linear(as_operand(x, weight), matrix, weight.bias)


def gate(
    activation: Activation, gated: Float[Tensor, "s k"] | None, up: Float[Tensor, "s k"]
) -> Float[Tensor, "s k"]:
    """Return activation(gated) * up, or activation(up) where nothing gates."""
    x = up if gated is None else gated
    if activation == "silu":
        y = torch.nn.functional.silu(x)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        y = torch.nn.functional.gelu(x, approximate=approximate)
    return y if gated is None else y * up


def embed(weight: PackedWeight, tokens: Int[Tensor, " s"], scale: float) -> Float[Tensor, "s k"]:
    """Return the rows of a packed matrix for tokens, in fp32."""
    return unpack(weight)[tokens] * scale


def likeliest(logits: Float[Tensor, "s v"]) -> Int[Tensor, " s"]:
    """Return the index of every row's largest logit, the first of equals; NaN counts as it."""
    return torch.from_numpy(logits.numpy().argmax(axis=-1))
