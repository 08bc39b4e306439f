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
from kvloom.ops.rope import rotate, shift_table, shift_tables
from kvloom.types import LayerSpec, Partial, Rope

RowIndex = slice | Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """One stretch of slots with the rows that read it.

    Attributes:
        start: first slot in the pool.
        stop: slot behind the last.
        rows: packed rows, as a slice where they are neighbours.
        shift: position of the keys now minus the position they were rotated at.
        causal: row i sees slots 0..i only.
        mask: fp32 added to the logits; None if every row sees every slot.
        turned: slots that are read and the shift of each, by which its key is turned; None where
            all are, and one query turned by `shift` serves them.
        alone: no other piece is read by these rows.
    """

    start: int
    stop: int
    rows: RowIndex
    shift: int
    causal: bool
    mask: Tensor | None
    turned: tuple[Tensor, Tensor] | None
    alone: bool


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
        turns: cos and sin of every query turn, by shift and rope.
    """

    pool: Pool
    num_rows: int
    pos: Tensor
    write_slots: RowIndex
    pieces: dict[int | None, tuple[Piece, ...]]
    tiled: frozenset[int | None]
    turns: dict[tuple[int, Rope], tuple[Tensor, Tensor]]


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
    if piece.shift and layer.rope is not None:
        turn = plan.turns.get((piece.shift, layer.rope))
        if turn is None:
            turn = shift_table(layer.rope, -piece.shift, q.device)
            plan.turns[piece.shift, layer.rope] = turn
        q = rotate(q, *turn, layer.rope)
    k, v = plan.pool.read(layer.index, piece.start, piece.stop)
    if piece.turned is not None:
        slots, shifts = piece.turned
        k, v = k[:, slots], v[:, slots]
        if layer.rope is not None:
            k = rotate(k, *shift_tables(layer.rope, shifts), layer.rope)
    return attend(
        q,
        k,
        v,
        scale=scale,
        mask=piece.mask,
        causal=piece.causal,
        softcap=layer.softcap,
    )


def _pieces(readings: Sequence[Reading], pos: Tensor, window: int | None) -> tuple[Piece, ...]:
    readers = np.zeros(len(pos), dtype=np.int32)
    for reading in readings:
        for start, stop in reading.rows:
            readers[start:stop] += 1
    pieces = []
    for reading in sorted(readings, key=lambda reading: reading.rows):
        start, stop = reading.rows[0]
        rows: RowIndex = slice(start, stop)
        if len(reading.rows) > 1:
            rows = torch.cat([torch.arange(*part) for part in reading.rows])
        mask = _mask(reading.view, pos[rows], window) if reading.visibility == "mask" else None
        alone = all(bool((readers[a:b] == 1).all()) for a, b in reading.rows)
        view = reading.view
        causal = reading.visibility == "causal"
        turned = _turned(view)
        if turned is not None and mask is not None:
            mask = mask[:, turned[0]]
        pieces.append(Piece(view.start, view.stop, rows, view.shift, causal, mask, turned, alone))
    return tuple(pieces)


def _turned(view: View) -> tuple[Tensor, Tensor] | None:
    """Return the slots of a gathered view that anybody sees, from its first one on, and shifts."""
    if view.slot_shifts is None:
        return None
    slots = np.flatnonzero(view.slot_pos != NOWHERE)
    return torch.from_numpy(slots), torch.from_numpy(view.slot_shifts[slots])


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
