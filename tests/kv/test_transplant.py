"""Transplants show the keys and the values that were asked for, at the place they are put."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kvloom.errors import CapacityError
from kvloom.kv.doc import KVDoc
from kvloom.kv.edit import Append, Delete, Transplant
from kvloom.kv.execute import add_part
from kvloom.kv.plan import Mix, placed_at
from kvloom.kv.transplant import mixed
from kvloom.types import Taint
from tests.kv.edits import LAYERS, Cell, Edited, deeds
from tests.kv.worlds import ROOT, check_books
from tests.tolerances import TOLERANCE

NEAR = TOLERANCE["float32"]["attention"]


ELSEWHERE = range(100, 200)
"""Tokens that stand in no other document: of equal lineage nothing is copied."""


def another_context(made: Edited, before: int) -> Edited:
    """Return a document of the same tokens behind others, in the same pool."""
    other = Edited(made.world, KVDoc(made.world.pool, ROOT))
    tokens = [*ELSEWHERE[:before], *made.doc.tokens]
    other.run(Append(tuple(tokens)))
    other.run(Delete(0, before))
    del other.cells[:before]
    other.doc.close_tail()
    return other


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("layout", ["plain", "tiled"])
@given(
    seed=st.integers(0, 2**16),
    length=st.integers(1, 120),
    ends=st.tuples(st.integers(0, 999), st.integers(0, 999)),
    before=st.integers(1, 9),
    done=deeds,
)
@example(
    seed=0,
    length=1,
    ends=(0, 1),
    before=1,
    done=[("insert", (0, 0, 2)), ("delete", (0, 1, 0))],
)
def test_keys_and_values_are_of_the_documents_that_were_named(
    keys, values, layout, seed, length, ends, before, done
):
    done = [deed for deed in done[:4] if deed[0] != "splice"]
    made = Edited.new(seed, length, 2, layout, done)
    other = another_context(made, before)
    a, b = sorted(end % (made.doc.length + 1) for end in ends)
    source = other.doc.apply(Delete(0, a))
    stretch = KVDoc(made.world.pool, ROOT)
    for part in source.parts:
        add_part(stretch, other.doc, part)
    stretch.truncate(b - a)
    tokens = made.doc.tokens
    made.run(Transplant(a, b, stretch.spans, keys, values))
    assert made.doc.tokens == tokens
    for place in range(a, b):
        ours, theirs = made.cells[place], other.cells[place]
        made.cells[place] = Cell(
            ours.token,
            theirs.k if keys else ours.k,
            theirs.v if values else ours.v,
            ours.visible or (keys and values),
        )
    for layer in range(len(LAYERS)):
        np.testing.assert_allclose(*made.decoded(layer), rtol=0, atol=NEAR)
    check_books(made.world.pool, [made.doc, other.doc, stretch])


@given(length=st.integers(1, 100), data=st.data(), keys=st.booleans(), values=st.booleans())
def test_a_transplant_from_an_equal_document_is_none(length, data, keys, values):
    made = Edited.new(0, length)
    a, b = sorted(data.draw(st.integers(0, length)) for _ in range(2))
    made.doc.close_tail()
    before, free = made.doc.spans, made.world.pool.free_blocks
    spans = tuple(span.sub(a, b) for span in made.doc.spans)
    made.run(Transplant(a, b, spans, keys, values))
    assert made.doc.spans == before, "the same slots at the same shift: the same bits"
    assert made.world.pool.free_blocks == free
    assert made.doc.exact_length() == length


@pytest.mark.parametrize("taken", ["keys", "values"])
def test_a_mix_is_never_taken_for_a_fresh_prefill(taken: str) -> None:
    made = Edited.new(0, 60)
    other = another_context(made, 4)
    spans = tuple(x.sub(10, 30) for x in other.doc.spans)
    made.run(Transplant(10, 30, spans, keys=taken == "keys", values=taken == "values"))
    assert made.doc.exact_length() == 10
    taints = [taint for _, taint in made.doc.taints()]
    assert Taint.FOREIGN in taints[1]
    assert (Taint.MOVED in taints[1]) == (taken == "keys")


def test_a_mix_without_room_leaves_nothing_behind() -> None:
    made = Edited.new(0, 60)
    other = another_context(made, 4)
    pool = made.world.pool
    filler = KVDoc(pool, ROOT)
    filler.append([0] * (pool.free_blocks * 64))
    before = pool.owners().tolist()
    with (
        pytest.raises(CapacityError),
        mixed(made.doc, Mix(0, 60, tuple(other.doc.spans), "keys")),
    ):
        pass
    assert pool.owners().tolist() == before


def test_no_key_is_rotated() -> None:
    made = Edited.new(0, 60)
    other = another_context(made, 4)
    theirs = tuple(other.doc.spans)
    with mixed(made.doc, Mix(0, 60, theirs, "keys")) as spans:
        pool = made.world.pool
        for layer in range(len(LAYERS)):
            keys = [pool.read(layer, *span.pool_slots)[0] for span in spans]
            expected = [pool.read(layer, *span.pool_slots)[0] for span in theirs]
            assert torch.equal(torch.cat(keys, dim=1), torch.cat(expected, dim=1))
        assert [x.shift for x in placed_at(spans, 0)] == [-4]
