"""Partial attention and its merge: attention as a fold over pieces of a cache.

Knows: how queries attend to one dense piece, and how the results of pieces become one.
Does not know: documents, positions or models; visibility arrives as a mask.

The fold rests on the identity softmax over a union = lse-weighted sum of softmaxes over parts.
Source: Milakov & Gimelshein 2018 (online softmax); Dao et al. 2022 (FlashAttention), section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kvloom.types import Partial

MIN_LOGIT = -1e30
"""Stands for minus infinity inside masks: infinities turn into NaN where a row sees nothing."""

FLASH_OP = "_scaled_dot_product_flash_attention_for_cpu"
"""Torch's private kernel that also returns the lse; `tests/contract` holds it to what we assume."""


def flash_available() -> bool:
    """Return whether this torch has the flash kernel; without it everything is `attend_plain`."""
    return hasattr(torch.ops.aten, FLASH_OP)


def attend(
    q: Float[Tensor, "h s d"],
    k: Float[Tensor, "g t d"],
    v: Float[Tensor, "g t dv"],
    *,
    scale: float,
    mask: Float[Tensor, "s t"] | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> Partial:
    """Attend from every query row to the slots of one piece.

    Args:
        q: queries; `h` is a multiple of `g`.
        k: keys.
        v: values.
        scale: factor on q·k.
        mask: fp32 added to the logits; `MIN_LOGIT` hides a slot. Rows that see nothing give
            o = 0 and lse = -inf.
        causal: row i sees slots 0..i only; needs s = t and no mask.
        softcap: bounds the logits before the mask is added.

    Source: the flash kernel of torch where it applies; otherwise `attend_plain`.
    """
    if softcap is not None or q.shape[-1] != v.shape[-1] or not flash_available():
        return attend_plain(q, k, v, scale=scale, mask=mask, causal=causal, softcap=softcap)
    heads, rows, dim = q.shape
    groups, slots = k.shape[0], k.shape[1]
    repeat = heads // groups
    flash = getattr(torch.ops.aten, FLASH_OP).default
    if mask is None and not causal:
        # All query heads of a KV head read it together, as further rows of the same product.
        o, lse = flash(q.reshape(1, groups, repeat * rows, dim), k[None], v[None], scale=scale)
        return Partial(o.reshape(heads, rows, dim), lse.reshape(heads, rows))
    o, lse = flash(
        q.reshape(groups, repeat, rows, dim),
        k[:, None].expand(groups, repeat, slots, dim),
        v[:, None].expand(groups, repeat, slots, dim),
        is_causal=causal,
        attn_mask=None if mask is None else mask[None, None],
        scale=scale,
    )
    partial = Partial(o.reshape(heads, rows, dim), lse.reshape(heads, rows))
    return partial if mask is None else _blank_blind_rows(partial, blind_rows(mask))


def attend_plain(
    q: Float[Tensor, "h s d"],
    k: Float[Tensor, "g t d"],
    v: Float[Tensor, "g t dv"],
    *,
    scale: float,
    mask: Float[Tensor, "s t"] | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> Partial:
    """Do what `attend` does with matrix products in fp32: obvious, and the oracle in tests."""
    heads, rows, dim = q.shape
    groups, slots, dim_v = v.shape
    folded = q.reshape(groups, heads // groups * rows, dim).float()
    logits = torch.bmm(folded, k.float().transpose(1, 2)).mul_(scale)
    logits = logits.reshape(heads, rows, slots)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if causal:
        ahead = torch.ones(rows, slots, dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(ahead, MIN_LOGIT)
    if mask is not None:
        logits = logits + mask
    lse = torch.logsumexp(logits, dim=-1)
    weights = (logits - lse[..., None]).exp()
    o = torch.bmm(weights.reshape(groups, -1, slots), v.float()).reshape(heads, rows, dim_v)
    partial = Partial(o.to(q.dtype), lse)
    return partial if mask is None else _blank_blind_rows(partial, blind_rows(mask))


def blind_rows(mask: Float[Tensor, "s t"]) -> Bool[Tensor, " s"]:
    """Return which rows of an additive mask see no slot at all."""
    return mask.amax(dim=-1) <= MIN_LOGIT / 2


def _blank_blind_rows(partial: Partial, blind: Bool[Tensor, " s"]) -> Partial:
    if not bool(blind.any()):
        return partial
    o = partial.o.masked_fill(blind[None, :, None], 0.0)
    return Partial(o, partial.lse.masked_fill(blind[None], -torch.inf))


def merge(partials: Iterable[Partial]) -> Partial:
    """Return the attention over the union of the pieces; order does not matter.

    Rows that no piece sees stay o = 0, lse = -inf.
    """
    pieces = list(partials)
    if len(pieces) == 1:
        return pieces[0]
    lses = torch.stack([piece.lse for piece in pieces])
    lse = torch.logsumexp(lses, dim=0)
    weights = (lses - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
    o = sum(piece.o * weight[..., None] for piece, weight in zip(pieces, weights, strict=True))
    assert isinstance(o, Tensor)
    return Partial(o.to(pieces[0].o.dtype), lse)


def merge_into(total: Partial, piece: Partial) -> Partial:
    """Return the attention over two pieces; either may have rows that see nothing."""
    lse = torch.logaddexp(total.lse, piece.lse)
    floor = lse.clamp_min(MIN_LOGIT)
    old, new = (total.lse - floor).exp_(), (piece.lse - floor).exp_()
    o = total.o * old[..., None] + piece.o * new[..., None]
    return Partial(o.to(total.o.dtype), lse)


def add_sink(partial: Partial, sink: Float[Tensor, " h"]) -> Float[Tensor, "h s dv"]:
    """Return o after a sink logit per head took its share of the probability.

    Source: GPT-OSS attention sinks: a learned logit in the denominator, once per query row.
    """
    share = torch.sigmoid(partial.lse - sink.float()[:, None])
    return partial.o * share[..., None].to(partial.o.dtype)
