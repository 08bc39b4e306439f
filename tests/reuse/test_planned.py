"""Planned rows: what is planned is what is chosen, part by part, and nothing else."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvloom.kv.lineage import Lineage
from kvloom.reuse.actions import Part, Recompute, Repair, Shift, Wanted
from kvloom.reuse.planned import planned_rows
from kvloom.reuse.select import StaleRows

LENGTHS = (10, 20, 5, 30)
WANT = Wanted(Lineage.root(b"a model"), tuple(Part((7,) * length, "A") for length in LENGTHS))
EDGES = np.cumsum([0, *LENGTHS])


def stale(places: list[int], seed: int = 0) -> StaleRows:
    place = np.array(sorted(places), dtype=np.int64)
    deviation = np.random.default_rng(seed).random(len(place), dtype=np.float32)
    part = (np.searchsorted(EDGES, place, side="right") - 1).astype(np.int32)
    return StaleRows(place, part, deviation)


shares = st.floats(0, 1)


@given(
    places=st.lists(st.integers(0, 64), unique=True), first=shares, last=shares, seed=st.integers(0)
)
def test_every_part_gets_its_own_share_of_its_own_rows(places, first, last, seed) -> None:
    rows = stale(places, seed)
    repairs = [Repair(1, first, "blend"), Repair(2, 0.4, "given", (1, 4)), Repair(3, last, "first")]
    planned = planned_rows(WANT, [Recompute(0), Shift(1, "a", 0), *repairs])
    chosen = planned.choose(rows, 0)
    assert set(chosen) <= set(places)
    assert list(chosen) == sorted(set(chosen.tolist()))
    assert not (chosen < 10).any()
    assert set(chosen[(chosen >= 30) & (chosen < 35)]) == {31, 34} & set(places)
    inside = np.isin(rows.place, range(10, 30))
    taken = np.isin(rows.place, chosen)
    assert (taken & inside).sum() == min(np.ceil(first * 20), inside.sum())
    if (taken & inside).any() and (~taken & inside).any():
        assert rows.deviation is not None
        assert rows.deviation[taken & inside].min() >= rows.deviation[~taken & inside].max()
    assert planned.count == np.ceil(first * 20) + 2 + np.ceil(last * 30)


def test_what_needs_no_comparing_asks_for_none() -> None:
    assert planned_rows(WANT, [Repair(1, 0.1, "craft", (3, 4))]).check_layer is None
    assert planned_rows(WANT, [Repair(1, 0.1, "random")]).check_layer is None
    assert planned_rows(WANT, [Repair(1, 0.1, "random"), Repair(2, 0.1, "blend")]).check_layer == 1
    assert planned_rows(WANT, []).check_layer is None
    assert len(planned_rows(WANT, []).choose(stale([1, 2]), 0)) == 0
