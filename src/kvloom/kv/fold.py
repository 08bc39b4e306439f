"""The fold plan: what one step reads, decided once from counts, and its execution in torch.

Knows: documents, packed rows, positions, and how partial results become one.
Does not know: models; a layer hands over rotated queries and its facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvloom.kv.doc import KVDoc
from kvloom.kv.gather import NOWHERE, views_read
from kvloom.kv.pool import Pool
from kvloom.kv.segment import visibility_mask
from kvloom.kv.views import Reading, View, read, row_ranges, share
from kvloom.ops.partial import add_sink, attend, merge_into
from kvloom.ops.rope import rotate, shift_tables
from kvloom.types import LayerSpec, Partial, Rope

RowIndex = slice | Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """Slots that are read one by one, the key of each turned by a shift of its own.

    Attributes:
        slots: int64 slots in the pool.
        shifts: int32 position of each key now minus the position it was rotated at.
    """

    slots: Tensor
    shifts: Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Slots with the rows that read them.

    Attributes:
        start: first slot in the pool.
        stop: slot behind the last.
        rows: packed rows, as a slice where they are neighbours.
        shift: position of the keys now minus the position they were rotated at.
        causal: row i sees slots 0..i only.
        mask: fp32 added to the logits; None if every row sees every slot.
        alone: no other piece is read by these rows.
        gathered: what is read instead of the stretch from `start` to `stop`, where it is no stretch
            that one query turned by `shift` could read.
    """

    start: int
    stop: int
    rows: RowIndex
    shift: int
    causal: bool
    mask: Tensor | None
    alone: bool
    gathered: Gathered | None = None


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """What one step writes and reads, the same for all layers of one window.

    Attributes:
        pool: where the slots lie.
        num_rows: packed rows.
        pos: int64 positions of the rows, on the device.
        write_slots: slot of every row's K and V; a slice where they are neighbours.
        pieces: what is read, by window, in the order of their rows.
        tiled: windows whose pieces hold every row once and in order.
        turns: cos and sin of what is turned, by shift or shifts, and rope.
    """

    pool: Pool
    num_rows: int
    pos: Tensor
    write_slots: RowIndex
    pieces: dict[int | None, tuple[Piece, ...]]
    tiled: frozenset[int | None]
    turns: dict[tuple[int | Gathered, Rope], tuple[Tensor, Tensor]]


def plan_fold(
    docs: Sequence[KVDoc],
    pos: Sequence[np.ndarray],
    write_slots: Sequence[np.ndarray],
    windows: Iterable[int | None],
) -> FoldPlan:
    """Plan one step.

    Args:
        docs: one document per entry; its spans already show the rows that are about to be written.
        pos: int64 positions of each document's rows, in packed order.
        write_slots: int64 slots of each document's rows.
        windows: every window that a layer of the model has.
    """
    pool = docs[0].pool
    ranges = row_ranges(pos)
    packed_pos = torch.from_numpy(np.concatenate(pos))
    views = [views_read(doc) for doc in docs]
    pieces = {}
    for window in set(windows):
        readings = [
            reading
            for doc_views, rows in zip(views, ranges, strict=True)
            for view in doc_views
            for reading in read(view, rows, window)
        ]
        pieces[window] = _pieces(share(readings), packed_pos, window)
    return FoldPlan(
        pool=pool,
        num_rows=len(packed_pos),
        pos=packed_pos,
        write_slots=_index(np.concatenate(write_slots)),
        pieces=pieces,
        tiled=frozenset(w for w, read_at in pieces.items() if _tile(read_at, len(packed_pos))),
        turns={},
    )


def write(plan: FoldPlan, layer: int, k: Tensor, v: Tensor) -> None:
    """Put this step's rotated keys (g, s, d) and values (g, s, dv) into their slots."""
    plan.pool.write(layer, plan.write_slots, k, v)


def fold(
    plan: FoldPlan,
    layer: LayerSpec,
    q: Tensor,
    *,
    scale: float,
    sink: Tensor | None = None,
) -> Tensor:
    """Attend with rotated queries (h, s, d) over everything their rows see; return (h, s, dv).

    It is computed in the dtype of the pool's rows, and comes back in that of the queries.
    """
    rows = q.to(plan.pool.row_dtype)
    return _fold(plan, layer, rows, scale, sink).to(q.dtype)


def _fold(plan: FoldPlan, layer: LayerSpec, q: Tensor, scale: float, sink: Tensor | None) -> Tensor:
    pieces = plan.pieces[layer.window]
    if layer.window in plan.tiled and sink is None:
        partials = [_partial(plan, piece, layer, q[:, piece.rows], scale) for piece in pieces]
        return partials[0].o if len(partials) == 1 else torch.cat([p.o for p in partials], dim=1)
    o = q.new_zeros(q.shape[0], q.shape[1], layer.v_dim)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    for piece in pieces:
        partial = _partial(plan, piece, layer, q[:, piece.rows], scale)
        if piece.alone:
            o[:, piece.rows] = partial.o
            lse[:, piece.rows] = partial.lse
        else:
            merged = merge_into(Partial(o[:, piece.rows], lse[:, piece.rows]), partial)
            o[:, piece.rows], lse[:, piece.rows] = merged
    return o if sink is None else add_sink(Partial(o, lse), sink)


