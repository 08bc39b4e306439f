"""A decoder executed in plain torch: what `ops.native` must reproduce, and slower.

Knows: the order of a layer's parts.
Does not know: where keys and values are kept; the caller attends.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvloom.ops.decoder import Decoder, DecoderLayer
from kvloom.ops.packing import PackedWeight
from kvloom.ops.rope import rotate, rotation_table
from kvloom.ops.rows import embed, gate, linear, normalize

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes rotated q (h, s, d), rotated k (g, s, d) and v (g, s, dv); returns (h, s, dv)."""
Multiply = Callable[[PackedWeight, Tensor], Tensor]
"""Takes a packed matrix and rows (s, k); returns (s, n)."""


def run_layer(
    layer: DecoderLayer,
    x: Float[Tensor, "s e"],
    pos: Int[Tensor, " s"],
    attend: Attend,
    multiply: Multiply = linear,
) -> Float[Tensor, "s e"]:
    """Return the residual behind a layer."""
    normed = normalize(layer.input_norm, x)
    q, k, v = project(layer, normed, pos, multiply)
    mixed = attend(q, k, v).transpose(0, 1).reshape(len(x), -1)
    branch = normalize(layer.attention_norm, multiply(layer.output, mixed))
    x = x + layer.residual_scale * branch
    inner = normed if layer.parallel else normalize(layer.mlp_norm, x)
    gated = None if layer.gate is None else multiply(layer.gate, inner)
    inner = gate(layer.activation, gated, multiply(layer.up, inner))
    branch = normalize(layer.output_norm, multiply(layer.down, inner))
    return x + layer.residual_scale * branch


def project(
    layer: DecoderLayer, normed: Float[Tensor, "s e"], pos: Int[Tensor, " s"], multiply: Multiply
) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries and keys, and values, heads first."""
    spec = layer.spec
    q = normalize(layer.q_norm, multiply(layer.q, normed))
    k = normalize(layer.k_norm, multiply(layer.k, normed))
    v = multiply(layer.v, normed)
    q = q.reshape(-1, spec.heads, spec.k_dim).transpose(0, 1)
    k = k.reshape(-1, spec.kv_heads, spec.k_dim).transpose(0, 1)
    v = v.reshape(-1, spec.kv_heads, spec.v_dim).transpose(0, 1)
    if spec.rope is not None:
        table = rotation_table(spec.rope, pos)
        q, k = rotate(q, *table, spec.rope), rotate(k, *table, spec.rope)
    return q, k, v


def run_embedding(decoder: Decoder, tokens: Int[Tensor, " s"]) -> Float[Tensor, "s e"]:
    """Return the residual before the first layer."""
    return embed(decoder.embedding, tokens, decoder.embedding_scale)


def run_head(
    decoder: Decoder, x: Float[Tensor, "s e"], multiply: Multiply = linear
) -> Float[Tensor, "s v"]:
    """Return the logits of rows."""
    logits = multiply(decoder.head, normalize(decoder.final_norm, x)) * decoder.logit_scale
    cap = decoder.logit_softcap
    return logits if cap is None else torch.tanh(logits / cap) * cap
