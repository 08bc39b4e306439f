"""A read plan shows every row what it may see, each slot once, in items that threads can share."""

from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.kv.doc import KVDoc
from kvloom.kv.reads import ReadPlan, plan_reads
from kvloom.kv.views import View, row_ranges
from tests.kv.steps import Step, step_of, steps
from tests.kv.worlds import PLAIN, World, shown_slots, worlds
from tests.oracles import HIDDEN

Pairs = Counter[tuple[int, int, int]]
windows = st.sampled_from([None, None, 1, 20, 70, 300])
rows_per_item = st.sampled_from([1, 2, 5, 16, 96])


def slots_of(view: View) -> list[tuple[int, int, int]]:
    """Return each slot of a view that is no hole, with the position it stands at and its shift."""
    pos = None if view.arrays is None else view.arrays[0].pos
    bias = None if view.arrays is None else view.arrays[0].bias
    found = []
    for number, slot in enumerate(range(view.start, view.stop)):
        if bias is not None and view.arrays and bias[slot - view.arrays[1]] <= HIDDEN:
            continue
        shift = view.shift if view.slot_shifts is None else int(view.slot_shifts[number])
        if pos is None or view.arrays is None:
            found.append((slot, view.first_pos + number, shift))
        else:
            found.append((slot, int(pos[slot - view.arrays[1]]) + view.shift, shift))
    return found


def sees(position: int, key_pos: int, window: int | None) -> bool:
    return key_pos <= position and (window is None or key_pos > position - window)


def planned_pairs(plan: ReadPlan, pos: np.ndarray, window: int | None) -> Pairs:
    """Return how often each row sees each slot at each shift by the plan."""
    found: Pairs = Counter()
    for item in plan.items:
        for view in item.views:
            assert view.start < view.stop
            for slot, key_pos, shift in slots_of(view):
                for row in item.rows.tolist():
                    if sees(int(pos[row]), key_pos, window):
                        found[row, slot, shift] += 1
    return found


def defined_pairs(world: World, step: Step, window: int | None) -> Pairs:
    """Return what each row sees by definition: shown slots at positions it may see."""
    found: Pairs = Counter()
    for doc, rows in step.parts():
        shown = [
            (slot, shift, int(world.pos[slot]) + shift)
            for slot, shift in shown_slots(doc)
            if world.bias[slot] > HIDDEN
        ]
        for row in range(rows.start, rows.stop):
            position = int(step.packed_pos[row])
            for slot, shift, key_pos in shown:
                if sees(position, key_pos, window):
                    found[row, slot, shift] += 1
    return found


def check_merges(plan: ReadPlan, num_rows: int) -> None:
    """Every row's partials are those of its items, once; what is read in one item is final."""
    partials: dict[int, list[int]] = {row: [] for row in range(num_rows)}
    times: Counter[int] = Counter()
    for item in plan.items:
        rows = item.rows.tolist()
        assert len(set(rows)) == len(rows)
        times.update(rows)
        if item.partial >= 0:
            for place, row in enumerate(rows):
                partials[row].append(item.partial + place)
    for item in plan.items:
        if item.partial < 0:
            assert all(times[row] == 1 for row in item.rows.tolist()), "a final row is read again"
        else:
            assert any(times[row] > 1 for row in item.rows.tolist()), "a partial for nothing"
    assert sorted(chain(*partials.values())) == list(range(plan.num_partials))
    offsets = plan.merge_offsets
    assert (len(offsets), int(offsets[0]), int(offsets[-1])) == (num_rows + 1, 0, plan.num_partials)
    for row, expected in partials.items():
        merged = plan.merge_partials[offsets[row] : offsets[row + 1]].tolist()
        assert sorted(merged) == sorted(expected)
        assert not expected or len(expected) == times[row], "a part of a row is final"
    for array in (offsets, plan.merge_partials, *(item.rows for item in plan.items)):
        assert array.dtype == np.int32
        assert array.flags.c_contiguous


