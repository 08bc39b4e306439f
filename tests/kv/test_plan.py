"""Plans say what stays, moves, goes stale and is computed, and what a model must allow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import UnsupportedModelError
from kvloom.kv.doc import KVDoc
from kvloom.kv.edit import Append, Delete, Insert, Replace, Several, Splice, Transplant
from kvloom.kv.plan import Compute, Keep, placed_at, require_movable, shown
from kvloom.types import ModelSpec, Positions
from tests.kv.worlds import PLAIN, ROOT, small_pool


def document(length: int, start_pos: int = 0) -> KVDoc:
    doc = KVDoc(small_pool(8), ROOT, start_pos=start_pos)
    doc.append(list(range(length)))
    doc.close_tail()
    return doc


def spec(positions: Positions) -> ModelSpec:
    return ModelSpec(PLAIN, 9, 1000, positions, notes=("the table changes with the length",))


edits = st.lists(
    st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 9)), min_size=1, max_size=4
)


def several(length: int, numbers) -> Several:
    edges = sorted(number % (length + 1) for entry in numbers for number in entry[:2])
    counts = [entry[2] for entry in numbers]
    pairs = zip(edges[::2], edges[1::2], counts, strict=True)
    return Several(tuple(Replace(a, b, (500,) * count) for a, b, count in pairs))


@given(length=st.integers(1, 99), numbers=edits, start_pos=st.integers(0, 9))
def test_a_plan_accounts_for_every_token(length, numbers, start_pos):
    doc = document(length, start_pos)
    plan = doc.apply(several(length, numbers))
    old, new = doc.tokens, plan.tokens(doc)
    assert len(new) == plan.length
    assert new[: plan.kept_prefix] == old[: plan.kept_prefix]
    assert new.count(500) == plan.num_computed
    for start, stop, shift in plan.moved:
        assert shift != 0
        assert new[start + shift : stop + shift] == old[start:stop]
    fresh = {place for place, token in enumerate(new) if token == 500}
    stale = {place for start, stop in plan.stale for place in range(start, stop)}
    assert set(range(plan.kept_prefix)) | fresh | stale == set(range(len(new)))
    assert not stale & fresh
    assert not stale & set(range(plan.kept_prefix))


@given(length=st.integers(1, 99), numbers=edits, start_pos=st.integers(0, 9))
def test_shown_parts_stand_at_their_places(length, numbers, start_pos):
    doc = document(length, start_pos)
    for place, part in doc.apply(several(length, numbers)).placed():
        if isinstance(part, Keep):
            spans = shown(doc, part, place)
            tokens = [token for span in spans for token in span.tokens]
            assert tokens == doc.tokens[part.start : part.stop]
            pos = [pos for span in spans for pos in span.pos.tolist()]
            assert pos == list(range(start_pos + place, start_pos + place + part.length))
            assert all(span.shift == place - part.start for span in spans)


def test_a_plan_reads_well() -> None:
    plan = document(4000 // 20).apply(Several((Replace(80, 83, (1,) * 9), Delete(90, 95))))
    assert str(plan).splitlines() == [
        "keep 0..80",
        "compute 9 tokens at 80",
        "keep 83..90 moved by +6",
        "keep 95..200 moved by +1",
    ]
    assert str(document(3).apply(Delete(0, 3))) == "nothing is left"
    assert "compute 1 token at 3" in str(document(3).apply(Append((1,))))


@pytest.mark.parametrize("positions", ["opaque", "absolute"])
def test_models_whose_positions_are_fixed_refuse_moves(positions: Positions) -> None:
    doc, other = document(50), document(20, start_pos=7)
    fixed, free = spec(positions), spec("movable")
    moving = [
        Insert(10, (1,)),
        Delete(10, 12),
        Splice(10, tuple(other.spans)),
        Transplant(3, 5, tuple(x.sub(3, 5) for x in other.spans)),
        Transplant(3, 5, tuple(x.sub(3, 5) for x in other.spans), values=False),
    ]
    for edit in moving:
        plan = doc.apply(edit)
        require_movable(plan, free)
        with pytest.raises(UnsupportedModelError, match=r"by [+-]\d+ .*changes with the length"):
            require_movable(plan, fixed)
    staying = [Append((1,)), Replace(3, 5, (1, 2)), Delete(40, 50)]
    for edit in staying:
        require_movable(doc.apply(edit), fixed)
    require_movable(document(7).apply(Splice(7, tuple(other.spans))), fixed)


@given(lengths=st.lists(st.integers(1, 20), max_size=4), pos=st.integers(-9, 9))
def test_pieces_are_placed_one_behind_the_other(lengths, pos):
    pieces = [document(length, start_pos=length).spans[0] for length in lengths]
    placed = [p for piece in placed_at(pieces, pos) for p in piece.pos.tolist()]
    assert placed == list(range(pos, pos + sum(lengths)))


def test_parts_that_go_on_are_one() -> None:
    doc = document(10)
    plan = doc.apply(Several((Insert(5, (1,)), Insert(5, (2,)), Delete(7, 7), Replace(8, 8, ()))))
    assert plan.parts == (Keep(0, 5), Compute((1, 2)), Keep(5, 10))
