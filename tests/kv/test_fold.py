"""The fold equals attention over every visible slot, whatever the documents look like."""

from __future__ import annotations

from itertools import pairwise
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.kv import gather, views
from kvloom.kv.fold import FoldPlan, fold, plan_fold, write
from kvloom.ops.codes import decode, encode
from kvloom.ops.partial import add_sink, merge
from kvloom.types import QueryInfo
from tests.kv.steps import Step, step_of, steps
from tests.kv.worlds import PLAIN, World, check_books, layer_spec, worlds
from tests.tolerances import TOLERANCE

NEAR = TOLERANCE["float32"]["attention"]


def fold_layer(world: World, step: Step, plan: FoldPlan, layer: int, sink=None):
    """Write and fold one layer; return the unrotated queries and the result."""
    write(plan, layer, *world.fresh(layer, np.concatenate(step.slots)))
    q, rotated = world.query(layer, step.packed_pos)
    out = fold(plan, world.layers[layer], rotated, scale=world.scale(layer), sink=sink)
    return q, rotated, out


@given(world=worlds(), wanted=steps, sinks=st.booleans())
def test_fold_equals_attention_over_all_visible_slots(world, wanted, sinks):
    step = step_of(world, wanted)
    plan = step.plan()
    for layer, spec in enumerate(world.layers):
        sink = torch.randn(spec.heads) if sinks else None
        q, _, out = fold_layer(world, step, plan, layer, sink)
        for doc, rows in step.parts():
            expected = world.attended(
                doc,
                layer,
                q[:, rows],
                step.packed_pos[rows],
                None if sink is None else sink.numpy(),
            )
            np.testing.assert_allclose(out[:, rows].numpy(), expected, rtol=0, atol=NEAR)
    check_books(world.pool, world.docs)


@given(world=worlds(), wanted=steps, sinks=st.booleans())
def test_merged_segments_equal_the_plan(world, wanted, sinks):
    step = step_of(world, wanted)
    plan = step.plan()
    for layer, spec in enumerate(world.layers):
        sink = torch.randn(spec.heads) if sinks else None
        _, rotated, out = fold_layer(world, step, plan, layer, sink)
        for doc, rows in step.parts():
            pos = torch.from_numpy(step.packed_pos[rows])
            partials = list(segment_partials(doc, layer, spec, rotated[:, rows], pos, world))
            merged = merge(partials)
            o = merged.o if sink is None else add_sink(merged, sink)
            torch.testing.assert_close(out[:, rows], o, rtol=0, atol=NEAR)


def segment_partials(doc, layer, spec, q, pos, world):
    """Yield the partial of every stretch that a document shows, one segment at a time."""
    for span in doc.spans:
        at = QueryInfo(pos, world.scale(layer), span.shift, spec.rope, spec.window, spec.softcap)
        edges = [span.start, *(edge for cut in span.hidden for edge in cut), span.stop]
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            if start < stop:
                yield span.segment.layer(layer, start, stop).partial(q, at)


@given(world=worlds(PLAIN), wanted=steps)
def test_each_document_is_served_as_if_it_were_alone(world, wanted):
    step = step_of(world, wanted)
    plan = step.plan({None})
    write(plan, 0, *world.fresh(0, np.concatenate(step.slots)))
    _, rotated = world.query(0, step.packed_pos)
    together = fold(plan, world.layers[0], rotated, scale=world.scale(0))
    for index, (doc, rows) in enumerate(step.parts()):
        alone = plan_fold([doc], [step.pos[index]], [step.slots[index]], {None})
        out = fold(alone, world.layers[0], rotated[:, rows], scale=world.scale(0))
        torch.testing.assert_close(together[:, rows], out, rtol=0, atol=NEAR)


