"""What the contract suites run over: every real implementation and every double, by protocol.

Knows: names and constructors.
Does not know: any law.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import Pool, block_bytes
from kvloom.kv.segment import Segment, SlotArrays
from kvloom.ops.partial import MIN_LOGIT
from kvloom.types import KV, Codec, LayerSegment, LayerSpec, Policy
from tests.doubles import BFloat16Codec, EncodedLayer, Int8Codec, Streaming
from tests.kv.worlds import littered


@dataclass(frozen=True)
class CodecCase:
    """A codec with the largest error it declares, as a share of a channel's largest value."""

    codec: Codec
    relative_error: float


CODECS = [CodecCase(BFloat16Codec(), 2.0**-8), CodecCase(Int8Codec(), 0.501 / 127)]
POLICIES: list[Policy] = [Streaming(), Streaming(sinks=0), Streaming(sinks=1)]
SegmentMaker = Callable[[KV], LayerSegment]


def plain_layer(kv: KV, dtype: torch.dtype | None = None) -> LayerSegment:
    """Put keys and values into a segment in the middle of a pool, as the engine would."""
    dtype = kv.k.dtype if dtype is None else dtype
    groups, slots, dim = kv.k.shape
    spec = LayerSpec(0, groups, groups, dim, kv.v.shape[-1], None)
    pool = littered(Pool([spec], 4 * block_bytes([spec], dtype), dtype), torch.nan)
    first_slot, before = 7, 3
    base = 0 if kv.base is None else kv.base - before
    segment = Segment(pool, first_slot, 249, base=base, origin=Lineage.root(b"contract"))
    segment.append([0] * (before + slots))
    place = slice(first_slot + before, first_slot + before + slots)
    pool.write(0, place, kv.k, kv.v)
    if kv.base is None or kv.bias is not None:
        segment.arrays = SlotArrays(
            pos=torch.cat([torch.zeros(before, dtype=torch.int32), kv.pos])
            if kv.base is None
            else None,
            bias=None if kv.bias is None else torch.cat([torch.zeros(before), kv.bias]),
        )
    return segment.layer(0, before, before + slots)


def encoded_layer(codec: Codec) -> SegmentMaker:
    def make(kv: KV) -> LayerSegment:
        spec = LayerSpec(0, kv.k.shape[0], kv.k.shape[0], kv.k.shape[2], kv.v.shape[2], None)
        return EncodedLayer(codec, codec.encode([kv], [spec]))

    return make


LAYER_SEGMENTS: dict[str, SegmentMaker] = {
    "plain": plain_layer,
    "codes": partial(plain_layer, dtype=torch.int8),
    **{case.codec.id: encoded_layer(case.codec) for case in CODECS},
}


@st.composite
def dense(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> KV:
    """Random keys and values of one layer, at neighbouring positions or at any, with holes."""
    groups, slots = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    dim = draw(st.sampled_from([4, 8]))
    dim_v = draw(st.sampled_from([dim, 6]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    base = draw(st.one_of(st.none(), st.integers(0, 50)))
    if base is None:
        pos = torch.randint(0, 60, (slots,), generator=generator, dtype=torch.int32)
    else:
        pos = torch.arange(base, base + slots, dtype=torch.int32)
    bias = None
    if draw(st.booleans()):
        bias = torch.randn(slots, generator=generator)
        bias[torch.rand(slots, generator=generator) < 0.3] = MIN_LOGIT

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return KV(normal(groups, slots, dim), normal(groups, slots, dim_v), pos, bias, base)


def spec_of(kv: KV) -> LayerSpec:
    """The layer that such keys and values come from, with two query heads per KV head."""
    groups, _, dim = kv.k.shape
    return LayerSpec(0, 2 * groups, groups, dim, kv.v.shape[2], None)
