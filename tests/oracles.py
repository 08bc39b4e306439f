"""Slow, obvious attention and rotation in fp64: what the pure functions are held against.

Knows: the textbook formulas, one vector and one row at a time.
Does not know: pieces, partials, views or plans.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kvloom.types import Rope

HIDDEN = -1e29
"""A bias at or below this hides a slot."""


class Attended(NamedTuple):
    """Weighted values and the logarithm of the sum of exponentials, in fp64."""

    o: np.ndarray
    lse: np.ndarray


Position = float | np.ndarray


def turned(x: np.ndarray, position: Position, rope: Rope) -> np.ndarray:
    """Return vectors (..., d) turned by a position, pair by pair, without the rope's scaling.

    Several positions (s,) turn the rows of x (..., s, d), each by its own.
    """
    x = np.asarray(x, dtype=np.float64)
    out = x.copy()
    num = len(rope.inv_freq)
    for pair, frequency in enumerate(rope.inv_freq):
        a, b = (pair, pair + num) if rope.layout == "half" else (2 * pair, 2 * pair + 1)
        a, b = a + rope.first_dim, b + rope.first_dim
        cos, sin = np.cos(position * frequency), np.sin(position * frequency)
        out[..., a] = x[..., a] * cos - x[..., b] * sin
        out[..., b] = x[..., b] * cos + x[..., a] * sin
    return out


def embedded(x: np.ndarray, position: Position, rope: Rope | None) -> np.ndarray:
    """Return vectors (..., d) as a model would embed them: turned, and scaled where rotated."""
    if rope is None:
        return np.asarray(x, dtype=np.float64)
    out = turned(x, position, rope)
    out[..., rope.first_dim : rope.first_dim + rope.num_dims] *= rope.scaling
    return out


def attend_row(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    bias: np.ndarray | None = None,
    softcap: float | None = None,
    sink: np.ndarray | None = None,
) -> Attended:
    """Return the softmax attention of one row q (h, d) over k (g, t, d) and v (g, t, dv).

    Slots whose bias hides them take no part; with none left, o is 0 and lse is -inf.
    """
    heads, dim_v = q.shape[0], v.shape[-1]
    repeat = heads // k.shape[0]
    seen = np.ones(k.shape[1], dtype=bool) if bias is None else bias > HIDDEN
    o, lse = np.zeros((heads, dim_v)), np.full(heads, -np.inf)
    if not seen.any():
        return Attended(o, lse)
    for head in range(heads):
        logits = k[head // repeat][seen].astype(np.float64) @ q[head].astype(np.float64) * scale
        if softcap is not None:
            logits = np.tanh(logits / softcap) * softcap
        if bias is not None:
            logits = logits + bias[seen]
        top = max(logits.max(), -np.inf if sink is None else float(sink[head]))
        weights = np.exp(logits - top)
        total = weights.sum()
        lse[head] = top + math.log(total)
        if sink is not None:
            total += math.exp(float(sink[head]) - top)
        o[head] = weights @ v[head // repeat][seen].astype(np.float64) / total
    return Attended(o, lse)


def attend_rows(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    scale: float,
    bias: np.ndarray | None = None,
    softcap: float | None = None,
    sink: np.ndarray | None = None,
) -> Attended:
    """Return `attend_row` for every row of q (h, s, d); `bias` is (s, t)."""
    rows = [
        attend_row(
            q[:, row],
            k,
            v,
            scale=scale,
            bias=None if bias is None else bias[row],
            softcap=softcap,
            sink=sink,
        )
        for row in range(q.shape[1])
    ]
    return Attended(
        np.stack([row.o for row in rows], axis=1), np.stack([row.lse for row in rows], axis=1)
    )
