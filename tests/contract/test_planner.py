"""What every planner must do: cover every part, keep its promises, and repair without a leak.

Plans are carried out on a tiny model, so that laws about keys and values are about real ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.cost import MEMORY, CostModel
from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.plan import placed_at
from kvloom.kv.pool import Pool
from kvloom.kv.span import cut
from kvloom.model.seam import SeamRunner
from kvloom.ops.rope import rotate, shift_table
from kvloom.outputs import Fidelity
from kvloom.reuse.actions import (
    Action,
    Held,
    Load,
    Part,
    Planner,
    Recompute,
    Repair,
    Shift,
    Wanted,
)
from kvloom.reuse.craft import ChunkStatistics, Context
from kvloom.reuse.mass import MassObserver, chunk_statistics
from kvloom.reuse.planned import planned_rows
from kvloom.reuse.planner import PLANNERS
from kvloom.reuse.repair import Repair as Repairing
from kvloom.reuse.repair import stale_rows
from kvloom.types import Rows, SlotRange, Taint
from tests.model.running import ROOT, assert_same, pool_for, prepared, rows_of, some_tokens
from tests.tolerances import TOLERANCE

every_planner = pytest.mark.parametrize("planner", PLANNERS.values(), ids=list(PLANNERS))
NEAR = TOLERANCE["float32"]["observed rows"]
COST = CostModel(
    layers=40,
    kv_bytes_per_token=1,
    pass_s=0.0,
    row_s=1.0,
    pair_s=0.0,
    decode_s=1.0,
    decode_token_s=0.0,
    bytes_per_s={"disk": 100.0},
)
"""Rows take a second, so that what is held is worth taking."""
CHUNKS = {
    name: some_tokens(count, seed)
    for seed, (name, count) in enumerate(zip("ABCD", (30, 25, 40, 20), strict=False))
}
QUESTION = tuple(some_tokens(6, 9).tolist())


def wanted(names: str, changed: dict[str, np.ndarray] | None = None) -> Wanted:
    """Return a prompt of chunks and a question; a changed chunk is one of another name."""
    parts = []
    for name in names:
        tokens = (changed or {}).get(name)
        tokens = CHUNKS[name] if tokens is None else tokens
        parts.append(Part(tuple(tokens.tolist()), name if name not in (changed or {}) else None))
    return Wanted(ROOT, (*parts, Part(QUESTION)))


@dataclass
class World:
    """A tiny model, and chunks that were computed behind others."""

    runner: SeamRunner
    pool: Pool
    held: dict[str, list[Held]] = field(default_factory=dict)
    docs: dict[str, KVDoc] = field(default_factory=dict)

    def hold(self, names: str, tier: str = MEMORY) -> None:
        """Compute chunks one behind the other, and hold the last."""
        tokens = [CHUNKS[name] for name in names]
        whole = KVDoc(self.pool, ROOT)
        edges = np.cumsum([0, *map(len, tokens)]).tolist()
        parts = [SlotRange(a, b) for a, b in itertools.pairwise(edges)]
        pos = np.arange(edges[-1])
        scales = [layer.k_dim**-0.5 for layer in self.runner.spec.layers]
        seen = MassObserver(whole, pos, parts, self.runner.spec, scales)
        self.runner.forward([rows_of(whole, np.concatenate(tokens), logits="none")], observe=seen)
        whole.close_tail()
        last, base = names[-1], edges[-2]
        origin = ROOT.extend(np.concatenate([*tokens[:-1], tokens[0][:0]]).tolist())
        statistics = chunk_statistics([seen.found], parts, names, len(parts) - 1)
        self.held.setdefault(last, []).append(Held(names, origin, base, tier, statistics))
        self.docs[names] = KVDoc(self.pool, ROOT, cut(whole.order, base, edges[-1]), start_pos=base)
        whole.close()

    def carry_out(self, want: Wanted, actions: Sequence[Action]) -> KVDoc:
        """Return the document that a plan makes, the question included."""
        doc = KVDoc(self.pool, want.root)
        for action in actions:
            if isinstance(action, Shift):
                source = self.docs[action.held]
                assert doc.end_pos - source.start_pos == action.distance
                doc.extend(placed_at(source.order, doc.end_pos))
            elif isinstance(action, Recompute):
                if action.part == len(want.parts) - 1:
                    self.repair(doc, want, actions)
                tokens = np.array(want.parts[action.part].tokens, dtype=np.int64)
                self.runner.forward([rows_of(doc, tokens, logits="none")])
        return doc

    def repair(self, doc: KVDoc, want: Wanted, actions: Sequence[Action]) -> None:
        planned = planned_rows(want, actions)
        stale = len(stale_rows(doc).place)
        if planned.count:
            repairing = Repairing(doc, planned.count / stale, planned, 17)
            while not repairing.finished:
                repairing.advance(self.runner)

    def fresh(self, want: Wanted) -> KVDoc:
        """Return what a fresh prefill makes."""
        doc = KVDoc(self.pool, want.root)
        tokens = [token for part in want.parts for token in part.tokens]
        self.runner.forward([rows_of(doc, np.array(tokens, dtype=np.int64), logits="none")])
        return doc

    def shown(self, doc: KVDoc) -> list[Tensor]:
        """Return per layer what a document shows: keys where they stand now beside values."""
        doc.close_tail()
        found = []
        for spec in self.runner.spec.layers:
            assert spec.rope is not None
            pieces = []
            for span in doc.order:
                k, v = doc.pool.read(spec.index, *span.pool_slots)
                k = rotate(k, *shift_table(spec.rope, span.shift), spec.rope)
                pieces.append(torch.cat([k, v], dim=-1))
            found.append(torch.cat(pieces, dim=1))
        return found


@lru_cache(maxsize=1)
def world() -> World:
    runner = prepared("llama")[1]
    made = World(runner, pool_for(runner, 100))
    for names in ("A", "B", "C", "D", "AB", "BAC", "ABD"):
        made.hold(names)
    return made


def planned(planner: Planner, want: Wanted, fidelity: Fidelity = "repaired") -> list[Action]:
    return planner.plan(want, world().held, COST, fidelity)


def logits_behind(doc: KVDoc) -> Tensor:
    pos = np.arange(doc.end_pos, doc.end_pos + 5)
    rows = Rows(doc, some_tokens(5, 77), pos, "all", "none")
    (logits,) = world().runner.forward([rows]).logits
    assert logits is not None
    return logits


def rows_repaired(want: Wanted, doc: KVDoc) -> np.ndarray:
    """Return the places whose rows stand in overlays."""
    taints = [np.full(span.length, Taint.REPAIRED in taint) for span, taint in doc.taints()]
    return np.flatnonzero(np.concatenate(taints))


def close(found: Tensor, expected: Tensor) -> bool:
    return bool(torch.allclose(found, expected, atol=NEAR * 10, rtol=NEAR * 10))


@every_planner
@pytest.mark.parametrize("names", ["ABC", "CBA", "BD", "DD", "A"])
def test_exact_equals_a_fresh_prefill(planner: Planner, names: str) -> None:
    want = wanted(names)
    doc = world().carry_out(want, planned(planner, want, "exact"))
    truth = world().fresh(want)
    assert doc.exact_length() == doc.length
    assert_same(logits_behind(doc), logits_behind(truth))
    doc.close()
    truth.close()


@every_planner
def test_a_true_prefix_is_taken_as_it_is(planner: Planner) -> None:
    want = wanted("ABC")
    actions = planned(planner, want)
    assert actions[:2] == [Shift(0, "A", 0), Shift(1, "AB", 0)]
    doc = world().carry_out(want, actions)
    assert doc.exact_length() == len(CHUNKS["A"]) + len(CHUNKS["B"])
    truth = world().fresh(want)
    count = doc.exact_length()
    for found, expected in zip(world().shown(doc), world().shown(truth), strict=True):
        assert close(found[:, :count], expected[:, :count])
    doc.close()
    truth.close()


@every_planner
def test_no_row_sees_what_stands_behind_it(planner: Planner) -> None:
    """Another text in the last chunk's place changes nothing that stands before it."""
    want = wanted("CBD")
    other = wanted("CBD", {"D": some_tokens(len(CHUNKS["D"]), 55)})
    kept = len(CHUNKS["C"]) + len(CHUNKS["B"])
    docs = [world().carry_out(one, planned(planner, one)) for one in (want, other)]
    repaired = [rows_repaired(want, doc) for doc in docs]
    assert np.array_equal(*(rows[rows < kept] for rows in repaired))
    assert len(repaired[0]) > 0 or planner.name == "none"
    for first, second in zip(*(world().shown(doc) for doc in docs), strict=True):
        assert close(first[:, :kept], second[:, :kept])
    for doc in docs:
        doc.close()


