"""Keys are compared where they stand now, whatever moved them there; a layout is counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvloom.kv.edit import Delete, Insert
from kvloom.kv.inspection import deviation, keys_and_values, layout_of
from tests.kv.edits import LAYERS, Edited, deeds
from tests.oracles import embedded
from tests.tolerances import TOLERANCE

NEAR = TOLERANCE["float32"]["rotation"]


@pytest.mark.parametrize("layout", ["plain", "tiled"])
@example(  # a token that was repaired twice, once by a run of slots, and then pruned
    seed=0,
    length=4,
    done=[
        ("repair", (0, 4, 0)),
        ("repair", (0, 3, 1)),
        ("insert", (0, 0, 0)),
        ("prune", (0, 3, 0)),
    ],
)
@given(seed=st.integers(0, 2**16), length=st.integers(1, 200), done=deeds)
def test_keys_stand_where_a_list_of_tokens_has_them(layout, seed, length, done):
    made = Edited.new(seed, length, layout=layout, done=done)
    for layer in LAYERS:
        k, v = keys_and_values(made.doc, layer)
        assert k.shape[1] == v.shape[1] == made.doc.length
        if not made.cells:
            continue
        unrotated = np.stack([cell.k[layer.index] for cell in made.cells], axis=1)
        expected = embedded(unrotated, np.arange(len(made.cells)), layer.rope)
        np.testing.assert_allclose(k.numpy(), expected, rtol=0, atol=NEAR)
        values = np.stack([cell.v[layer.index] for cell in made.cells], axis=1)
        np.testing.assert_allclose(v.numpy(), values, rtol=0, atol=NEAR)


def test_a_document_deviates_from_others_and_not_from_itself():
    made = Edited.new(0, 80)
    before = made.doc.fork()
    made.run(Insert(20, (1, 2, 3)))
    made.run(Delete(20, 23))
    assert deviation(made.doc, before, LAYERS[0]) == (0.0, 0.0)
    made.rewrite(10, 80, 3)
    keys, values = deviation(made.doc, before, LAYERS[0])
    assert keys > 0.1
    assert values > 0.1


def test_a_layout_counts_blocks_spans_and_views():
    made = Edited.new(0, 100)
    plain = layout_of(made.doc)
    assert (plain.blocks, plain.spans, plain.views) == (2, 1, 1)
    assert plain.nbytes == made.doc.nbytes
    made.run(Insert(20, (1, 2, 3)))
    edited = layout_of(made.doc)
    assert (edited.blocks, edited.spans, edited.views) == (3, 3, 3)
