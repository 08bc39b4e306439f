"""Segments: stretches of computed KV that are never written again once closed.

Knows: where the slots lie, which tokens they hold, at which positions the keys were rotated, and
what they attended to.
Does not know: which documents show them, or at which positions now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvloom.kv.lineage import BLOCK_TOKENS, Lineage
from kvloom.kv.pool import PAGE_SLOTS, Pool
from kvloom.ops.partial import MIN_LOGIT, attend
from kvloom.ops.rope import rotate, shift_table
from kvloom.types import KV, Partial, QueryInfo


@dataclass(slots=True)
class SlotArrays:
    """What a segment may carry beside K and V, one entry per slot; None until asked for.

    Attributes:
        pos: int32 positions the keys were rotated at, where they are not base + slot.
        score: fp32, kept by an observer.
        bias: fp32 added to the logits; `MIN_LOGIT` makes a hole.
        span: int16 number of source tokens a slot stands for.
        tag: uint8 kind of content.
    """

    pos: Tensor | None = None
    score: Tensor | None = None
    bias: Tensor | None = None
    span: Tensor | None = None
    tag: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that exist."""
        return sum(array.nbytes for array in self._all if array is not None)

    def part(self, start: int, stop: int) -> SlotArrays:
        """Return the arrays of slots start to stop - 1; they share memory."""
        return SlotArrays(*(None if array is None else array[start:stop] for array in self._all))

    @property
    def _all(self) -> tuple[Tensor | None, ...]:
        return (self.pos, self.score, self.bias, self.span, self.tag)