@every_planner
def test_repaired_rows_see_everything_before_them(planner: Planner) -> None:
    """Another first chunk changes every repaired row of the next, and no other row of it."""
    want = wanted("CB")
    other = wanted("CB", {"C": some_tokens(len(CHUNKS["C"]), 55)})
    docs = [world().carry_out(one, planned(planner, one)) for one in (want, other)]
    both = [set(rows_repaired(want, doc).tolist()) for doc in docs]
    start, stop = len(CHUNKS["C"]), len(CHUNKS["C"]) + len(CHUNKS["B"])
    last = [world().shown(doc)[-1] for doc in docs]
    for place in range(start, stop):
        same = close(last[0][:, place], last[1][:, place])
        if place in both[0] and place in both[1]:
            assert not same
        elif place not in both[0] and place not in both[1]:
            assert same
    for doc in docs:
        doc.close()


def test_repairing_everything_equals_a_fresh_prefill() -> None:
    want = wanted("CBD")
    shown = [a for a in planned(PLANNERS["none"], want) if not isinstance(a, Recompute)]
    repairs = [Repair(number, 1.0, "blend") for number in range(3)]
    doc = world().carry_out(want, [*shown, *repairs, Recompute(3)])
    truth = world().fresh(want)
    for found, expected in zip(world().shown(doc), world().shown(truth), strict=True):
        assert close(found, expected)
    doc.close()
    truth.close()


