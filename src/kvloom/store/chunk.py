"""A chunk: the KV of a stretch of tokens as plain data, with what it was computed from.

Knows: which parts belong to a chunk and what must hold among them.
Does not know: how it is written or where it is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from torch import Tensor

from kvloom.errors import StoreError
from kvloom.kv.lineage import Lineage
from kvloom.store.key import ChunkKey, context_of, hash_tokens
from kvloom.types import KVLayout

ChunkDType = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Keys and values of all layers for a stretch of tokens; nobody may change its arrays.

    Attributes:
        key: what the chunk is.
        tokens: int64 token ids, shape (t,).
        base: position that the first token's keys are rotated at.
        layout: order of the values within the tensors.
        dtype: format of keys and values.
        num_slots: slots that the tensors hold; above t where a layout fills up whole tiles.
        tensors: keys, values and, where the format has them, scales, by name.
        origin: lineage of what stood to the left when the KV was computed.
        statistics: small arrays that go with the KV, for example attention mass per token.
        facts: small facts as JSON.
    """

    key: ChunkKey
    tokens: np.ndarray
    base: int
    layout: KVLayout
    dtype: ChunkDType
    num_slots: int
    tensors: Mapping[str, Tensor]
    origin: Lineage
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens, key = self.tokens, self.key
        if tokens.dtype != np.int64 or tokens.ndim != 1 or not len(tokens):
            raise _wrong("its tokens must be an int64 array of shape (t,) with a token or more")
        if hash_tokens(tokens) != key.token_hash:
            raise _wrong("its key is made for other tokens")
        if key.context not in (None, context_of(self.origin)):
            raise _wrong("its key names another context than its origin")
        if self.num_slots < len(tokens):
            raise _wrong(f"it has {len(tokens)} tokens, but {self.num_slots} slots")
        if not self.tensors:
            raise _wrong("it holds no keys and values")
        if any(x.device.type != "cpu" for x in (*self.tensors.values(), *self.statistics.values())):
            raise _wrong("its tensors must be in CPU memory")

    @property
    def name(self) -> str:
        """Name of the chunk, from its key."""
        return self.key.name

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (*self.tensors.values(), *self.statistics.values())
        return self.tokens.nbytes + sum(x.nbytes for x in arrays)

    def copied(self) -> Chunk:
        """Return the same chunk in memory of its own."""
        return replace(
            self,
            tokens=self.tokens.copy(),
            tensors={name: x.clone() for name, x in self.tensors.items()},
            statistics={name: x.clone() for name, x in self.statistics.items()},
        )


def _wrong(reason: str) -> StoreError:
    return StoreError(f"a chunk cannot be stored: {reason}.")
