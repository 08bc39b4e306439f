"""Memory that a step works in and that goes back to the system when it is outgrown.

Knows: whether anyone still holds what was handed out.
Does not know: what is kept in it.
"""

from __future__ import annotations

import mmap
import sys

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes at whose multiples what the library streams must start."""
KEPT_BYTES = 32 * 2**20
"""Larger pieces are handed out once and not kept: scoring a long text needs much, and rarely."""
# By the attribute, by a local name, and by getrefcount's own argument.
_HELD_BY_US = 3


def aligned_bytes(count: int) -> Tensor:
    """Return uint8 memory (count,) that starts at a multiple of a cache line."""
    exact = torch.empty(count, dtype=torch.uint8)
    if exact.data_ptr() % ALIGNMENT == 0:
        return exact
    raw = torch.empty(count + ALIGNMENT, dtype=torch.uint8)
    offset = -raw.data_ptr() % ALIGNMENT
    return raw[offset : offset + count]


class ReusedMemory:
    """Hands out the same pages again once nobody holds them: touching new ones costs time.

    Pages come from the system and not from the C library's heap, where a piece that is outgrown
    would leave a hole as large as itself.
    """

    def __init__(self) -> None:
        self._pages: mmap.mmap | None = None

    def take(self, count: int) -> Tensor:
        """Return uint8 memory (count,) that nobody else holds; its bytes are not zeroed."""
        if count == 0:
            return torch.empty(0, dtype=torch.uint8)
        if count > KEPT_BYTES:
            return torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)
        pages = self._pages
        if pages is None or len(pages) < count or sys.getrefcount(pages) > _HELD_BY_US:
            del pages
            self._pages = None  # before the new pages: never both
            pages = self._pages = mmap.mmap(-1, count)
        return torch.frombuffer(pages, dtype=torch.uint8, count=count)
