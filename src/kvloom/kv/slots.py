"""Slots: keys and values of all layers in arenas of one layout.

Knows: how rows and codes lie in an arena, and how they are read, written and copied.
Does not know: who owns a slot, or which token it holds.

Every layer is one tensor (g, slots, d), so neighbouring slots read as (g, t, d) without copying.
Slots of int8 hold codes, with a scale per row in an arena of its own (ADR 0012).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from kvloom.ops import tiles
from kvloom.ops.codes import Coded, decode, encode
from kvloom.ops.tiles import TILE as TILE_SLOTS
from kvloom.types import KVLayout, LayerSpec

_NAMES = ("keys", "values", "key_scales", "value_scales")


class Slots:
    """Key and value slots of all layers.

    Attributes:
        dtype: of keys and values; int8 are codes.
        row_dtype: of the rows that are read: fp32 for codes, whose rows a smaller format would
            round again.
        layout: `plain` rows for torch, or the `tiled` order of the compiled executor.
        keys: per layer (g, slots, d), in the layout.
        values: per layer (g, slots, dv), in the layout.
        key_scales: per layer fp32 (g, slots), beside codes; else empty.
        value_scales: per layer fp32 (g, slots), beside codes; else empty.
    """

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        layout: KVLayout,
        key_scales: list[Tensor] | None = None,
        value_scales: list[Tensor] | None = None,
    ) -> None:
        self.dtype = keys[0].dtype
        self.row_dtype = torch.float32 if self.dtype is torch.int8 else self.dtype
        self.layout: KVLayout = layout
        self.keys, self.values = keys, values
        self.key_scales, self.value_scales = key_scales or [], value_scales or []

    @classmethod
    def empty(
        cls,
        layers: Sequence[LayerSpec],
        num_slots: int,
        dtype: torch.dtype,
        layout: KVLayout = "plain",
        device: torch.device | str = "cpu",
    ) -> Slots:
        """Return slots that cost no resident page before they are written."""

        def arenas(dims: Iterable[int]) -> list[Tensor]:
            shapes = [(x.kv_heads, num_slots, d) for x, d in zip(layers, dims, strict=True)]
            return [_arena(shape, dtype, device, layout) for shape in shapes]

        def scales() -> list[Tensor]:
            coded = layers if dtype is torch.int8 else ()
            return [_arena((x.kv_heads, num_slots), torch.float32, device, layout) for x in coded]

        keys, values = arenas(x.k_dim for x in layers), arenas(x.v_dim for x in layers)
        return Slots(keys, values, layout, scales(), scales())

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], layout: KVLayout) -> Slots:
        """Return slots around the arenas that `tensors` gave."""
        found: dict[str, list[Tensor]] = {name: [] for name in _NAMES}
        for name, arenas in found.items():
            while (key := f"{name}.{len(arenas)}") in tensors:
                arenas.append(tensors[key])
        return Slots(
            found["keys"], found["values"], layout, found["key_scales"], found["value_scales"]
        )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All arenas by name and layer."""
        return {
            f"{name}.{layer}": arena
            for name in _NAMES
            for layer, arena in enumerate(getattr(self, name))
        }

    @property
    def num_slots(self) -> int:
        """Slots of every arena."""
        return self.keys[0].shape[1]

    def arenas(self, layer: int) -> tuple[Tensor, ...]:
        """Return all that a layer keeps: keys, values, and the scales of codes; slots second."""
        if self.dtype is not torch.int8:
            return self.keys[layer], self.values[layer]
        scales = self.key_scales[layer], self.value_scales[layer]
        return self.keys[layer], self.values[layer], *scales

    def read(self, layer: int, first_slot: int, stop_slot: int) -> tuple[Tensor, Tensor]:
        """Return keys (g, t, d) and values (g, t, dv) of neighbouring slots as plain rows.

        They are views of a plain pool, may be copies out of a tiled one, and are fp32 out of codes.
        """
        k, v = self.rows(layer, first_slot, stop_slot)
        if self.dtype is not torch.int8:
            return k, v
        slots = slice(first_slot, stop_slot)
        return (
            decode(Coded(k, self.key_scales[layer][:, slots])),
            decode(Coded(v, self.value_scales[layer][:, slots])),
        )

    def take(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return what `read` does, of any slots (t), copied."""
        k, v = self._taken(layer, slots)
        if self.dtype is not torch.int8:
            return k, v
        return (
            decode(Coded(k, self.key_scales[layer][:, slots])),
            decode(Coded(v, self.value_scales[layer][:, slots])),
        )

    def write(self, layer: int, slots: slice | Tensor, k: Tensor, v: Tensor) -> None:
        """Put keys (g, s, d) and values (g, s, dv) into their slots."""
        if self.dtype is torch.int8:
            k, self.key_scales[layer][:, slots] = encode(k)
            v, self.value_scales[layer][:, slots] = encode(v)
        self._put(layer, slots, k, v)

    def copy(self, source: Slots, first_slot: int, stop_slot: int, slots: Tensor) -> None:
        """Put what neighbouring slots of a source hold into slots of these, bit for bit.

        The source is of the same dtype; it may have another layout, and be these slots themselves.
        """
        done = self._copy_tiles(source, first_slot, stop_slot, slots)
        if done == len(slots):
            return
        first_slot, slots = first_slot + done, slots[done:]
        for layer in range(len(self.keys)):
            k, v = source.rows(layer, first_slot, stop_slot)
            self._put(layer, slots, k.clone(), v.clone())
            pairs = zip(self.arenas(layer)[2:], source.arenas(layer)[2:], strict=True)
            for scales, theirs in pairs:
                scales[:, slots] = theirs[:, first_slot:stop_slot].clone()

    def copy_slots(self, from_slots: Tensor, slots: Tensor) -> None:
        """Put what slots hold into others of these, bit for bit; none is among both."""
        for layer in range(len(self.keys)):
            self._put(layer, slots, *self._taken(layer, from_slots))
            for scales in self.arenas(layer)[2:]:
                scales[:, slots] = scales[:, from_slots]

    def _copy_tiles(self, source: Slots, first_slot: int, stop_slot: int, slots: Tensor) -> int:
        """Copy whole tiles as they lie, where both sides have them; return how many slots."""
        count = len(slots) // TILE_SLOTS * TILE_SLOTS
        start = int(slots[0]) if count else 0
        aligned = first_slot % TILE_SLOTS == 0 and start % TILE_SLOTS == 0
        neighbours = count and int(slots[count - 1]) - start == count - 1
        if not (aligned and neighbours and self.layout == source.layout == "tiled"):
            return 0
        for layer in range(len(self.keys)):
            for mine, theirs in zip(self.arenas(layer), source.arenas(layer), strict=True):
                mine[:, start : start + count] = theirs[:, first_slot : first_slot + count]
        return count

    def rows(self, layer: int, first_slot: int, stop_slot: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of neighbouring slots as rows of the dtype they are kept in."""
        if self.layout == "plain":
            slots = slice(first_slot, stop_slot)
            return self.keys[layer][:, slots], self.values[layer][:, slots]
        start = first_slot // TILE_SLOTS * TILE_SLOTS
        whole = slice(start, -(-stop_slot // TILE_SLOTS) * TILE_SLOTS)
        wanted = slice(first_slot - start, stop_slot - start)
        k = tiles.untile_keys(self.keys[layer][:, whole])
        v = tiles.untile_values(self.values[layer][:, whole])
        return k[:, wanted], v[:, wanted]

    def _taken(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of any slots as rows of the dtype they are kept in, copied."""
        keys, values = self.keys[layer], self.values[layer]
        if self.layout == "tiled":
            return tiles.take_keys(keys, slots), tiles.take_values(values, slots)
        return keys[:, slots], values[:, slots]

    def _put(self, layer: int, slots: slice | Tensor, k: Tensor, v: Tensor) -> None:
        """Keep rows as they are, but for the dtype."""
        if self.layout == "tiled":
            index = torch.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots
            tiles.put_keys(self.keys[layer], index, k)
            tiles.put_values(self.values[layer], index, v)
            return
        for arena, fresh in ((self.keys[layer], k), (self.values[layer], v)):
            if isinstance(slots, slice):
                arena[:, slots] = fresh
            else:
                arena.index_copy_(1, slots, fresh.to(arena.dtype))


def _arena(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, layout: KVLayout
) -> Tensor:
    """Return memory that costs no resident page before it is written."""
    if layout == "plain":
        return torch.empty(shape, dtype=dtype, device=device)
    # A tile is read whole, and what nobody wrote must be a number: fresh pages of the system are
    # zeros. They also start at a multiple of a cache line.
    nbytes = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).reshape(shape)
