"""The pool: all key and value slots of an engine, and who owns which of them.

Knows: pages, reference counts and exact bytes.
Does not know: tokens, positions or documents.

A *page* is 64 slots of one (layer, KV head). Pages are handed out in *blocks*: the pages of the
same 64 slots in every layer and head: a run of blocks reads without copying, and grows in place
while the block behind it is free (ADR 0002).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from kvloom.errors import CapacityError
from kvloom.kv.slots import Slots
from kvloom.types import KVLayout, LayerSpec

PAGE_SLOTS = 64


class Run(NamedTuple):
    """Neighbouring blocks of the pool."""

    first_block: int
    num_blocks: int


def blocks_for(num_slots: int) -> int:
    """Return how many blocks hold this many slots."""
    return -(-num_slots // PAGE_SLOTS)


def block_bytes(layers: Sequence[LayerSpec], dtype: torch.dtype) -> int:
    """Return the bytes of 64 slots in every layer and head, scales included."""
    slot_values = sum(layer.kv_heads * (layer.k_dim + layer.v_dim) for layer in layers)
    slot_scales = sum(2 * layer.kv_heads for layer in layers) if dtype is torch.int8 else 0
    return PAGE_SLOTS * (slot_values * dtype.itemsize + slot_scales * torch.float32.itemsize)


class Pool(Slots):
    """Slots with a reference count per block.

    Raises:
        CapacityError: the budget does not hold a single block.
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        budget_bytes: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layout: KVLayout = "plain",
    ) -> None:
        self.layers = tuple(layers)
        self.pages_per_block = sum(layer.kv_heads for layer in layers)
        self.block_bytes = block_bytes(layers, dtype)
        self.num_blocks = budget_bytes // self.block_bytes
        if self.num_blocks < 1:
            raise CapacityError(
                f"The KV memory of {budget_bytes} bytes holds no block of {PAGE_SLOTS} tokens, "
                f"which takes {self.block_bytes} bytes for this model; raise kv_memory."
            )
        own = Slots.empty(layers, self.num_blocks * PAGE_SLOTS, dtype, layout, device)
        super().__init__(own.keys, own.values, layout, own.key_scales, own.value_scales)
        self._owners = np.zeros(self.num_blocks, dtype=np.int32)
        self._filled = np.zeros(self.num_blocks, dtype=np.int32)
        self.free_blocks = self.num_blocks

    @property
    def nbytes(self) -> int:
        """Bytes of the arena."""
        return self.num_blocks * self.block_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of owned blocks."""
        return (self.num_blocks - self.free_blocks) * self.block_bytes

    @property
    def num_pages(self) -> int:
        """Pages of the arena."""
        return self.num_blocks * self.pages_per_block

    @property
    def free_pages(self) -> int:
        """Pages that nobody owns."""
        return self.free_blocks * self.pages_per_block

    def require(self, num_blocks: int) -> None:
        """Make sure that so many blocks are free, in any place.

        Raises:
            CapacityError: fewer are.
        """
        if num_blocks > self.free_blocks:
            raise CapacityError(
                f"{num_blocks} blocks of {PAGE_SLOTS} tokens are needed and {self.free_blocks} of "
                f"{self.num_blocks} are free; end other requests or raise kv_memory."
            )

    def allocate(self, num_blocks: int) -> Run:
        """Take one run of blocks: the first of that length, else the longest there is.

        Raises:
            CapacityError: fewer blocks are free in all; nothing was taken.
        """
        self.require(num_blocks)
        free = self._free_runs()
        longest = max(free, key=lambda run: run.num_blocks)
        found = next((run for run in free if run.num_blocks >= num_blocks), longest)
        run = Run(found.first_block, min(num_blocks, found.num_blocks))
        self._own(run)
        return run

    def allocate_whole(self, num_blocks: int) -> Run | None:
        """Take the first run of blocks of exactly that length; None if there is none."""
        found = next((run for run in self._free_runs() if run.num_blocks >= num_blocks), None)
        if found is None:
            return None
        run = Run(found.first_block, num_blocks)
        self._own(run)
        return run

    def extend(self, block: int, num_blocks: int) -> int:
        """Take up to `num_blocks` free blocks that start at `block`; return how many."""
        stop = min(block + num_blocks, self.num_blocks)
        taken = 0
        while block + taken < stop and self._owners[block + taken] == 0:
            taken += 1
        if taken:
            self._own(Run(block, taken))
        return taken

    def rest(self, slot: int) -> int:
        """Return how many slots from `slot` to the end of its block can be claimed.

        The rest of a block belongs to the first who continues there; 0 if that was another.
        """
        block, offset = divmod(slot, PAGE_SLOTS)
        return PAGE_SLOTS - offset if offset and self._filled[block] == offset else 0

    def claim_rest(self, slot: int) -> int:
        """Take the unwritten slots from `slot` to the end of its block; return how many."""
        rest = self.rest(slot)
        if rest:
            block = slot // PAGE_SLOTS
            self._filled[block] = PAGE_SLOTS
            self._owners[block] += 1
        return rest

    def give_rest_back(self, slot: int) -> None:
        """Let others claim the slots from `slot` to the end of its block."""
        block, offset = divmod(slot, PAGE_SLOTS)
        if offset:
            self._filled[block] = offset

    def retain(self, first_slot: int, stop_slot: int) -> None:
        """Add an owner to every block that these slots touch."""
        first, stop = first_slot // PAGE_SLOTS, blocks_for(stop_slot)
        assert (self._owners[first:stop] > 0).all(), "retained a block that nobody owns"
        self._owners[first:stop] += 1

    def release(self, first_slot: int, stop_slot: int) -> None:
        """Remove an owner from every block that these slots touch."""
        first, stop = first_slot // PAGE_SLOTS, blocks_for(stop_slot)
        owners = self._owners[first:stop]
        assert (owners > 0).all(), "released a block that nobody owns"
        owners -= 1
        self.free_blocks += int((owners == 0).sum())

    def owners(self) -> np.ndarray:
        """Return a copy of the reference count per block."""
        return self._owners.copy()

    def would_free(self, first_slot: int, stop_slot: int) -> bool:
        """Whether releasing these slots gives a block back: one that nobody else owns."""
        owners = self._owners[first_slot // PAGE_SLOTS : blocks_for(stop_slot)]
        return bool((owners == 1).any())

    def _own(self, run: Run) -> None:
        blocks = slice(run.first_block, run.first_block + run.num_blocks)
        self._owners[blocks] = 1
        self._filled[blocks] = PAGE_SLOTS
        self.free_blocks -= run.num_blocks

    def _free_runs(self) -> list[Run]:
        free = np.concatenate(([0], self._owners == 0, [0]))
        edges = np.flatnonzero(np.diff(free))
        return [Run(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