@given(
    world=worlds(),
    wanted=steps,
)
def test_write_touches_only_the_rows_slots(world, wanted):
    step = step_of(world, wanted)
    plan = step.plan()
    slots = np.concatenate(step.slots)
    others = np.setdiff1d(np.arange(world.pool.num_blocks * 64), slots)
    for layer in range(len(world.layers)):
        k, v = world.fresh(layer, slots)
        arenas = (world.pool.keys[layer], world.pool.values[layer])
        before = [arena[:, others].clone() for arena in arenas]
        write(plan, layer, k, v)
        for arena, kept, fresh in zip(arenas, before, (k, v), strict=True):
            assert torch.equal(arena[:, slots], fresh)
            assert torch.equal(arena[:, others].nan_to_num(-7.0), kept.nan_to_num(-7.0))


@given(prefix=st.integers(40, 400), owners=st.integers(2, 5), tail=st.integers(1, 30))
def test_a_shared_prefix_is_read_once(prefix, owners, tail):
    world = World(prefix, PLAIN)
    first = world.new(0, prefix)
    world.docs += [first.fork() for _ in range(owners - 1)]
    for doc in world.docs:
        world.append(doc, tail)
    step = step_of(world, [("decode", 1)] * owners)
    plan = step.plan({None})
    read_slots = sum(piece.stop - piece.start for piece in plan.pieces[None])
    assert read_slots == prefix + owners * (tail + 1)
    assert read_slots < sum(doc.length for doc in world.docs)
    q, _, out = fold_layer(world, step, plan, 0)
    for doc, rows in step.parts():
        expected = world.attended(doc, 0, q[:, rows], step.packed_pos[rows])
        np.testing.assert_allclose(out[:, rows].numpy(), expected, rtol=0, atol=NEAR)


@given(prefix=st.integers(40, 200), shift=st.integers(-20, 90))
def test_a_prefix_that_moved_alike_is_read_once(prefix, shift):
    world = World(prefix, PLAIN)
    source = world.new(20, prefix)
    source.close_tail()
    for _ in range(3):
        world.graft([(span, shift, ()) for span in source.spans])
    docs = world.docs[1:]
    pos = [np.array([400])] * 3
    slots = [world.append_unwritten(doc, 1) for doc in docs]
    plan = plan_fold(docs, pos, slots, {None})
    assert sum(piece.stop - piece.start for piece in plan.pieces[None]) == prefix + 3


@given(seed=st.integers(0, 2**16), shift=st.integers(-20, 40), window=st.sampled_from([None, 20]))
def test_an_overlay_moves_with_its_document(seed, shift, window):
    world = World(seed, (layer_spec(0, window=window),))
    repaired = world.new(0, 60).fork()
    world.docs.append(repaired)
    world.overlay(repaired, np.array([50, 3, 20, 21]))
    moved = world.graft([(span, shift, span.hidden) for span in repaired.spans])
    pos = np.array([55 + shift, 4 + shift, 21 + shift])
    plan = plan_fold([moved], [pos], [world.append_unwritten(world.docs[0], 3)], {window})
    q, rotated = world.query(0, pos)
    out = fold(plan, world.layers[0], rotated, scale=world.scale(0))
    expected = world.attended(moved, 0, q, pos)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=NEAR)


@settings(max_examples=20)
@given(
    world=worlds(),
    wanted=steps,
    length=st.integers(20, 300),
    step=st.integers(2, 9),
    shift=st.integers(-9, 9),
)
def test_many_hidden_slots_are_holes_or_cuts_alike(world, wanted, length, step, shift):
    doc = world.new(0, length)
    world.overlay(doc, np.arange(1, length, step))
    scattered = world.graft([(span, shift, span.hidden) for span in doc.spans])
    asked = step_of(world, wanted)
    docs, pos = [*asked.docs, scattered], [*asked.pos, np.array([length + shift])]
    slots = [*asked.slots, world.append_unwritten(world.docs[0], 1)]
    plans = []
    for many in (4, 10**9):
        with patch.object(views, "MANY_CUTS", many), patch.object(gather, "MANY_VIEWS", 10**9):
            plans.append(plan_fold(docs, pos, slots, {spec.window for spec in world.layers}))
    for layer, spec in enumerate(world.layers):
        write(plans[0], layer, *world.fresh(layer, np.concatenate(slots)))
        q, rotated = world.query(layer, np.concatenate(pos))
        holes, cuts = (fold(x, spec, rotated, scale=world.scale(layer)) for x in plans)
        torch.testing.assert_close(holes, cuts, rtol=0, atol=NEAR)
        expected = world.attended(scattered, layer, q[:, -1:], pos[-1])
        np.testing.assert_allclose(holes[:, -1:].numpy(), expected, rtol=0, atol=NEAR)
    assert len(plans[0].pieces[None]) <= len(plans[1].pieces[None])


