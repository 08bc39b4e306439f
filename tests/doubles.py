"""Small honest implementations of protocols whose real ones come later.

Knows: the least that a codec, a policy and an encoded segment can be.
Does not know: how the real ones work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvloom.ops.partial import MIN_LOGIT, attend_plain
from kvloom.ops.rope import rotate, shift_table
from kvloom.types import KV, Codec, Encoded, LayerSpec, Partial, QueryInfo, SlotRange


def _plain_arrays(index: int, kv: KV) -> dict[str, Tensor]:
    """What every codec here keeps as it is: positions, biases, base."""
    arrays = {f"pos.{index}": kv.pos.clone()}
    if kv.bias is not None:
        arrays[f"bias.{index}"] = kv.bias.clone()
    if kv.base is not None:
        arrays[f"base.{index}"] = torch.tensor(kv.base)
    return arrays


def _encoded(codec: str, arrays: dict[str, Tensor]) -> Encoded:
    return Encoded(codec, arrays, sum(array.nbytes for array in arrays.values()))


def _kv(arrays: Mapping[str, Tensor], index: int, k: Tensor, v: Tensor) -> KV:
    base = arrays.get(f"base.{index}")
    return KV(
        k=k,
        v=v,
        pos=arrays[f"pos.{index}"],
        bias=arrays.get(f"bias.{index}"),
        base=None if base is None else int(base),
    )


def _num_layers(arrays: Mapping[str, Tensor]) -> int:
    return sum(name.startswith("pos.") for name in arrays)


@dataclass(frozen=True)
class BFloat16Codec:
    """Keeps keys and values as bf16: an identity on bf16, one rounding on fp32."""

    space: Literal["rotated", "unrotated"] = "rotated"

    @property
    def id(self) -> str:
        return "bfloat16"

    def encode(self, kvs: Sequence[KV], specs: Sequence[LayerSpec]) -> Encoded:
        arrays: dict[str, Tensor] = {}
        for index, kv in enumerate(kvs):
            arrays |= _plain_arrays(index, kv)
            for name, x in (("k", kv.k), ("v", kv.v)):
                arrays[f"{name}.{index}"] = x.to(torch.bfloat16, copy=True).contiguous()
        return _encoded(self.id, arrays)

    def decode(self, encoded: Encoded) -> Sequence[KV]:
        arrays = encoded.arrays
        return [
            _kv(arrays, index, arrays[f"k.{index}"], arrays[f"v.{index}"])
            for index in range(_num_layers(arrays))
        ]


@dataclass(frozen=True)
class Int8Codec:
    """Eight bits per value, one scale per layer, head and channel: off by half a step at most."""

    space: Literal["rotated", "unrotated"] = "rotated"

    @property
    def id(self) -> str:
        return "int8-channel"

    def encode(self, kvs: Sequence[KV], specs: Sequence[LayerSpec]) -> Encoded:
        arrays: dict[str, Tensor] = {}
        for index, kv in enumerate(kvs):
            arrays |= _plain_arrays(index, kv)
            for name, x in (("k", kv.k.float()), ("v", kv.v.float())):
                step = x.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127
                arrays[f"{name}.{index}"] = (x / step).round().to(torch.int8)
                arrays[f"{name}_step.{index}"] = step
        return _encoded(self.id, arrays)

    def decode(self, encoded: Encoded) -> Sequence[KV]:
        arrays = encoded.arrays
        return [
            _kv(
                arrays,
                index,
                arrays[f"k.{index}"] * arrays[f"k_step.{index}"],
                arrays[f"v.{index}"] * arrays[f"v_step.{index}"],
            )
            for index in range(_num_layers(arrays))
        ]


@dataclass(frozen=True)
class EncodedLayer:
    """One layer of an encoded span, decoded whenever it is read."""

    codec: Codec
    encoded: Encoded

    @property
    def heads(self) -> slice:
        return slice(0, self.dense().k.shape[0])

    @property
    def nbytes(self) -> int:
        return self.encoded.nbytes

    def dense(self) -> KV:
        (kv,) = self.codec.decode(self.encoded)
        return kv

    def partial(self, q: Tensor, at: QueryInfo) -> Partial:
        kv = self.dense()
        if at.shift and at.rope is not None:
            q = rotate(q, *shift_table(at.rope, -at.shift), at.rope)
        mask = torch.zeros(len(at.pos), len(kv.pos))
        for row, position in enumerate(at.pos.tolist()):
            for slot, key_pos in enumerate((kv.pos + at.shift).tolist()):
                old = at.window is not None and key_pos <= position - at.window
                if key_pos > position or old:
                    mask[row, slot] = MIN_LOGIT
        if kv.bias is not None:
            mask = mask + kv.bias
        return attend_plain(q, kv.k, kv.v, scale=at.scale, mask=mask, softcap=at.softcap)


@dataclass(frozen=True)
class Streaming:
    """Keeps the first slots and the most recent ones.

    Source: StreamingLLM (Xiao et al. 2023), section 3.2; positions stay as they were.
    """

    sinks: int = 4

    @property
    def id(self) -> str:
        return f"streaming-{self.sinks}"

    def keep(self, num_slots: int, budget: int) -> Sequence[SlotRange]:
        if budget >= num_slots:
            return (SlotRange(0, num_slots),) if num_slots else ()
        first = min(self.sinks, budget)
        recent = SlotRange(num_slots - (budget - first), num_slots)
        return tuple(part for part in (SlotRange(0, first), recent) if part.length)