def check(world: World, step: Step, window: int | None, most: int) -> ReadPlan:
    plan = plan_reads(step.docs, row_ranges(step.pos), window, most)
    assert all(1 <= len(item.rows) <= most for item in plan.items)
    assert planned_pairs(plan, step.packed_pos, window) == defined_pairs(world, step, window)
    check_merges(plan, len(step.packed_pos))
    return plan


@given(world=worlds(PLAIN), wanted=steps, window=windows, most=rows_per_item)
def test_rows_see_what_they_may_and_each_slot_once(world, wanted, window, most):
    check(world, step_of(world, wanted), window, most)


@st.composite
def long_worlds(draw: st.DrawFn) -> World:
    """Documents long enough to be cut, some of which share a prefix, some of it moved."""
    world = World(draw(st.integers(0, 2**16)), PLAIN)
    stem = world.new(draw(st.integers(0, 5)), draw(st.integers(200, 900)))
    for kind in draw(st.lists(st.sampled_from(["own", "fork", "moved", "part"]), max_size=3)):
        if kind == "own":
            world.new(0, draw(st.integers(1, 400)))
            continue
        if kind == "fork":
            world.docs.append(stem.fork())
        else:
            stem.close_tail()
            stop = draw(st.integers(1, stem.spans[0].length)) if kind == "part" else None
            span = stem.spans[0]
            shift = draw(st.sampled_from([0, 17]))
            world.graft([(span.sub(0, stop or span.length), shift, ())])
        world.append(world.docs[-1], draw(st.integers(1, 200)))
    return world


@given(world=long_worlds(), wanted=steps, window=windows, most=rows_per_item)
def test_long_documents_are_cut_without_loss(world, wanted, window, most):
    check(world, step_of(world, wanted), window, most)


@pytest.mark.parametrize("length", [400, 1100, 2000])
def test_one_row_over_a_long_text_is_work_for_two_threads(length: int) -> None:
    world = World(0, PLAIN)
    world.new(0, length)
    plan = check(world, step_of(world, [("decode", 1)]), None, 96)
    assert len(plan.items) >= 2
    sizes = [sum(view.stop - view.start for view in item.views) for item in plan.items]
    assert max(sizes) < length


@given(prefix=st.integers(64, 400), owners=st.integers(2, 6), tail=st.integers(1, 30))
def test_a_shared_prefix_is_read_once(prefix, owners, tail):
    world = World(prefix, PLAIN)
    first = world.new(0, prefix)
    world.docs += [first.fork() for _ in range(owners - 1)]
    for doc in world.docs:
        world.append(doc, tail)
    plan = check(world, step_of(world, [("decode", 1)] * owners), None, 96)
    read = sum(view.stop - view.start for item in plan.items for view in item.views)
    assert read == prefix + owners * (tail + 1)


@given(st.lists(st.lists(st.integers(-50, 900), min_size=1, max_size=9), min_size=1, max_size=5))
def test_row_ranges_say_where_rows_stand(pos):
    arrays = [np.array(rows, dtype=np.int64) for rows in pos]
    ranges = row_ranges(arrays)
    edges = np.cumsum([0, *map(len, pos)]).tolist()
    assert [(r.start, r.stop) for r in ranges] == list(pairwise(edges))
    for found, rows in zip(ranges, pos, strict=True):
        assert (found.low, found.high) == (min(rows), max(rows))
        assert found.ascending == (rows == list(range(rows[0], rows[0] + len(rows))))


def test_rows_that_see_nothing_are_in_no_item() -> None:
    world = World(0, PLAIN)
    docs: list[KVDoc] = [world.new(0, 10), world.new(50, 10)]
    pos = [np.array([5]), np.array([5])]
    slots = [world.append_unwritten(doc, 1) for doc in docs]
    for count in (1, 2):
        step = Step(docs[-count:], pos[-count:], slots[-count:])
        plan = check(world, step, None, 96)
        seen = {row for item in plan.items for row in item.rows.tolist()}
        assert count - 1 not in seen
        assert len(seen) == count - 1
