"""What each method repairs; the laws that all planners share are in `tests/contract`."""

from __future__ import annotations

import numpy as np
import pytest

from kvloom.cost import MEMORY, CostModel
from kvloom.errors import RequestError
from kvloom.kv.lineage import Lineage
from kvloom.reuse.actions import Action, Held, Load, Part, Recompute, Repair, Shift, Wanted
from kvloom.reuse.craft import ALPHA, FLOOR, ChunkStatistics, Context, fix_overhead, rows_to_fix
from kvloom.reuse.planner import PLANNERS, Blend, PartPlanner, planner

ROOT = Lineage.root(b"a model")
COST = CostModel(30, 1000, 0.0, 1.0, 0.0, 1.0, 0.0, {"disk": 1e9, "tape": 1100.0})
LONG = tuple(range(100))


def past(names: str, seed: int = 0) -> ChunkStatistics:
    generator = np.random.default_rng(seed)
    count = len(names)
    mass = generator.dirichlet(np.ones(count + 2), (30, len(LONG))).astype(np.float32)
    return ChunkStatistics(
        Context(tuple(names), (50,) * count),
        mass[..., :count].sum(axis=1),
        mass[..., count].sum(axis=1),
        mass[..., :count].sum(axis=2).mean(axis=0),
    )


def plan(name: str, have: list[Held], before: str = "AB", fidelity="repaired") -> list[Action]:
    """Return what is done with a chunk behind others that nobody holds."""
    parts = [Part(tuple(range(50)), one) for one in before]
    want = Wanted(ROOT, (Part((1, 2, 3)), *parts, Part(LONG, "X")))
    actions = planner(name).plan(want, {"X": have}, COST, fidelity)
    number = len(before) + 1
    assert actions[:number] == [Recompute(one) for one in range(number)]
    return actions[number:]


def held(id: str = "x", tier: str = MEMORY, statistics: ChunkStatistics | None = None) -> Held:
    return Held(id, None, 0, tier, statistics)


def test_blend_repairs_the_least_share() -> None:
    assert plan("blend", [held()]) == [Shift(3, "x", 103), Repair(3, 0.15, "blend")]


def test_what_loads_slowly_is_computed() -> None:
    loaded = [Load(3, "x", "disk"), Shift(3, "x", 103), Repair(3, 0.15, "blend")]
    assert plan("blend", [held(tier="disk")]) == loaded
    assert plan("blend", [held(tier="tape")]) == [Recompute(3)]
    assert plan("blend", [held(tier="tape"), held("y")])[0] == Shift(3, "y", 103)


def test_first_repairs_the_first_rows() -> None:
    assert plan("first", [held()])[-1] == Repair(3, 0.04, "first", (0, 1, 2, 3))


def test_craft_follows_the_formulas() -> None:
    statistics = past("CAB")
    now = Context(("A", "B"), (50, 50))
    overhead = fix_overhead(statistics, now)
    assert 0 < overhead < 1
    expected = Repair(3, overhead, "craft", rows_to_fix(statistics, overhead))
    assert plan("craft", [held(statistics=statistics)])[-1] == expected


def test_craft_takes_the_variant_with_the_least_to_repair() -> None:
    have = [held("far", statistics=past("DE")), held("near", statistics=past("AB", 1))]
    assert plan("craft", have) == [Shift(3, "near", 103)]
    assert plan("craft", have, before="DE") == [Shift(3, "far", 103)]


@pytest.mark.parametrize("statistics", [None, past("")])
def test_craft_without_a_past_leaves_the_choice_of_rows_to_values(statistics) -> None:
    shown = [Shift(3, "x", 103), Repair(3, ALPHA * FLOOR, "blend")]
    assert plan("craft", [held(statistics=statistics)]) == shown


def test_craft_leaves_alone_what_lost_and_gained_nothing() -> None:
    assert plan("craft", [held(statistics=past(""))], before="") == [Shift(1, "x", 3)]


def test_an_exact_variant_is_taken_before_a_nearer_one() -> None:
    before = [*(1, 2, 3), *range(50), *range(50)]
    exact = Held("exact", ROOT.extend(before), 103, "disk")
    expected = [Load(3, "exact", "disk"), Shift(3, "exact", 0)]
    for name in PLANNERS:
        for fidelity in ("exact", "repaired", "shifted"):
            assert plan(name, [held(), exact], fidelity=fidelity) == expected


def test_without_a_share_blend_is_naive_joining() -> None:
    want = Wanted(ROOT, (Part((1, 2)), Part(LONG, "X")))
    have = {"X": [held()]}
    nothing = PartPlanner("nothing", Blend(share=0.0)).plan(want, have, COST, "repaired")
    assert nothing == planner("none").plan(want, have, COST, "repaired")


def test_unknown_names_are_named() -> None:
    with pytest.raises(RequestError, match=r"'belnd'.*blend, craft, first, random, none"):
        planner("belnd")


@pytest.mark.parametrize("name", ["blend", "random", "first", "craft"])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_a_share_is_that_of_a_chunk_computed_alone(name: str, share: float) -> None:
    parts = (Part(tuple(range(50)), "A"), Part(LONG, "X"))
    actions = planner(name, share).plan(Wanted(ROOT, parts), {"X": [held()]}, COST, "repaired")
    if share == 1.0:
        assert actions == [Recompute(0), Recompute(1)]
        return
    repairs = [action for action in actions if isinstance(action, Repair)]
    assert [one.share for one in repairs] == ([pytest.approx(share)] if share else [])


def test_only_craft_learns() -> None:
    assert [name for name in PLANNERS if planner(name, 0.3).learns] == ["craft"]
