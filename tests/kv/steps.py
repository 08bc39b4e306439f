"""Rows that are about to run over a world's documents.

Knows: how rows of several kinds are appended, and where they stand.
Does not know: how they are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from kvloom.kv.doc import KVDoc
from kvloom.kv.fold import FoldPlan, plan_fold
from tests.kv.worlds import MIXED, World

WINDOWS = {layer.window for layer in MIXED}


@dataclass(frozen=True)
class Step:
    """The rows of one step, appended but not written yet."""

    docs: list[KVDoc]
    pos: list[np.ndarray]
    slots: list[np.ndarray]

    @property
    def packed_pos(self) -> np.ndarray:
        return np.concatenate(self.pos)

    def plan(self, windows=WINDOWS) -> FoldPlan:
        return plan_fold(self.docs, self.pos, self.slots, windows)

    def parts(self) -> list[tuple[KVDoc, slice]]:
        edges = np.cumsum([0, *(len(pos) for pos in self.pos)])
        return [(doc, slice(a, b)) for doc, a, b in zip(self.docs, edges, edges[1:], strict=False)]


def take_rows(world: World, doc: KVDoc, kind: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Append rows of a kind to a document; return their positions and slots."""
    count = 1 if kind == "decode" else count
    end = world.end_pos(doc)
    slots = world.append_unwritten(doc, count)
    if kind == "scattered":
        lowest = min(-3, end)  # a moved document may stand left of zero
        return world.random.integers(lowest, end + count, count), slots
    return np.arange(end, end + count), slots


def step_of(world: World, wanted: list[tuple[str, int]]) -> Step:
    docs = world.docs[: len(wanted)]
    rows = [take_rows(world, doc, *entry) for doc, entry in zip(docs, wanted, strict=False)]
    return Step(docs, [pos for pos, _ in rows], [slots for _, slots in rows])


row_kinds = st.tuples(st.sampled_from(["decode", "chunk", "scattered"]), st.integers(1, 24))
steps = st.lists(row_kinds, min_size=1, max_size=5)
