"""Slots hold the same bits however they are laid out, and copies are those bits."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.kv.slots import Slots
from kvloom.types import KVLayout, LayerSpec

LAYERS = (LayerSpec(0, 4, 2, 8, 8, None), LayerSpec(1, 4, 1, 8, 6, None))
SIZE = 192
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
LAYOUTS = list(get_args(KVLayout))


def filled(dtype: torch.dtype, layout: KVLayout, seed: int) -> Slots:
    """Slots with a row of its own in every place, written in one go."""
    slots = Slots.empty(LAYERS, SIZE, dtype, layout)
    generator = torch.Generator().manual_seed(seed)
    for layer in LAYERS:
        k = torch.randn(layer.kv_heads, SIZE, layer.k_dim, generator=generator)
        v = torch.randn(layer.kv_heads, SIZE, layer.v_dim, generator=generator)
        slots.write(layer.index, slice(0, SIZE), k, v)
    return slots


def bits(slots: Slots) -> list[Tensor]:
    """All that slots keep, as plain rows; slots second."""
    rows = [x for layer in LAYERS for x in slots.rows(layer.index, 0, SIZE)]
    scales = [s for layer in LAYERS for s in slots.arenas(layer.index)[2:]]
    return [x.clone() for x in (*rows, *scales)]


def assert_moved(found: list[Tensor], before: list[Tensor], source: list[Tensor], moves) -> None:
    """Check that places hold what the source held, and all others what they held before."""
    for now, old, theirs in zip(found, before, source, strict=True):
        wanted = old.clone()
        for place, slot in moves:
            wanted[:, place] = theirs[:, slot]
        assert torch.equal(now, wanted)


edges = st.one_of(st.integers(0, SIZE), st.sampled_from([0, 64, 128, 192]))


@DTYPES
@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS for b in LAYOUTS], ids=str)
@settings(max_examples=20)
@given(data=st.data())
def test_a_copy_holds_the_bits_and_touches_nothing_else(dtype, layouts, data):
    source, target = filled(dtype, layouts[0], 0), filled(dtype, layouts[1], 1)
    first, stop = sorted((data.draw(edges), data.draw(edges)))
    if data.draw(st.booleans(), label="neighbours"):
        start = data.draw(
            st.one_of(edges, st.just(first)).filter(lambda x: x <= SIZE - stop + first)
        )
        places = list(range(start, start + stop - first))
    else:
        places = data.draw(st.permutations(range(SIZE)))[: stop - first]
    before = bits(target)
    target.copy(source, first, stop, torch.tensor(places, dtype=torch.int64))
    moves = list(zip(places, range(first, stop), strict=True))
    assert_moved(bits(target), before, bits(source), moves)


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@given(chosen=st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=80))
def test_taken_slots_are_those_of_a_whole_read(dtype, layout, chosen):
    slots = filled(dtype, layout, 0)
    for layer in range(len(LAYERS)):
        whole = slots.read(layer, 0, SIZE)
        for found, expected in zip(slots.take(layer, torch.tensor(chosen)), whole, strict=True):
            assert torch.equal(found, expected[:, chosen])


@pytest.mark.parametrize("layout", LAYOUTS)
@given(first=st.integers(0, 127), length=st.integers(1, 64))
def test_slots_may_be_copied_within_themselves(layout, first, length):
    slots = filled(torch.bfloat16, layout, 0)
    before, start = bits(slots), (first + 40) % (SIZE - length)
    places = torch.arange(start, start + length)
    slots.copy(slots, first, first + length, places)
    assert_moved(bits(slots), before, before, [(start + n, first + n) for n in range(length)])


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_named_tensors_give_the_same_slots(dtype, layout):
    slots = filled(dtype, layout, 0)
    again = Slots.of_tensors(slots.tensors, layout)
    assert again.num_slots == SIZE
    assert (again.dtype, again.row_dtype) == (slots.dtype, slots.row_dtype)
    assert_moved(bits(again), bits(slots), bits(slots), [])
    assert {x.data_ptr() for x in again.tensors.values()} == {
        x.data_ptr() for x in slots.tensors.values()
    }
