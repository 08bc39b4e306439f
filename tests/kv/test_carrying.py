"""What is carried out of one pool and into another is the same KV, bit for bit, and no more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.errors import CapacityError
from kvloom.kv.carrying import carried_in, carried_out, fits
from kvloom.kv.doc import KVDoc
from kvloom.kv.lineage import Lineage
from kvloom.kv.pool import Pool
from kvloom.kv.slots import Slots
from kvloom.kv.span import cut
from tests.kv.worlds import GARBAGE, check_books, layer_spec, littered, small_pool

LAYERS = (layer_spec(0), layer_spec(1, heads=3, kv_heads=1, dims=(8, 6)))
ROOT = Lineage.root(b"carrying")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
LAYOUTS = ["plain", "tiled"]


def read(pool: Pool, spans) -> list[torch.Tensor]:
    """All rows that spans show, layer by layer, and their scales; one span at a time."""
    found = []
    for layer in range(len(LAYERS)):
        parts = [pool.rows(layer, *span.pool_slots) for span in spans]
        found += [torch.cat(side, dim=1) for side in zip(*parts, strict=True)]
        for scales in pool.arenas(layer)[2:]:
            found.append(torch.cat([scales[:, slice(*span.pool_slots)] for span in spans], dim=1))
    return found


def written(pool: Pool, lengths: list[int], seed: int = 0) -> KVDoc:
    """A document of several segments that begin anywhere in a block."""
    doc, generator = KVDoc(pool, ROOT), torch.Generator().manual_seed(seed)
    for number, length in enumerate(lengths):
        slots = torch.from_numpy(doc.append([number] * length))
        for layer in LAYERS:
            k = torch.randn(layer.kv_heads, length, layer.k_dim, generator=generator)
            v = torch.randn(layer.kv_heads, length, layer.v_dim, generator=generator)
            pool.write(layer.index, slots, k, v)
        doc.close_tail()
        if number % 2:
            KVDoc(pool, ROOT, doc.spans).append([9])  # takes the rest of the block
    return doc


lengths = st.lists(st.one_of(st.integers(1, 70), st.just(64)), min_size=1, max_size=4)


@DTYPES
@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS for b in LAYOUTS], ids=str)
@settings(max_examples=15)
@given(lengths=lengths, data=st.data())
def test_what_is_carried_is_the_same(dtype, layouts, lengths, data):
    source, target = (small_pool(16, LAYERS, dtype, layout) for layout in layouts)
    doc = written(source, lengths)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, doc.length)] * 2).filter(np.ptp)))
    spans = list(cut(doc.order, start, stop))
    slots = carried_out(source, spans)
    origin = spans[0].segment.lineage_at(spans[0].start)
    wanted = read(source, spans)
    littered(source, 3.0)  # the copies are copies
    held = KVDoc(target, ROOT)
    held.append([1] * data.draw(st.integers(0, 70)))
    assert fits(target, slots, stop - start)
    came = carried_in(target, slots, doc.tokens[start:stop], start, origin)
    for ours, theirs in zip(read(target, came.spans), wanted, strict=True):
        assert torch.equal(ours, theirs)
    assert came.tokens == doc.tokens[start:stop]
    assert came.spans[0].first_pos == start
    assert came.lineage() == origin.extend(came.tokens)
    check_books(target, [held, came])


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=15)
@given(lengths=lengths)
def test_others_kv_stays_where_it_is(dtype, layout, lengths):
    pool = small_pool(16, LAYERS, dtype, layout)
    doc = written(pool, lengths)
    slots = carried_out(pool, list(cut(doc.order, doc.length // 2, doc.length)))
    length = doc.length - doc.length // 2
    for arena in slots.tensors.values():
        assert not (arena.float() == GARBAGE).any()
        assert not arena.float().isnan().any()
    for layer in range(len(LAYERS)):
        for rows in slots.rows(layer, length, slots.num_slots):
            assert not rows.any()
        for scales in slots.arenas(layer)[2:]:
            assert not scales[:, length:].any()


def test_a_full_pool_is_left_as_it_was():
    source, target = small_pool(4, LAYERS), small_pool(2, LAYERS)
    slots = carried_out(source, written(source, [150]).spans)
    with pytest.raises(CapacityError):
        carried_in(target, slots, [0] * 150, 0, ROOT)
    check_books(target, [])


@pytest.mark.parametrize("other", ["dtype", "layers", "heads", "dims", "short"])
def test_other_formats_do_not_fit(other):
    layers, dtype, size, layer = LAYERS, torch.float32, 10, LAYERS[1]
    if other == "dtype":
        dtype = torch.bfloat16
    elif other == "layers":
        layers = LAYERS[:1]
    elif other == "heads":
        layers = (LAYERS[0], replace(layer, kv_heads=3))
    elif other == "dims":
        layers = (LAYERS[0], replace(layer, v_dim=8))
    elif other == "short":
        size = 9
    slots = Slots.empty(layers, size, dtype)
    assert not fits(small_pool(2, LAYERS), slots, 10)
    assert fits(small_pool(2, LAYERS), Slots.empty(LAYERS, 10, torch.float32), 10)