class Segment:
    """A stretch of slots in the pool; open while its one writer appends, then closed for good.

    Attributes:
        first_slot: where it starts in the pool.
        capacity: slots that its writer owns.
        base: keys are rotated at base + slot.
        origin: lineage of everything the first slot attended to.
        tokens: one token id per written slot.
        arrays: optional per-slot arrays.
    """

    __slots__ = (
        "_checkpoints",
        "arrays",
        "base",
        "capacity",
        "closed",
        "first_slot",
        "origin",
        "pool",
        "tokens",
    )

    def __init__(
        self, pool: Pool, first_slot: int, capacity: int, *, base: int, origin: Lineage
    ) -> None:
        self.pool = pool
        self.first_slot = first_slot
        self.capacity = capacity
        self.base = base
        self.origin = origin
        self.tokens: list[int] = []
        self.arrays: SlotArrays | None = None
        self.closed = False
        self._checkpoints: list[Lineage] = [origin]

    @property
    def length(self) -> int:
        """Slots written so far."""
        return len(self.tokens)

    @property
    def room(self) -> int:
        """Slots that can still be written."""
        return 0 if self.closed else self.capacity - len(self.tokens)

    @property
    def placed(self) -> bool:
        """Whether its slots stand at positions of their own, not at base + slot."""
        return self.arrays is not None and self.arrays.pos is not None

    def rotated_at(self, start: int, stop: int) -> Tensor:
        """Return the int32 positions that the keys of a range of slots were rotated at."""
        if self.arrays is not None and self.arrays.pos is not None:
            return self.arrays.pos[start:stop]
        return torch.arange(self.base + start, self.base + stop, dtype=torch.int32)

    def rotated_from(self, slot: int) -> int:
        """Return the position that the key of one slot was rotated at."""
        if self.arrays is not None and self.arrays.pos is not None:
            return int(self.arrays.pos[slot])
        return self.base + slot

    def append(self, tokens: Sequence[int]) -> int:
        """Take the next slots for these tokens; return the first one's place in the pool."""
        assert len(tokens) <= self.room, "appended past the segment's capacity"
        slot = self.first_slot + len(self.tokens)
        self.tokens.extend(tokens)
        return slot

    def place(self, pos: np.ndarray) -> None:
        """Let the written slots stand at ascending positions of their own, not at base + slot."""
        assert not self.closed, "placed a closed segment"
        assert len(pos) == self.length, "one position per written slot"
        assert bool((np.diff(pos) > 0).all()), "positions out of order"
        self.arrays = SlotArrays(pos=torch.from_numpy(pos.astype(np.int32)))

    def cut(self, length: int) -> None:
        """Forget the slots from `length` on; only an open segment can."""
        assert not self.closed, "cut a closed segment"
        del self.tokens[length:]
        del self._checkpoints[length // BLOCK_TOKENS + 1 :]

    def grow(self, num_blocks: int) -> int:
        """Take up to `num_blocks` free blocks right behind the segment; return how many."""
        end = self.first_slot + self.capacity
        taken = 0 if end % PAGE_SLOTS else self.pool.extend(end // PAGE_SLOTS, num_blocks)
        self.capacity += taken * PAGE_SLOTS
        return taken

    def shrink(self) -> None:
        """Give back the blocks that hold no written slot."""
        end = self.first_slot + self.capacity
        used = -(-(self.first_slot + max(self.length, 1)) // PAGE_SLOTS) * PAGE_SLOTS
        if used < end:
            self.pool.release(used, end)
            self.capacity = used - self.first_slot

    def close(self) -> None:
        """End writing: the writer gives back all its blocks; who shows slots must own them."""
        assert not self.closed, "closed a segment twice"
        self.closed = True
        self.pool.release(self.first_slot, self.first_slot + self.capacity)
        end = self.first_slot + self.length
        if end % PAGE_SLOTS and end < self.first_slot + self.capacity:
            self.pool.give_rest_back(end)

    def split(self, origin: Lineage) -> Segment:
        """Close what is written and return the unwritten rest as a segment of the same writer.

        Args:
            origin: lineage of what the rest's first slot will attend to.
        """
        assert 0 < self.length < self.capacity, "split where nothing stands or nothing is left"
        end, room = self.first_slot + self.length, self.capacity - self.length
        rest = Segment(self.pool, end, room, base=self.base + self.length, origin=origin)
        self.pool.retain(end, end + room)
        self.closed = True
        self.pool.release(self.first_slot, end + room)
        return rest

    def lineage_at(self, slot: int) -> Lineage:
        """Return the lineage of everything up to and without `slot`, as it was computed."""
        index, rest = divmod(slot, BLOCK_TOKENS)
        while len(self._checkpoints) <= index:
            start = (len(self._checkpoints) - 1) * BLOCK_TOKENS
            block = self.tokens[start : start + BLOCK_TOKENS]
            self._checkpoints.append(self._checkpoints[-1].extend(block))
        return self._checkpoints[index].extend(self.tokens[slot - rest : slot])

    def layer(self, index: int, start: int = 0, stop: int | None = None) -> PlainLayer:
        """Return one layer of a range of slots."""
        return PlainLayer(self, index, start, self.length if stop is None else stop)


@dataclass(frozen=True, slots=True)
class PlainLayer:
    """One layer of an unencoded segment, and the oracle of every other `LayerSegment`."""

    segment: Segment
    index: int
    start: int
    stop: int

    @property
    def heads(self) -> slice:
        """All KV heads."""
        return slice(0, self.segment.pool.keys[self.index].shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the slots' keys and values, as they are kept."""
        arenas = self.segment.pool.arenas(self.index)
        return sum(x.nbytes // x.shape[1] for x in arenas) * (self.stop - self.start)

    def dense(self) -> KV:
        """Return the slots' keys and values: see `Pool.read`."""
        segment = self.segment
        arrays = segment.arrays
        bias = None
        base = None if segment.placed else segment.base + self.start
        if arrays is not None and arrays.bias is not None:
            bias = arrays.bias[self.start : self.stop]
        first = segment.first_slot
        k, v = segment.pool.read(self.index, first + self.start, first + self.stop)
        return KV(k=k, v=v, pos=segment.rotated_at(self.start, self.stop), bias=bias, base=base)

    def partial(self, q: Tensor, at: QueryInfo) -> Partial:
        """Turn the query by -shift and attend to every slot that its position may see."""
        kv = self.dense()
        if at.shift and at.rope is not None:
            q = rotate(q, *shift_table(at.rope, -at.shift, q.device), at.rope)
        mask = visibility_mask(at.pos, kv.pos.to(at.pos.dtype) + at.shift, at.window)
        if kv.bias is not None:
            mask = mask + kv.bias
        return attend(q, kv.k, kv.v, scale=at.scale, mask=mask, softcap=at.softcap)


def visibility_mask(query_pos: Tensor, key_pos: Tensor, window: int | None) -> Tensor:
    """Return an fp32 mask (s, t): 0 where a query may see a key, else `MIN_LOGIT`.

    It may where key_pos <= query_pos < key_pos + window.
    """
    distance = query_pos[:, None] - key_pos[None, :]
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    mask = torch.zeros(hidden.shape, dtype=torch.float32, device=query_pos.device)
    return mask.masked_fill_(hidden, MIN_LOGIT)
