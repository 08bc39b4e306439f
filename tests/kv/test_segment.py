"""Segments: lineage at every slot, growth and shrinkage, and what one layer looks like."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.kv.lineage import Lineage
from kvloom.kv.segment import Segment, SlotArrays, visibility_mask
from kvloom.ops.partial import MIN_LOGIT
from tests.kv.worlds import PLAIN, ROOT, World, small_pool

texts = st.one_of(
    st.lists(st.integers(0, 5), min_size=1, max_size=200),
    st.tuples(st.integers(1, 200), st.integers(2, 7)).map(
        lambda pair: [i * i % pair[1] for i in range(pair[0])]
    ),
)


def segment_of(tokens: list[int], origin: Lineage = ROOT, blocks: int = 4) -> Segment:
    pool = small_pool(blocks)
    pool.allocate(blocks)
    segment = Segment(pool, 0, blocks * 64, base=5, origin=origin)
    segment.append(tokens)
    return segment


@given(prefix=texts, tokens=texts, data=st.data())
def test_lineage_at_any_slot_is_that_of_the_text_before_it(prefix, tokens, data):
    segment = segment_of(tokens, ROOT.extend(prefix))
    slots = st.lists(st.integers(0, len(tokens)), min_size=1, max_size=5)
    for slot in data.draw(slots):
        assert segment.lineage_at(slot) == ROOT.extend(prefix + tokens[:slot])


@given(tokens=texts, other=texts, data=st.data())
def test_lineage_forgets_what_was_cut(tokens, other, data):
    segment = segment_of(tokens, blocks=8)
    segment.lineage_at(len(tokens))
    keep = data.draw(st.integers(0, len(tokens)))
    segment.cut(keep)
    segment.append(other)
    text = tokens[:keep] + other
    assert segment.tokens == text
    for slot in (keep, len(text), min(len(text), 64), min(len(text), 128)):
        assert segment.lineage_at(slot) == ROOT.extend(text[:slot])


@given(tokens=texts, start=st.integers(0, 63))
def test_slots_come_one_after_the_other(tokens, start):
    pool = small_pool(6)
    pool.allocate(6)
    segment = Segment(pool, start, 6 * 64 - start, base=0, origin=ROOT)
    half = len(tokens) // 2
    assert segment.append(tokens[:half]) == start
    assert segment.append(tokens[half:]) == start + half
    assert segment.length == len(tokens)
    assert segment.room == segment.capacity - len(tokens)


@given(blocks=st.integers(1, 3), more=st.integers(1, 9))
def test_growing_takes_free_neighbours_only(blocks, more):
    pool = small_pool(6)
    run = pool.allocate(blocks)
    segment = Segment(pool, run.first_block * 64, run.num_blocks * 64, base=0, origin=ROOT)
    assert segment.grow(more) == min(more, 6 - blocks)
    assert segment.capacity == (blocks + min(more, 6 - blocks)) * 64
    assert pool.free_blocks == 6 - segment.capacity // 64
    taken_from_other = Segment(pool, 0, 64, base=0, origin=ROOT)
    assert taken_from_other.grow(1) == 0 or blocks == 1


@given(tokens=texts)
def test_shrinking_gives_back_what_holds_nothing(tokens):
    segment = segment_of(tokens)
    segment.shrink()
    assert segment.capacity == -(-len(tokens) // 64) * 64
    assert segment.pool.free_blocks == 4 - segment.capacity // 64
    assert segment.tokens == tokens
    segment.shrink()
    assert segment.pool.free_blocks == 4 - segment.capacity // 64


def test_a_closed_segment_takes_nothing_more():
    segment = segment_of([1, 2])
    segment.close()
    assert segment.room == 0
    for act in (lambda: segment.append([3]), lambda: segment.cut(1), segment.close):
        with pytest.raises(AssertionError):
            act()
    assert segment.tokens == [1, 2]
    with pytest.raises(AssertionError):
        segment_of([0] * 256).append([0])


@given(seed=st.integers(0, 2**16), data=st.data())
def test_a_layer_is_a_view_of_its_slots(seed, data):
    world = World(seed, PLAIN)
    (span,) = world.new(3, data.draw(st.integers(1, 120))).spans
    start = data.draw(st.integers(0, span.length - 1))
    stop = data.draw(st.integers(start + 1, span.length))
    kv = span.segment.layer(0, start, stop).dense()
    slots = np.arange(start, stop) + span.segment.first_slot
    assert kv.pos.tolist() == world.pos[slots].tolist()
    assert kv.base == kv.pos[0]
    assert torch.equal(kv.k, world.fresh(0, slots)[0])
    assert torch.equal(kv.v, world.fresh(0, slots)[1])
    assert kv.k.data_ptr() == world.pool.keys[0][:, slots[0]].data_ptr(), "slots were copied"


def test_a_placed_segment_has_positions_and_no_base():
    segment = segment_of([7, 8, 9])
    segment.place(np.array([2, 17, 40]))
    kv = segment.layer(0, 1).dense()
    assert segment.placed
    assert kv.pos.tolist() == [17, 40]
    assert kv.base is None
    for wrong in ([1], [3, 2, 4], [3, 3, 4]):
        with pytest.raises(AssertionError):
            segment.place(np.array(wrong))


def test_bytes_of_slot_arrays_are_those_that_exist():
    assert SlotArrays().nbytes == 0
    arrays = SlotArrays(pos=torch.zeros(10, dtype=torch.int32), tag=torch.zeros(10).byte())
    assert arrays.nbytes == 50


@given(
    query=st.lists(st.integers(-5, 60), min_size=1, max_size=6),
    keys=st.lists(st.integers(-5, 60), min_size=1, max_size=20),
    window=st.one_of(st.none(), st.integers(1, 30)),
)
def test_visibility_is_by_position(query, keys, window):
    mask = visibility_mask(torch.tensor(query), torch.tensor(keys), window)
    for row, q in enumerate(query):
        for slot, k in enumerate(keys):
            seen = k <= q and (window is None or q - k < window)
            assert mask[row, slot] == (0.0 if seen else MIN_LOGIT)
