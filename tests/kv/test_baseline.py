"""The unrotated baseline shows keys at new places with the rotation of their old ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import RequestError
from kvloom.kv.baseline import BASELINES, baseline, unrotated
from kvloom.kv.doc import KVDoc
from kvloom.kv.edit import Append, Replace
from kvloom.kv.execute import add_part
from kvloom.kv.plan import Compute
from kvloom.types import Edit, Taint
from tests.kv.edits import LAYERS, Cell, Edited
from tests.kv.worlds import ROOT, check_books
from tests.oracles import turned
from tests.tolerances import TOLERANCE

NEAR = TOLERANCE["float32"]["attention"]


def run_unrotated(made: Edited, edit: Edit) -> list[Cell]:
    """Carry an edit out as `Edited.run` does, with the baseline; return what was computed."""
    built = KVDoc(made.world.pool, ROOT, start_pos=made.doc.start_pos)
    fresh: list[Cell] = []
    for part in made.doc.apply(edit).parts:
        if isinstance(part, Compute):
            slots = made.world.append_tokens(built, part.tokens)
            fresh += made.cells_of(list(part.tokens), slots)
        else:
            add_part(built, made.doc, part, unrotated)
    for span in built.spans:  # the world appends where the last slot claims to stand
        made.world.pos[slice(*span.pool_slots)] = span.pos - span.shift
        if span.segment.placed:
            made.world.overlays.add(span.segment)
    made.doc.close()
    made.doc = built
    return fresh


def turned_back(cell: Cell, growth: int) -> Cell:
    """Return a cell whose keys, embedded where it stands now, are those of `growth` before."""
    keys = [
        k if spec.rope is None else turned(k, -growth, spec.rope)
        for k, spec in zip(cell.k, LAYERS, strict=True)
    ]
    return replace(cell, k=keys)


@pytest.mark.parametrize("layout", ["plain", "tiled"])
@given(
    seed=st.integers(0, 2**16),
    length=st.integers(2, 150),
    ends=st.tuples(st.integers(0, 999), st.integers(0, 999)),
    put_in=st.integers(0, 30),
    repaired=st.booleans(),
    pruned=st.booleans(),
)
def test_it_equals_a_list_whose_keys_are_turned_back(
    layout, seed, length, ends, put_in, repaired, pruned
):
    made = Edited.new(seed, length, 2, layout)
    a, b = sorted(end % (length + 1) for end in ends)
    if repaired:
        made.repair(0, length, 2)
    if pruned:
        made.prune(length // 2, length, 1)
    tokens = made.doc.tokens
    fresh = run_unrotated(made, Replace(a, b, tuple(range(put_in))))
    growth = put_in - (b - a)
    made.cells = [*made.cells[:a], *fresh, *(turned_back(c, growth) for c in made.cells[b:])]
    assert made.doc.tokens == [*tokens[:a], *range(put_in), *tokens[b:]]
    for layer in range(len(LAYERS)):
        np.testing.assert_allclose(*made.decoded(layer), rtol=0, atol=NEAR)
    check_books(made.world.pool, [made.doc])
    made.doc.close()
    assert made.world.pool.free_blocks == made.world.pool.num_blocks


@given(length=st.integers(8, 150), place=st.integers(0, 999), put_in=st.integers(1, 9))
def test_what_it_moved_is_exact_nowhere_and_what_it_did_not_is_as_it_was(length, place, put_in):
    made = Edited.new(0, length)
    place %= length
    before = made.doc.fork()
    before.close_tail()
    assert all(unrotated(span) is span for span in before.spans)
    run_unrotated(made, Replace(place, place, tuple(range(put_in))))
    assert made.doc.exact_length() == place + put_in
    assert {taint for _, taint in made.doc.taints()} <= {Taint.EXACT, Taint.FOREIGN}
    assert made.doc.lineage() != before.lineage()
    # Taken back in the same way, the keys stand where they were rotated, and are no more trusted.
    run_unrotated(made, Replace(place, place + put_in, ()))
    assert made.doc.tokens == before.tokens
    assert made.doc.exact_length() == place


def test_what_is_appended_behind_it_is_no_more_exact():
    made = Edited.new(0, 20)
    run_unrotated(made, Replace(5, 6, (1, 2)))
    exact = made.doc.exact_length()
    made.run(Append((1, 2, 3)))
    assert made.doc.exact_length() == exact < made.doc.length


def test_baselines_are_reached_by_name():
    for name, rule in BASELINES.items():
        assert baseline(name) is rule
    with pytest.raises(RequestError, match="no baseline 'rotated'; the names are unrotated"):
        baseline("rotated")
