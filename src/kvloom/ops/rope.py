"""Rotary position embedding as pure functions.

Knows: how to turn vectors by a position, and by a shift, in every layout the probe can find.
Does not know: models, layers or caches.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvloom.types import Rope


def rotation_table(
    rope: Rope, pos: Int[Tensor, " s"]
) -> tuple[Float[Tensor, "s n"], Float[Tensor, "s n"]]:
    """Return fp32 cos and sin per position and rotated pair, with the rope's scaling.

    Source: Su et al., RoFormer, eq. 34; angles as fp32 products, which is what the oracle
    (transformers) computes.
    """
    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float32, device=pos.device)
    angles = pos.to(torch.float32)[:, None] * inv_freq
    return angles.cos() * rope.scaling, angles.sin() * rope.scaling


def shift_table(
    rope: Rope, shift: int, device: torch.device | None = None
) -> tuple[Float[Tensor, "1 n"], Float[Tensor, "1 n"]]:
    """Return fp32 cos and sin that turn a vector by `shift` positions, without any scaling.

    Angles are computed in fp64: a shift may be large and is applied on top of fp32 rotations.
    """
    return shift_tables(rope, torch.tensor([shift], device=device))


def shift_tables(
    rope: Rope, shifts: Int[Tensor, " s"]
) -> tuple[Float[Tensor, "s n"], Float[Tensor, "s n"]]:
    """Return fp32 cos and sin that turn each of several vectors by a shift of its own."""
    inv_freq = torch.tensor(rope.inv_freq, dtype=torch.float64, device=shifts.device)
    angles = shifts.to(torch.float64)[:, None] * inv_freq
    return angles.cos().float(), angles.sin().float()


def rotate(
    x: Float[Tensor, "*heads s d"],
    cos: Float[Tensor, "#s n"],
    sin: Float[Tensor, "#s n"],
    rope: Rope,
) -> Float[Tensor, "*heads s d"]:
    """Return x with its rotated dimensions turned; the others are copied.

    Computed in fp32 for every dtype of x: bf16 angles lose the position.
    """
    first, num = rope.first_dim, rope.num_dims
    whole = num == x.shape[-1]
    source = x if x.dtype == torch.float32 else x.float()
    out = torch.empty_like(source) if whole else source.clone()
    a, b = _pairs(source[..., first : first + num], rope)
    out_a, out_b = _pairs(out[..., first : first + num], rope)
    torch.mul(a, cos, out=out_a)
    out_a.addcmul_(b, sin, value=-1.0)
    torch.mul(b, cos, out=out_b)
    out_b.addcmul_(a, sin)
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def _pairs(x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Return views of the first and second member of every rotated pair."""
    if rope.layout == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]
