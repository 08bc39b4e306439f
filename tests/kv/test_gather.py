"""Gathered views show the slots of the views they are made of, at the same positions and shifts."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given

from kvloom.kv.gather import MANY_VIEWS, NOWHERE, SHORT_SLOTS, tiles_of, views_read
from kvloom.kv.views import View, views_of
from tests.kv.edits import LAYERS, Edited
from tests.kv.worlds import PLAIN, Deed, World, worlds
from tests.oracles import HIDDEN
from tests.tolerances import TOLERANCE

NEAR = TOLERANCE["float32"]["attention"]


def shown(views: list[View]) -> Counter[tuple[int, int, int]]:
    """Count (slot, position, shift) of what views show, holes left out."""
    found: Counter[tuple[int, int, int]] = Counter()
    for view in views:
        slots = np.arange(view.start, view.stop)
        shifts = np.full(len(slots), view.shift) if view.slot_shifts is None else view.slot_shifts
        seen = (view.slot_pos != NOWHERE) & (np.zeros(len(slots)) + view.slot_bias > HIDDEN)
        found.update(zip(slots[seen], view.slot_pos[seen], shifts[seen], strict=True))
    return found


@given(world=worlds(PLAIN))
def test_what_is_read_is_what_the_views_show(world):
    for doc in world.docs:
        views = views_read(doc)
        assert shown(views) == shown(views_of(doc))
        if views:
            assert views[-1] is not None
            assert views[-1].stop == views_of(doc)[-1].stop


def scattered(length: int) -> World:
    world = World(0, PLAIN)
    world.new(0, length)
    Deed("scatter", (0, 3, 4, 0)).do(world)
    return world


def test_many_short_views_are_read_in_few_and_each_tile_about_once():
    doc = scattered(600).docs[-1]
    views = views_read(doc)
    assert len(views_of(doc)) > 60
    assert len(views) == 2
    assert tiles_of(views[0].start, views[0].stop) <= 10
    assert views[0].slot_shifts is not None
    assert len(np.unique(views[0].slot_shifts)) > 10


def test_few_views_and_long_ones_are_read_as_they_are():
    doc = scattered(40).docs[-1]
    assert 1 < len(views_of(doc)) < MANY_VIEWS
    assert views_read(doc) == views_of(doc)
    world = World(0, PLAIN, 200)
    long = world.new(0, MANY_VIEWS * (SHORT_SLOTS + 9))
    long.close_tail()
    size = SHORT_SLOTS + 1
    parts = [(long.spans[0].sub(n * size, (n + 1) * size), n, ()) for n in range(MANY_VIEWS)]
    doc = world.graft(parts)
    assert all(view.shifts is None for view in views_read(doc))


def test_slots_that_are_shown_twice_are_read_twice():
    world = World(0, PLAIN)
    source = world.new(0, 60)
    source.close_tail()
    pieces = [source.spans[0].sub(n, n + 3) for n in range(0, 60, 3)]
    doc = world.graft([*((p, 0, ()) for p in pieces[::2]), *((p, 100, ()) for p in pieces[::2])])
    assert max(Counter(slot for slot, *_ in shown(views_read(doc)).elements()).values()) == 2
    assert shown(views_read(doc)) == shown(views_of(doc))


@pytest.mark.parametrize("layout", ["plain", "tiled"])
@pytest.mark.parametrize("compacted", [True, False])
def test_decoding_behind_many_edits_equals_keys_rotated_one_by_one(layout, compacted):
    made = Edited.new(0, 300, layout=layout)
    for number in range(40):
        made.insert(number * 37 % 290, 0, number)
        made.delete(number * 53 % 280, number * 53 % 280 + number % 7, 0)
    if compacted:
        made.compact(0, 0, 0)
        assert len(views_read(made.doc)) < len(views_of(made.doc)) / 4
    assert len(views_read(made.doc)) < len(views_of(made.doc))
    for layer in range(len(LAYERS)):
        out, expected = made.decoded(layer)
        np.testing.assert_allclose(out, expected, rtol=0, atol=NEAR)
