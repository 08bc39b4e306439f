"""Cache-Craft: how much of a cached chunk to compute again, from what it attended to when cached.

Knows: attention sums between chunks, kept beside a cached chunk, and the order of chunks now.
Does not know: tensors, models, or how the sums were taken (`kvloom.reuse.mass` takes them).

Source: Agarwal et al. 2025, "Cache-Craft: Managing Chunk-Caches for Efficient RAG",
arXiv 2502.15734; equation numbers are the paper's. Deviations: the system prompt and the attention
sink are no part of the old prefix, since their few tokens would dominate the sums per length; and
where a chunk now stands behind text that it never saw, `fix_overhead` has a floor (see there).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

ALPHA = 0.3
"""Factor on the overhead, which the paper fits to a task (eq. 13) without stating a value.

With it a chunk that was cached alone is repaired by CacheBlend's 15 % (ADR 0017).
"""
FLOOR = 0.5
"""Context impact assumed of text that a chunk never saw: that of a self-contained chunk."""


@dataclass(frozen=True, slots=True)
class Context:
    """The chunks that stand before a chunk, in order.

    Attributes:
        names: what tells chunks apart; the same text has the same name.
        lengths: tokens of each.
    """

    names: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()

    def numbered(self) -> list[tuple[str, int]]:
        """Return the names, each with how often it stood before: a text may occur twice."""
        seen: Counter[str] = Counter()
        names = []
        for name in self.names:
            names.append((name, seen[name]))
            seen[name] += 1
        return names


@dataclass(frozen=True, slots=True)
class ChunkStatistics:
    """What a cached chunk attended to when it was computed; averages over query heads.

    Attributes:
        behind: what stood before it then, without system prompt and sink.
        inter: fp32 (l, m), sums of its rows' attention on each earlier chunk (eq. 3).
        intra: fp32 (l,), the sum of its rows' attention on the chunk itself (eq. 4).
        row_inter: fp32 (n,), each row's attention on all earlier chunks, averaged over layers.
    """

    behind: Context
    inter: np.ndarray
    intra: np.ndarray
    row_inter: np.ndarray

    @property
    def length(self) -> int:
        """Tokens of the chunk."""
        return len(self.row_inter)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.inter.nbytes + self.intra.nbytes + self.row_inter.nbytes


def context_impact(chunk: ChunkStatistics) -> float:
    """Return the cache context impact, 0.5 (self-contained) to 1 (eq. 9 to 11)."""
    lengths = np.array(chunk.behind.lengths, dtype=np.float64)
    outside = float((chunk.inter / (chunk.length * lengths)).sum(axis=1).mean())
    inside = float(chunk.intra.mean()) / chunk.length**2
    if outside == 0.0:
        return 0.5
    return 1.0 / (1.0 + math.exp(-outside / inside)) if inside > 0 else 1.0


def prefix_overlap(chunk: ChunkStatistics, now: Context) -> float:
    """Return beta: the share of the old attention that went to chunks which still precede (eq. 6).

    A chunk that attended to no other lost nothing, so its overlap is 1.
    """
    sums = chunk.inter.sum(axis=0, dtype=np.float64)
    total = float(sums.sum())
    if total == 0.0:
        return 1.0
    here = set(now.numbered())
    kept = [name in here for name in chunk.behind.numbered()]
    return float(sums[kept].sum()) / total


def order_distance(old: Context, now: Context) -> float:
    """Return gamma: the share of common chunk pairs whose order is reversed (Kendall; eq. 7)."""
    place = {name: number for number, name in enumerate(now.numbered())}
    common = [place[name] for name in old.numbered() if name in place]
    pairs = list(combinations(common, 2))
    return sum(a > b for a, b in pairs) / len(pairs) if pairs else 0.0


def unseen_share(old: Context, now: Context) -> float:
    """Return the share of the present context's tokens that the chunk never attended to."""
    seen = set(old.numbered())
    new = [
        length for name, length in zip(now.numbered(), now.lengths, strict=True) if name not in seen
    ]
    return sum(new) / sum(now.lengths) if new else 0.0


def fix_overhead(
    chunk: ChunkStatistics, now: Context, *, alpha: float = ALPHA, floor: float = FLOOR
) -> float:
    """Return the cache fix overhead: the share of the chunk's rows to compute again, 0 to 1.

    alpha · CCI · (1 - beta') with beta' = beta (1 - gamma) (eq. 8 and 12).

    Deviation: that is 0 for a chunk that lost nothing and gained context, for example one that was
    cached alone, although its rows know nothing of what stands before them. So the overhead is at
    least alpha · floor · (share of the present context that it never saw); a floor of 0 gives the
    paper's formula.
    """
    kept = prefix_overlap(chunk, now) * (1.0 - order_distance(chunk.behind, now))
    lost = context_impact(chunk) * (1.0 - kept)
    gained = floor * unseen_share(chunk.behind, now)
    return min(max(alpha * max(lost, gained), 0.0), 1.0)


def best_variant(
    variants: Sequence[ChunkStatistics],
    now: Context,
    *,
    alpha: float = ALPHA,
    floor: float = FLOOR,
) -> tuple[int, float]:
    """Return the variant of a chunk with the least fix overhead, and that; the first of equals."""
    overheads = [fix_overhead(chunk, now, alpha=alpha, floor=floor) for chunk in variants]
    number = min(range(len(overheads)), key=overheads.__getitem__)
    return number, overheads[number]


def rows_to_fix(chunk: ChunkStatistics, overhead: float) -> tuple[int, ...]:
    """Return the rows of a chunk that attended most to what stood before it, ascending (eq. 14)."""
    count = math.ceil(overhead * chunk.length)
    most = np.argsort(-chunk.row_inter, kind="stable")[:count]
    return tuple(sorted(most.tolist()))
