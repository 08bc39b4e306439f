"""Attention mass: how much of each row's attention goes to which stretch of a document, exactly.

Knows: the queries of a pass, the document's own keys, and that attention is a fold over pieces.
Does not know: what the sums are good for.

No attention matrix is kept: a piece's share of a row is exp(lse of the piece - lse of all), so one
pass over rows and keys in blocks gives every sum. Where a span has moved the query is turned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvloom.errors import UnsupportedModelError
from kvloom.kv.doc import KVDoc
from kvloom.kv.segment import visibility_mask
from kvloom.kv.views import View, views_of
from kvloom.ops.partial import MIN_LOGIT
from kvloom.ops.rope import rotate, shift_table
from kvloom.reuse.craft import ChunkStatistics, Context
from kvloom.types import LayerSpec, ModelSpec, SlotRange

BLOCK_ROWS = 128
"""Rows whose logits exist at a time."""
BLOCK_KEYS = 1024
"""Keys whose logits exist at a time."""


@dataclass(frozen=True, slots=True)
class RowMass:
    """What rows of a document attended to.

    Attributes:
        pos: int64 positions of the rows, shape (s,).
        mass: fp32 (l, s, p + 1), averages over query heads: shares of the p stretches, and of
            everything else; a row of a layer sums to 1.
    """

    pos: np.ndarray
    mass: np.ndarray


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring keys of one stretch, at ascending positions."""

    start: int
    stop: int
    part: int
    shift: int
    pos: Tensor
    bias: Tensor | None


class MassObserver:
    """Takes the attention mass of the rows that one pass runs.

    Args:
        doc: whose rows run; if they leave no trace, their keys are those it already shows.
        pos: int64 positions of the rows, in the order they run.
        parts: stretches of positions, ascending and disjoint.
        spec: what the model is.
        scales: factor on q·k per layer.

    Raises:
        UnsupportedModelError: a learned sink takes a share that no query shows.
    """

    def __init__(
        self,
        doc: KVDoc,
        pos: np.ndarray,
        parts: Sequence[SlotRange],
        spec: ModelSpec,
        scales: Sequence[float],
    ) -> None:
        if any(layer.sinks for layer in spec.layers):
            raise UnsupportedModelError(
                "The model adds learned sinks to its attention, whose share cannot be seen from "
                "queries and keys; choose rows by `blend`, which needs no attention."
            )
        self._doc = doc
        self._pos = torch.from_numpy(pos)
        self._parts = parts
        self._layers = spec.layers
        self._scales = scales
        self._pieces: list[_Piece] = []
        shape = (len(spec.layers), len(pos), len(parts) + 1)
        self.found = RowMass(pos, np.full(shape, np.nan, dtype=np.float32))

    def observe(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Take the mass of one layer's rows, q (h, s, d) rotated at their positions."""
        if not self._pieces:
            self._pieces = list(_pieces(self._doc, self._parts))
        spec, q = self._layers[layer], q.float() * self._scales[layer]
        sums = q.new_full((*q.shape[:2], len(self._parts) + 1), -torch.inf)
        for piece in self._pieces:
            self._add(sums, spec, q, piece)
        self.found.mass[layer] = torch.softmax(sums, dim=-1).mean(dim=0).cpu().numpy()

    def _add(self, sums: Tensor, spec: LayerSpec, q: Tensor, piece: _Piece) -> None:
        """Add one piece to the logarithms (h, s, p + 1) of what rows see of every stretch."""
        keys, _ = self._doc.pool.read(spec.index, piece.start, piece.stop)
        keys = keys.float().transpose(1, 2)
        if piece.shift and spec.rope is not None:
            q = rotate(q, *shift_table(spec.rope, -piece.shift, q.device), spec.rope)
        oldest, newest = int(piece.pos[0]), int(piece.pos[-1])
        for start in range(0, q.shape[1], BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            pos = self._pos[rows]
            low, high = int(pos.min()), int(pos.max())
            if oldest > high or (spec.window is not None and newest <= low - spec.window):
                continue
            mask = piece.bias
            if newest > low or (spec.window is not None and oldest <= high - spec.window):
                hidden = visibility_mask(pos, piece.pos, spec.window)
                mask = hidden if mask is None else hidden + mask
            seen = sums[:, rows, piece.part]
            lse = _log_sums(q[:, rows], keys, mask, spec.softcap)
            sums[:, rows, piece.part] = torch.logaddexp(seen, lse)


def _log_sums(q: Tensor, keys: Tensor, mask: Tensor | None, softcap: float | None) -> Tensor:
    """Return log of the summed exponentials (h, s) of scaled queries over keys (g, d, t)."""
    heads, rows, dim = q.shape
    logits = torch.bmm(q.reshape(keys.shape[0], -1, dim), keys).reshape(heads, rows, -1)
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        logits += mask
    lse = torch.logsumexp(logits, dim=-1)
    return lse.masked_fill(lse <= MIN_LOGIT / 2, -torch.inf)


def chunk_statistics(
    rows: Sequence[RowMass],
    parts: Sequence[SlotRange],
    names: Sequence[str],
    number: int,
) -> ChunkStatistics:
    """Return what chunk `number` of the stretches attended to, of passes that ran all its rows."""
    chunk = parts[number]
    inside = [(one.pos >= chunk.start) & (one.pos < chunk.stop) for one in rows]
    pos = np.concatenate([one.pos[own] for one, own in zip(rows, inside, strict=True)])
    mass = np.concatenate([one.mass[:, own] for one, own in zip(rows, inside, strict=True)], axis=1)
    order = np.argsort(pos, kind="stable")
    assert np.array_equal(pos[order], np.arange(*chunk)), "not every row of the chunk ran once"
    mass = mass[:, order]
    earlier = mass[..., :number]
    behind = Context(tuple(names[:number]), tuple(part.length for part in parts[:number]))
    return ChunkStatistics(
        behind=behind,
        inter=earlier.sum(axis=1),
        intra=mass[..., number].sum(axis=1),
        row_inter=earlier.sum(axis=2).mean(axis=0),
    )


def _pieces(doc: KVDoc, parts: Sequence[SlotRange]) -> Iterator[_Piece]:
    """Yield what a document shows, cut where stretches begin or end and into blocks."""
    edges = np.array([edge for part in parts for edge in part], dtype=np.int64)
    for view in views_of(doc):
        pos, bias = _arrays(view)
        # Even numbers lie between stretches.
        cell = np.searchsorted(edges, pos.numpy(), side="right")
        cuts = [0, *(np.flatnonzero(np.diff(cell)) + 1).tolist(), len(cell)]
        for low, high in itertools.pairwise(cuts):
            part = int(cell[low]) // 2 if cell[low] % 2 else len(parts)
            for first in range(low, high, BLOCK_KEYS):
                stop = min(first + BLOCK_KEYS, high)
                yield _Piece(
                    view.start + first,
                    view.start + stop,
                    part,
                    view.shift,
                    pos[first:stop],
                    None if bias is None else bias[first:stop],
                )


def _arrays(view: View) -> tuple[Tensor, Tensor | None]:
    """Return positions now, int64, and biases of a view's slots."""
    pos, bias = torch.arange(view.first_pos, view.stop_pos), None
    if view.arrays is not None:
        arrays, first = view.arrays
        slots = slice(view.start - first, view.stop - first)
        if arrays.pos is not None:
            pos = arrays.pos[slots].to(torch.int64) + view.shift
        if arrays.bias is not None:
            bias = arrays.bias[slots].float()
    return pos, bias
