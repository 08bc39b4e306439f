"""Tiles: the order in which a compiled executor keeps keys and values, and the way back.

Knows: a tile of 64 slots of one head, in fp32, bfloat16 and int8 codes.
Does not know: who writes or reads an arena, or what codes stand for.

A tile takes the bytes of 64 plain rows. Where `pair` is 1 for fp32 and 2 for what is smaller:

- keys: `[dims / pair][64 slots][pair]`, so that one dimension of 64 slots is one load;
- values: `[64 slots / pair][dims][pair]`.

Rows are put into their place when they are appended: nothing is re-ordered later (ADR 0009).
"""

from __future__ import annotations

import torch
from jaxtyping import Int, Num
from torch import Tensor

TILE = 64
"""Slots of a tile."""


def untile_keys(arena: Num[Tensor, "g t d"]) -> Num[Tensor, "g t d"]:
    """Return whole tiles of keys as plain rows."""
    g, t, d = arena.shape
    pair = _pair(arena)
    tiles = arena.reshape(g, t // TILE, d // pair, TILE, pair)
    # A single tile could be read as it lies, dimensions apart: attention wants them side by side.
    return tiles.transpose(2, 3).reshape(g, t, d).contiguous()


def untile_values(arena: Num[Tensor, "g t d"]) -> Num[Tensor, "g t d"]:
    """Return whole tiles of values as plain rows."""
    g, t, d = arena.shape
    pair = _pair(arena)
    return arena.reshape(g, t // pair, d, pair).transpose(2, 3).reshape(g, t, d)


def take_keys(arena: Num[Tensor, "g t d"], slots: Int[Tensor, " s"]) -> Num[Tensor, "g s d"]:
    """Return copies of rows of keys out of the slots of a tiled arena."""
    g, t, d = arena.shape
    pair = _pair(arena)
    tiles = arena.view(g, t // TILE, d // pair, TILE, pair)
    return tiles[:, slots // TILE, :, slots % TILE].transpose(0, 1).reshape(g, -1, d)


def take_values(arena: Num[Tensor, "g t d"], slots: Int[Tensor, " s"]) -> Num[Tensor, "g s d"]:
    """Return copies of rows of values out of the slots of a tiled arena."""
    g, t, d = arena.shape
    pair = _pair(arena)
    tiles = arena.view(g, t // pair, d, pair)
    return tiles[:, slots // pair, :, slots % pair].transpose(0, 1)


def put_keys(
    arena: Num[Tensor, "g t d"], slots: Int[Tensor, " s"], rows: Num[Tensor, "g s d"]
) -> None:
    """Write rows of keys into the slots of a tiled arena."""
    g, t, d = arena.shape
    pair = _pair(arena)
    tiles = arena.view(g, t // TILE, d // pair, TILE, pair)
    # Indices that are no neighbours put the slots first: (s, g, d / pair, pair).
    tiles[:, slots // TILE, :, slots % TILE] = (
        rows.to(arena.dtype).reshape(g, -1, d // pair, pair).transpose(0, 1)
    )


def put_values(
    arena: Num[Tensor, "g t d"], slots: Int[Tensor, " s"], rows: Num[Tensor, "g s d"]
) -> None:
    """Write rows of values into the slots of a tiled arena."""
    g, t, d = arena.shape
    pair = _pair(arena)
    tiles = arena.view(g, t // pair, d, pair)
    tiles[:, slots // pair, :, slots % pair] = rows.to(arena.dtype).transpose(0, 1)


def _pair(arena: Tensor) -> int:
    return 1 if arena.dtype is torch.float32 else 2