def test_rows_without_anything_to_see_get_nothing():
    world = World(0, PLAIN)
    world.new(0, 10)
    world.new(50, 10)
    pos = [np.array([5]), np.array([5])]
    slots = [world.append_unwritten(doc, 1) for doc in world.docs]
    for order in ([0, 1], [1, 0]):
        docs = [world.docs[i] for i in order]
        plan = plan_fold(docs, pos, [slots[i] for i in order], {None})
        _, rotated = world.query(0, np.concatenate(pos))
        out = fold(plan, world.layers[0], rotated, scale=1.0)
        assert (out[:, order.index(1)] == 0).all()
        assert (out[:, order.index(0)] != 0).any()


def test_a_plan_for_rows_that_see_nothing_at_all_gives_zeros():
    world = World(0, PLAIN)
    doc = world.new(50, 3)
    slots = world.append_unwritten(doc, 1)
    plan = plan_fold([doc], [np.array([2])], [slots], {None})
    _, rotated = world.query(0, np.array([2]))
    assert (fold(plan, world.layers[0], rotated, scale=1.0) == 0).all()


@given(seed=st.integers(0, 2**16), cuts=st.sets(st.integers(1, 99), max_size=6))
def test_the_result_does_not_depend_on_how_a_document_is_cut(seed, cuts):
    world = World(seed, (layer_spec(0), layer_spec(1, window=33)))
    whole = world.new(3, 100)
    pieces = World(seed, world.layers)
    cut = pieces.new(3, 0)
    edges = [0, *sorted(cuts), 100]
    for a, b in pairwise(edges):
        slots = pieces.append_unwritten(cut, b - a)
        original = np.arange(a, b)
        for layer in range(2):
            pieces.k[layer][:, slots] = world.k[layer][:, original]
            pieces.v[layer][:, slots] = world.v[layer][:, original]
            k, v = pieces.fresh(layer, slots)
            pieces.pool.keys[layer][:, slots], pieces.pool.values[layer][:, slots] = k, v
        if b % 2:
            pieces.docs.append(cut.fork())
            pieces.append(pieces.docs[-1], 1)
    results = []
    for layer in range(2):
        _, rotated = world.query(layer, np.array([60, 102, 17]))
        for place, doc in ((world, whole), (pieces, cut)):
            view = doc.fork()
            slots = place.append_unwritten(view, 3)
            plan = plan_fold([view], [np.array([60, 102, 17])], [slots], {None, 33})
            results.append(fold(plan, place.layers[layer], rotated, scale=0.3))
            view.close()
        torch.testing.assert_close(results[-1], results[-2], rtol=0, atol=NEAR)


@pytest.mark.parametrize("rows", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "bfloat16"), (torch.int8, "int8 KV")])
def test_coarser_slots_take_rows_of_any_format(dtype, kind, rows):
    world = World(1, PLAIN, dtype=dtype)
    doc = world.new(0, 70)
    step = step_of(world, [("chunk", 5)])
    plan = step.plan({None})
    k, v = world.fresh(0, step.slots[0])
    write(plan, 0, k, v)
    kept, _ = world.pool.read(0, step.slots[0][0], step.slots[0][-1] + 1)
    assert torch.equal(kept, decode(encode(k)) if dtype is torch.int8 else k.to(dtype))
    q, rotated = world.query(0, step.packed_pos)
    out = fold(plan, world.layers[0], rotated.to(rows), scale=world.scale(0))
    assert out.dtype == rows
    expected = world.attended(doc, 0, q, step.packed_pos)
    near = TOLERANCE[kind]["attention"]
    np.testing.assert_allclose(out.float().numpy(), expected, rtol=0, atol=near)
