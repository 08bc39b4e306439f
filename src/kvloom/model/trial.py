"""Trials: runs a fresh runner on a probe text in every way a step may be cut.

Knows: rows, small pools and how far logits may differ.
Does not know: how the runner was assembled.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import PAGE_SLOTS, Pool, block_bytes, blocks_for
from kvloom.types import Forward, LogitsMode, Rows

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Largest difference of logits, as a share of the largest logit, that counts as rounding."""
MOVE = 17
"""Positions by which the probe text is moved: no multiple of a block or window."""


def differs(a: Tensor, b: Tensor, dtype: torch.dtype) -> float:
    """Return the largest difference in units of the tolerance; above 1 is no rounding."""
    if a.shape != b.shape or not bool(torch.isfinite(a).all()):
        return float("inf")
    scale = max(1.0, float(b.abs().max()))
    return float((a.float() - b.float()).abs().max()) / scale / TOLERANCE[dtype]


def check_runner(
    runner: Forward, tokens: Tensor, reference: Tensor, dtype: torch.dtype
) -> tuple[float, str]:
    """Return the worst difference to plain logits, in units of the tolerance, and where it was.

    One step packs a chunk of the text with an unrelated document; further steps go on in chunks
    and end with single tokens, so that state outside the cache and positions that are guessed
    from lengths show.
    """
    ids = tokens.numpy().astype(np.int64)
    pool = _pool(runner, 2 * len(ids), dtype)
    doc, other = KVDoc(pool, Lineage.root(b"probe")), KVDoc(pool, Lineage.root(b"probe"))
    ends = (len(ids) // 2, len(ids) - 5, len(ids) - 2, len(ids) - 1, len(ids))
    cuts = sorted({0, *(end for end in ends if end > 0)})
    worst, where = 0.0, ""
    for number, (start, stop) in enumerate(pairwise(cuts)):
        rows = [_rows(doc, ids, start, stop, "all")]
        more = min(other.length + 7, len(ids))
        if number < 2 and more > other.length:
            rows.insert(0, _rows(other, ids[::-1].copy(), other.length, more, "none"))
        logits = runner.forward(rows).logits[-1]
        if logits is None:
            return float("inf"), "in packed steps"
        difference = differs(logits, reference[start:stop], dtype)
        if difference > worst:
            worst = difference
            where = "in packed rows" if start == 0 else f"when it goes on at token {start}"
    doc.close()
    other.close()
    return worst, where


def relative_positions(runner: Forward, tokens: Tensor, dtype: torch.dtype) -> bool:
    """Say whether the logits stay the same when the whole text stands at later positions."""
    count = min(PAGE_SLOTS, len(tokens), runner.spec.max_positions - MOVE)
    ids = tokens.numpy().astype(np.int64)[: max(count, 2)]
    pool = _pool(runner, 2 * len(ids), dtype)
    results = []
    for offset in (0, MOVE):
        if len(ids) + offset > runner.spec.max_positions:
            return False
        doc = KVDoc(pool, Lineage.root(b"probe"), start_pos=offset)
        pos = np.arange(len(ids), dtype=np.int64) + offset
        results.append(runner.forward([Rows(doc, ids, pos, "all")]).logits[0])
        doc.close()
    first, second = results
    return first is not None and second is not None and differs(second, first, dtype) <= 1


def last_position(runner: Forward, dtype: torch.dtype) -> int:
    """Return the last position that a row can stand at: tables of learned positions end somewhere.

    They are tried, because not every configuration says how many there are.
    """

    def works(pos: int) -> bool:
        doc = KVDoc(pool, Lineage.root(b"probe"), start_pos=pos)
        try:
            runner.forward([Rows(doc, np.zeros(1, np.int64), np.array([pos]), "last")])
        except IndexError:
            return False
        finally:
            doc.close()
        return True

    pool = _pool(runner, 1, dtype)
    low, high = 0, runner.spec.max_positions
    if works(high - 1):
        return high - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low


def _rows(doc: KVDoc, ids: np.ndarray, start: int, stop: int, logits: LogitsMode) -> Rows:
    return Rows(doc, ids[start:stop], np.arange(start, stop, dtype=np.int64), logits)


def _pool(runner: Forward, num_tokens: int, dtype: torch.dtype) -> Pool:
    layers = runner.spec.layers
    return Pool(layers, (blocks_for(num_tokens) + 4) * block_bytes(layers, dtype), dtype)
