"""Laws of views and readings: every visible pair of row and slot once, no other, no slot lost."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvloom.kv.segment import SlotArrays
from kvloom.kv.views import MIN_SHARED_SLOTS, Reading, RowRange, View, read, share, views_of
from tests.kv.worlds import PLAIN, World, shown_slots, worlds
from tests.oracles import HIDDEN


def slots_of(view: View) -> list[tuple[int, int]]:
    """Return (slot, position now) of what a view shows."""
    return [(slot, view.first_pos + slot - view.start) for slot in range(view.start, view.stop)]


def without_holes(view: View) -> list[int]:
    """Return the slots of a view that have no hole in their bias."""
    bias = None if view.arrays is None else view.arrays[0].bias
    slots = range(view.start, view.stop)
    if view.arrays is None or bias is None:
        return list(slots)
    return [slot for slot in slots if bias[slot - view.arrays[1]] > HIDDEN]


@given(world=worlds(PLAIN))
def test_views_show_what_the_document_shows(world):
    for doc in world.docs:
        shown = Counter(pair for pair in shown_slots(doc) if world.bias[pair[0]] > HIDDEN)
        viewed = Counter((s, view.shift) for view in views_of(doc) for s in without_holes(view))
        assert viewed == shown


@given(world=worlds(PLAIN))
def test_views_of_plain_slots_know_their_positions(world):
    for doc in world.docs:
        for view in views_of(doc):
            if view.arrays is not None and view.arrays[0].pos is not None:
                continue
            assert all(world.pos[slot] + view.shift == pos for slot, pos in slots_of(view))
            assert view.stop_pos - view.first_pos == view.stop - view.start


def test_neighbours_read_as_one():
    world = World(0, PLAIN)
    doc = world.new(0, 100)
    for _ in range(3):
        doc.close_tail()
        world.append(doc, 30)
    assert len(doc.spans) > 1
    assert len(views_of(doc)) == 1


def test_neighbouring_slots_at_other_positions_stay_apart():
    world = World(0, PLAIN)
    first, second = world.new(0, 64), world.new(0, 64)
    for doc in (first, second):
        doc.close_tail()
    joined = world.graft([(span, 0, ()) for span in (*first.spans, *second.spans)])
    one, two = views_of(joined)
    assert (one.stop, one.first_pos) == (two.start, two.first_pos)


def test_a_repaired_text_is_read_in_few_views_that_are_made_once():
    world = World(0, PLAIN, blocks=60)
    doc = world.new(0, 2000)
    world.overlay(doc, world.random.permutation(2000)[:300])
    cut, over = views_of(doc)
    assert len(without_holes(cut)) == 1700
    assert over.stop - over.start == 300
    world.append(doc, 1)
    assert views_of(doc)[0].arrays[0] is cut.arrays[0]


def test_a_long_span_with_few_cuts_is_read_in_plain_pieces():
    world = World(0, PLAIN)
    doc = world.new(0, 1000)
    world.overlay(doc, np.array([100, 300, 500, 700, 900]))
    *plain, over = views_of(doc)
    assert len(plain) == 6
    assert all(view.arrays is None for view in plain)
    assert over.arrays is not None


@given(
    start=st.integers(0, 50),
    length=st.integers(1, 40),
    first_pos=st.integers(-20, 40),
    low=st.integers(-30, 90),
    size=st.integers(0, 60),
)
def test_between_cuts_by_position(start, length, first_pos, low, size):
    view = View(start, start + length, first_pos, shift=3)
    part = view.between(low, low + size)
    expected = [(slot, pos) for slot, pos in slots_of(view) if low <= pos < low + size]
    assert (slots_of(part) if part is not None else []) == expected
    assert part is None or part.shift == view.shift


@st.composite
def row_ranges(draw: st.DrawFn) -> tuple[RowRange, list[int]]:
    """Rows with their positions: one, a chunk, or any."""
    start, count = draw(st.integers(0, 9)), draw(st.integers(1, 12))
    first = draw(st.integers(-3, 60))
    pos = list(range(first, first + count))
    if draw(st.booleans()):
        pos = draw(st.lists(st.integers(-3, 60), min_size=count, max_size=count))
    ascending = bool((np.diff(pos) == 1).all())
    return RowRange(start, start + count, min(pos), max(pos), ascending), pos


windows = st.one_of(st.none(), st.integers(1, 40))


def pairs(reading: Reading, rows: RowRange, pos: list[int], window: int | None):
    """Return the (row, slot) pairs that a reading lets attend."""
    found = []
    for start, stop in reading.rows:
        for row in range(start, stop):
            at = pos[row - rows.start]
            for number, (slot, key_pos) in enumerate(slots_of(reading.view)):
                seen = key_pos <= at and (window is None or key_pos > at - window)
                if reading.visibility == "causal":
                    seen = number <= row - start
                if seen or reading.visibility == "all":
                    found.append((row, slot))
    return found


@given(first_pos=st.integers(-10, 50), length=st.integers(1, 60), rows=row_ranges(), window=windows)
def test_readings_show_every_visible_slot_once(first_pos, length, rows, window):
    rows, pos = rows
    view = View(100, 100 + length, first_pos, shift=first_pos)
    found = Counter()
    for reading in read(view, rows, window):
        found.update(pairs(reading, rows, pos, window))
    expected = Counter(
        (row, slot)
        for row, at in enumerate(pos, start=rows.start)
        for slot, key_pos in slots_of(view)
        if key_pos <= at and (window is None or key_pos > at - window)
    )
    assert found == expected


@given(rows=row_ranges(), length=st.integers(1, 30), window=windows)
def test_slots_with_arrays_are_always_masked(rows, length, window):
    rows, _ = rows
    view = View(100, 100 + length, 500, shift=0, arrays=(SlotArrays(), 100))
    (reading,) = read(view, rows, window)
    assert reading == Reading(view, ((rows.start, rows.stop),), "mask")


@st.composite
def readings(draw: st.DrawFn) -> list[Reading]:
    """Readings of several documents over one stretch of the pool; a slot at a shift has one pos."""
    found = []
    row = 0
    for _ in range(draw(st.integers(1, 6))):
        rows = draw(st.integers(1, 3))
        shift = draw(st.sampled_from([0, 0, 0, 5, -2]))
        edges = sorted(draw(st.sets(st.integers(0, 300), min_size=2, max_size=6)))
        for start, stop in zip(edges[::2], edges[1::2], strict=False):
            view = View(start, stop, start + 7 + shift, shift)
            visibility = draw(st.sampled_from(["all", "all", "all", "mask"]))
            found.append(Reading(view, ((row, row + rows),), visibility))
        row += rows
    return draw(st.permutations(found))


def reads(readings: list[Reading]) -> Counter:
    """Count who reads which slot at which shift and position, and how."""
    return Counter(
        (row, slot, pos, reading.view.shift, reading.visibility)
        for reading in readings
        for part in reading.rows
        for row in range(*part)
        for slot, pos in slots_of(reading.view)
    )


@given(before=readings())
def test_sharing_changes_who_reads_together_and_nothing_else(before):
    after = share(before)
    assert reads(after) == reads(before)
    for reading in after:
        assert all(a < b for a, b in reading.rows)
        assert all(a[1] < b[0] for a, b in pairwise(reading.rows))


@given(before=readings())
def test_sharing_never_reads_a_slot_more_often(before):
    after = share(before)
    assert slots_read(after) <= slots_read(before)


@given(before=readings())
def test_long_overlaps_are_read_once(before):
    after = [reading for reading in share(before) if reading.visibility == "all"]
    edges = {edge for r in before for edge in (r.view.start, r.view.stop)}
    for number, a in enumerate(after):
        for b in after[number + 1 :]:
            if a.view.shift == b.view.shift:
                low = max(a.view.start, b.view.start)
                high = min(a.view.stop, b.view.stop)
                inner = sorted({low, high} | {edge for edge in edges if low < edge < high})
                gaps = [y - x for x, y in pairwise(inner)]
                assert high <= low or max(gaps) < MIN_SHARED_SLOTS


def slots_read(readings: list[Reading]) -> int:
    return sum(reading.view.stop - reading.view.start for reading in readings)