def _partial(
    plan: FoldPlan,
    piece: Piece,
    layer: LayerSpec,
    q: Tensor,
    scale: float,
) -> Partial:
    if piece.gathered is None:
        k, v = plan.pool.read(layer.index, piece.start, piece.stop)
        if piece.shift and layer.rope is not None:
            q = rotate(q, *_turn(plan, piece.shift, layer.rope), layer.rope)
    else:
        k, v = plan.pool.take(layer.index, piece.gathered.slots)
        if layer.rope is not None:
            k = rotate(k, *_turn(plan, piece.gathered, layer.rope), layer.rope)
    return attend(
        q,
        k,
        v,
        scale=scale,
        mask=piece.mask,
        causal=piece.causal,
        softcap=layer.softcap,
    )


def _turn(plan: FoldPlan, by: int | Gathered, rope: Rope) -> tuple[Tensor, Tensor]:
    """Return cos and sin that turn a query against a shift, or gathered keys by theirs."""
    turn = plan.turns.get((by, rope))
    if turn is None:
        shifts = torch.tensor([-by]) if isinstance(by, int) else by.shifts
        turn = shift_tables(rope, shifts.to(plan.pos.device))
        plan.turns[by, rope] = turn
    return turn


def _pieces(readings: Sequence[Reading], pos: Tensor, window: int | None) -> tuple[Piece, ...]:
    readers = np.zeros(len(pos), dtype=np.int32)
    for reading in readings:
        for start, stop in reading.rows:
            readers[start:stop] += 1
    pieces = []
    for reading, *others in _together(readings):
        start, stop = reading.rows[0]
        rows: RowIndex = slice(start, stop)
        if len(reading.rows) > 1:
            rows = torch.cat([torch.arange(*part) for part in reading.rows])
        alone = not others and all(bool((readers[a:b] == 1).all()) for a, b in reading.rows)
        view, mask, gathered = reading.view, None, None
        if view.slot_shifts is not None:
            views = [view, *(other.view for other in others)]
            gathered, mask = _gathered(views, pos[rows], window)
        elif reading.visibility == "mask":
            mask = _mask(view, pos[rows], window)
        causal = reading.visibility == "causal"
        pieces.append(Piece(view.start, view.stop, rows, view.shift, causal, mask, alone, gathered))
    return tuple(pieces)


def _together(readings: Sequence[Reading]) -> list[list[Reading]]:
    """Return readings in the order of their rows, gathered ones of the same rows together."""
    groups: list[list[Reading]] = []
    gathered: dict[tuple[tuple[int, int], ...], list[Reading]] = {}
    for reading in sorted(readings, key=lambda reading: reading.rows):
        if reading.view.slot_shifts is not None and reading.rows in gathered:
            gathered[reading.rows].append(reading)
            continue
        groups.append([reading])
        if reading.view.slot_shifts is not None:
            gathered[reading.rows] = groups[-1]
    return groups


def _gathered(views: Sequence[View], pos: Tensor, window: int | None) -> tuple[Gathered, Tensor]:
    """Return the slots of gathered views that anybody sees, and the mask of rows over them."""
    slots, shifts, masks = [], [], []
    for view in views:
        assert view.slot_shifts is not None
        seen = np.flatnonzero(view.slot_pos != NOWHERE)
        slots.append(seen + view.start)
        shifts.append(view.slot_shifts[seen])
        masks.append(_mask(view, pos, window)[:, torch.from_numpy(seen)])
    found = (torch.from_numpy(np.concatenate(parts)) for parts in (slots, shifts))
    return Gathered(*found), torch.cat(masks, dim=1)


def _tile(pieces: Sequence[Piece], num_rows: int) -> bool:
    """Whether the pieces' rows, one behind the other, are all rows of the step."""
    end = 0
    for piece in pieces:
        if not isinstance(piece.rows, slice) or piece.rows.start != end:
            return False
        end = piece.rows.stop
    return end == num_rows


def _mask(view: View, query_pos: Tensor, window: int | None) -> Tensor:
    key_pos = torch.arange(view.first_pos, view.stop_pos)
    if view.arrays is None:
        return visibility_mask(query_pos, key_pos, window)
    arrays, first_slot = view.arrays
    slots = slice(view.start - first_slot, view.stop - first_slot)
    if arrays.pos is not None:
        key_pos = arrays.pos[slots].to(torch.int64) + view.shift
    mask = visibility_mask(query_pos, key_pos, window)
    return mask if arrays.bias is None else mask + arrays.bias[slots]


def _index(slots: np.ndarray) -> RowIndex:
    """Return slots as a slice where they are neighbours, else as an index tensor."""
    first, last = int(slots[0]), int(slots[-1])
    if last - first + 1 == len(slots) and bool((np.diff(slots) == 1).all()):
        return slice(first, last + 1)
    return torch.from_numpy(slots)
