"""Calibration: measures what passes and loads take on this machine, once, and remembers it.

Knows: a loaded model, a scratch pool, clocks, and where the figures are kept.
Does not know: who asks; nothing is measured at a start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from kvloom.cost import CostModel, Timing, fit_decode, fit_prefill, worst_error
from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import PAGE_SLOTS, Pool, block_bytes, blocks_for
from kvloom.model.digest import cache_root, write_json
from kvloom.model.open import OpenedModel
from kvloom.types import Rows

logger = logging.getLogger(__name__)
FORMAT_VERSION = 1
BUDGET_S = 1.0
"""Seconds that the passes of a calibration may take, about."""
SHAPES = ((8, 0), (48, 0), (192, 0), (16, 2048), (48, 1024))
"""Rows and cached tokens of the passes that are fitted; fewer rows where the budget is short."""
HELD_OUT = ((96, 512),)
"""Of the passes that the fit is checked by."""
DECODES = (16, 1024, 2048)
"""Cached tokens of the passes of one row."""
SHORTEST = 4
LEAST_SHARE = 0.25
"""Of the rows above: fewer say little, so that a slow runner takes longer than the budget."""
LEAST_R2 = 0.9
REPEATED = 3
"""Times that a pass runs; the fastest counts, since other processes only ever slow it down."""
COPIED_BYTES = 16 * 2**20
Clock = Callable[[], float]


def cost_model(opened: OpenedModel, cache_dir: Path | None = None) -> CostModel:
    """Return the cost model of an open model on this machine, measured now if nobody did before.

    What fits badly, since others kept the machine busy, is used now and measured again next time.
    """
    path = _path(opened, cache_dir)
    known = _known(path)
    if known is not None:
        return known
    found = calibrate(opened, cache_dir)
    if found.r2 < LEAST_R2:
        logger.info("the machine was too busy to measure: the fit has an R² of %.2f", found.r2)
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, json.loads(found.to_json()))
    except OSError as error:
        logger.warning("the measured costs cannot be kept, so they are measured again: %s", error)
    return found


def calibrate(
    opened: OpenedModel,
    cache_dir: Path | None = None,
    *,
    budget_s: float = BUDGET_S,
    clock: Clock = time.perf_counter,
) -> CostModel:
    """Measure passes and loads, and return what fits them.

    It must not run beside the steps of an engine: a runner runs one pass at a time.
    """
    scratch = _Scratch(opened, clock)
    scale = scratch.affordable_share(budget_s)
    fitted = [scratch.timing(max(SHORTEST, int(rows * scale)), cached) for rows, cached in SHAPES]
    checked = [
        scratch.timing(max(SHORTEST, int(rows * scale)), cached) for rows, cached in HELD_OUT
    ]
    decodes = [scratch.timing(1, cached) for cached in DECODES]
    kv_bytes = scratch.pool.block_bytes // PAGE_SLOTS
    pass_s, row_s, pair_s, r2 = fit_prefill(fitted)
    decode_s, decode_token_s = fit_decode(decodes)
    model = CostModel(
        layers=len(opened.runner.spec.layers),
        kv_bytes_per_token=kv_bytes,
        pass_s=pass_s,
        row_s=row_s,
        pair_s=pair_s,
        decode_s=decode_s,
        decode_token_s=decode_token_s,
        bytes_per_s=load_rates(cache_root(cache_dir), clock),
        r2=r2,
    )
    return replace(model, error=worst_error(model, checked))


def load_rates(folder: Path, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Return bytes per second from memory beside the pool (`ram`) and from a folder (`disk`).

    A file that was just written may be read from the system's own memory, so its pages are given
    up first where the system lets us; without that the disk's rate is that of a warm file.
    """
    source = np.ones(COPIED_BYTES, dtype=np.uint8)
    goal = np.zeros_like(source)
    start = clock()
    goal[:] = source
    rates = {"ram": COPIED_BYTES / max(clock() - start, 1e-9)}
    try:
        rates["disk"] = COPIED_BYTES / max(_read_s(folder, source, clock), 1e-9)
    except OSError as error:
        logger.warning("the disk's rate is unknown, so nothing is loaded from it: %s", error)
    return rates


def _read_s(folder: Path, content: np.ndarray, clock: Clock) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        file.write(content.tobytes())
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = clock()
        while file.read(4 * 2**20):
            pass
        return clock() - start


class _Scratch:
    """A pool of random keys and values, behind which passes are timed.

    What a pass takes does not depend on the numbers it reads, so nothing cached is computed.
    """

    def __init__(self, opened: OpenedModel, clock: Clock) -> None:
        spec = opened.runner.spec
        self._runner, self._clock = opened.runner, clock
        self._longest = min(max(map(sum, SHAPES)) + 1, spec.max_positions)
        size = (blocks_for(self._longest) + 1) * block_bytes(spec.layers, opened.kv_dtype)
        self.pool = Pool(spec.layers, size, opened.kv_dtype, layout=opened.layout)
        generator = torch.Generator().manual_seed(0)
        for arena in (*self.pool.keys, *self.pool.values):
            if arena.is_floating_point():  # codes mean something whatever they are
                arena.normal_(generator=generator)
        self._tokens = np.random.default_rng(0).integers(
            0, spec.vocab_size, self._longest, dtype=np.int64
        )

    def affordable_share(self, budget_s: float) -> float:
        """Return the share of the intended rows, at most 1, that a budget allows."""
        self.timing(SHORTEST, 0)  # the first pass touches everything for the first time
        probe = self.timing(4 * SHORTEST, 0)
        rows = REPEATED * sum(rows for rows, _ in (*SHAPES, *HELD_OUT))
        share = budget_s / (probe.seconds / probe.rows * rows)
        return min(1.0, max(share, LEAST_SHARE))

    def timing(self, rows: int, cached: int) -> Timing:
        """Return the least time of some passes of rows behind cached tokens."""
        cached = max(0, min(cached, self._longest - rows))
        rows = min(rows, self._longest - cached)
        doc = KVDoc(self.pool, Lineage.root(b"calibration"))
        doc.append(self._tokens[:cached].tolist())
        seconds = min(self._timed(doc, rows) for _ in range(REPEATED))
        doc.close()
        return Timing(rows, cached, max(seconds, 1e-9))

    def _timed(self, doc: KVDoc, rows: int) -> float:
        cached = doc.length
        pos = np.arange(cached, cached + rows, dtype=np.int64)
        start = self._clock()
        self._runner.forward([Rows(doc, self._tokens[pos], pos, "last")])
        elapsed = self._clock() - start
        doc.truncate(cached)
        return elapsed


def _path(opened: OpenedModel, cache_dir: Path | None) -> Path:
    key: Mapping[str, object] = {
        "format": FORMAT_VERSION,
        "fingerprint": opened.passport.fingerprint.hex(),
        "runner": opened.runner_name,
        "threads": torch.get_num_threads(),
        "machine": [platform.node(), platform.machine(), platform.processor(), os.cpu_count()],
    }
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
    return cache_root(cache_dir) / "costs" / f"{digest}.json"


def _known(path: Path) -> CostModel | None:
    """Return remembered costs; damaged ones are said so and count as none."""
    try:
        return CostModel.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        logger.warning("the costs in %s cannot be used (%s); measuring again", path, error)
        return None