@every_planner
def test_shifted_repairs_nothing(planner: Planner) -> None:
    for names in ("CBA", "DCBA", "BB"):
        want = wanted(names)
        actions = planned(planner, want, "shifted")
        assert actions == planned(PLANNERS["none"], want)
        assert not any(isinstance(action, Repair) for action in actions)


@every_planner
def test_two_chunks_permuted_and_back_give_the_same_plan(planner: Planner) -> None:
    first, between, again = (planned(planner, wanted(names)) for names in ("CBA", "BCA", "CBA"))
    assert first == again
    assert first != between
    docs = [world().carry_out(wanted("CBA"), plan) for plan in (first, again)]
    for a, b in zip(*(world().shown(doc) for doc in docs), strict=True):
        assert torch.equal(a, b)
    for doc in docs:
        doc.close()


statistics = st.builds(
    lambda behind, rows, seed: ChunkStatistics(
        Context(tuple(behind), (9,) * len(behind)),
        np.random.default_rng(seed).random((4, len(behind)), dtype=np.float32),
        np.random.default_rng(seed).random(4, dtype=np.float32),
        np.random.default_rng(seed).random(rows, dtype=np.float32),
    ),
    st.lists(st.sampled_from("ABCD"), max_size=3),
    st.just(5),
    st.integers(0, 99),
)
origins = st.sampled_from(
    [None, ROOT, ROOT.extend([7] * 5), ROOT.extend([7] * 10), Lineage.root(b"another model")]
)
variants = st.builds(
    Held,
    id=st.text("xyz", min_size=1, max_size=3),
    origin=origins,
    base=st.integers(0, 12),
    tier=st.sampled_from([MEMORY, "disk", "moon"]),
    statistics=st.none() | statistics,
)
costs = st.builds(
    CostModel,
    layers=st.just(4),
    kv_bytes_per_token=st.integers(1, 1000),
    pass_s=st.floats(0, 10),
    row_s=st.floats(0, 1),
    pair_s=st.floats(0, 1),
    decode_s=st.just(1.0),
    decode_token_s=st.just(0.0),
    bytes_per_s=st.just({"disk": 50.0}),
)


@every_planner
@given(
    names=st.lists(st.sampled_from(["A", "B", "C", None]), max_size=5),
    have=st.dictionaries(st.sampled_from("ABC"), st.lists(variants, max_size=3)),
    cost=costs,
    fidelity=st.sampled_from(["exact", "repaired", "shifted"]),
    movable=st.booleans(),
)
def test_plans_are_complete_and_keep_their_promises(
    planner, names, have, cost, fidelity, movable
) -> None:
    parts = tuple(Part((7,) * 5, name) for name in names)
    want = Wanted(ROOT, parts, movable=movable)
    actions = planner.plan(want, have, cost, fidelity)
    assert actions == planner.plan(want, have, cost, fidelity)
    done: dict[int, list[Action]] = {}
    for action in actions:
        done.setdefault(action.part, []).append(action)
    assert list(done) == list(range(len(parts)))
    for number, steps in done.items():
        kinds = "".join(type(step).__name__[0] for step in steps)
        if len(steps) == 1 and isinstance(steps[0], Recompute):
            continue
        assert kinds in {"S", "SR", "LS", "LSR"}
        check_shown(want, have, cost, fidelity, number, steps)


def check_shown(want, have, cost, fidelity, number, steps) -> None:
    """Check what is done with one part that is shown."""
    (shift,) = (step for step in steps if isinstance(step, Shift))
    load = next((step for step in steps if isinstance(step, Load)), None)
    repair = next((step for step in steps if isinstance(step, Repair)), None)
    assert repair is None or fidelity == "repaired"
    start = 5 * number
    fits = []
    for held in have[want.parts[number].chunk]:
        if held.id != shift.held or held.base + shift.distance != start:
            continue
        exact = held.origin == ROOT.extend([7] * start) and shift.distance == 0
        tier = MEMORY if load is None else load.tier
        fits.append(
            held.tier == tier
            and (exact or fidelity != "exact")
            and (want.movable or shift.distance == 0)
            and cost.load_s(5, held.tier) < cost.prefill_s(5, start)
        )
    assert any(fits)
    if repair is not None and repair.rows is not None:
        assert set(repair.rows) < set(range(5))


@every_planner
def test_what_is_faster_to_compute_is_computed(planner: Planner) -> None:
    want = Wanted(ROOT, (Part((7,) * 50, "A"), Part((8, 9), "B")))
    have = {"A": [Held("a", None, 3, "disk")], "B": [Held("b", None, 3, "disk")]}
    slow = CostModel(4, 1, 1.0, 0.01, 0.0, 1.0, 0.0, {"disk": 0.1})
    assert planner.plan(want, have, slow, "repaired") == [Recompute(0), Recompute(1)]
    # A pass costs as much as a hundred rows: comparing two rows first, or all of them, is no gain.
    quick = CostModel(4, 1, 1.0, 0.01, 0.0, 1.0, 0.0, {"disk": 1e9})
    planned = planner.plan(want, have, quick, "repaired")
    assert (Recompute(1) in planned) == (planner.name in {"blend", "craft", "first"})
