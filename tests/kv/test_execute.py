"""A document after any chain of edits equals one whose keys were rotated one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.kv.doc import KVDoc
from kvloom.kv.edit import Delete, Insert, Move, Replace, Several
from kvloom.kv.execute import add_part
from kvloom.types import Taint
from tests.kv.edits import LAYERS, Edited, deeds
from tests.kv.worlds import ROOT, check_books
from tests.tolerances import TOLERANCE

NEAR = TOLERANCE["float32"]["attention"]
lengths = st.integers(1, 200)


def check(made: Edited) -> None:
    doc, start = made.doc, made.doc.start_pos
    assert doc.tokens == [cell.token for cell in made.cells]
    assert doc.length == len(made.cells)
    assert doc.end_pos == start + len(made.cells)
    shown = sorted(pos for span in doc.spans for pos in span.pos[span.visible].tolist())
    assert shown == [start + n for n, cell in enumerate(made.cells) if cell.visible]
    assert sum(count for _, count in counts(doc)) == doc.length
    check_books(made.world.pool, [doc])


def counts(doc: KVDoc) -> list[tuple[Taint, int]]:
    return [(taint, span.length) for span, taint in doc.taints()]


@pytest.mark.parametrize("layout", ["plain", "tiled"])
@settings(max_examples=40)
@given(seed=st.integers(0, 2**16), length=lengths, start_pos=st.integers(0, 5), done=deeds)
def test_decoding_behind_any_chain_of_edits(layout, seed, length, start_pos, done):
    made = Edited.new(seed, length, start_pos, layout)
    for name, numbers in done:
        made.do(name, numbers)
        check(made)
    for layer in range(len(LAYERS)):
        out, expected = made.decoded(layer)
        np.testing.assert_allclose(out, expected, rtol=0, atol=NEAR)


@given(length=lengths, a=lengths, count=st.integers(1, 40), seed=st.integers(0, 9))
def test_taking_an_edit_back_restores_everything(length, a, count, seed):
    made = Edited.new(seed, length)
    a %= length + 1
    before, spans, lineage = made.doc.tokens, made.doc.spans, made.doc.lineage()
    made.run(Insert(a, (7,) * count))
    assert (made.doc.exact_length() == made.doc.length) == (a == length)
    made.run(Delete(a, a + count))
    assert made.doc.tokens == before
    assert made.doc.spans == spans
    assert made.doc.exact_length() == length
    assert made.doc.lineage() == lineage


@given(length=lengths, a=lengths, b=lengths, to=lengths)
def test_moving_there_and_back_restores_everything(length, a, b, to):
    made = Edited.new(0, length)
    a, b = sorted((a % (length + 1), b % (length + 1)))
    to %= length - (b - a) + 1
    spans = made.doc.spans
    made.run(Move(a, b, to))
    made.run(Move(to, to + b - a, a))
    assert made.doc.spans == spans
    assert made.doc.exact_length() == length


@given(length=st.integers(2, 200), a=lengths, behind=st.integers(1, 20))
def test_what_is_appended_behind_a_moved_span_is_not_exact(length, a, behind):
    made = Edited.new(0, length)
    a %= length - 1
    made.run(Delete(a, a + 1))
    made.world.append(made.doc, behind)
    assert made.doc.exact_length() == a
    *_, (taint, count) = counts(made.doc)
    assert (taint, count) == (Taint.FOREIGN, behind)


@given(length=lengths, cuts=st.sets(st.integers(0, 200), max_size=8), seed=st.integers(0, 99))
def test_several_edits_equal_the_same_edits_one_by_one(length, cuts, seed):
    edges = sorted(cut % (length + 1) for cut in cuts)
    pairs = list(zip(edges[::2], edges[1::2], strict=False))
    fresh = [tuple(range(100 + n, 100 + n + n * seed % 5)) for n in range(len(pairs))]
    together, alone = Edited.new(seed, length), Edited.new(seed, length)
    edits = [Replace(a, b, new) for (a, b), new in zip(pairs, fresh, strict=True)]
    together.run(Several(tuple(edits)))
    shift = 0
    for (a, b), new in zip(pairs, fresh, strict=True):
        alone.run(Replace(a + shift, b + shift, new))
        shift += len(new) - (b - a)
    assert together.doc.tokens == alone.doc.tokens
    assert standing(together.doc) == standing(alone.doc)
    assert together.doc.exact_length() == alone.doc.exact_length()


def standing(doc: KVDoc) -> list[tuple[int, int]]:
    """Return position and shift of every token."""
    return [(pos, span.shift) for span in doc.order for pos in span.pos.tolist()]


@given(seed=st.integers(0, 99), length=st.integers(20, 150), done=deeds)
def test_recomputing_from_left_to_right_makes_everything_exact(seed, length, done):
    made = Edited.new(seed, length, done=done)
    tokens, place = made.doc.tokens, 0
    while place < len(tokens):
        assert made.doc.exact_length() >= place
        made.run(
            Replace(
                place,
                place + 37 if place + 37 < len(tokens) else len(tokens),
                tuple(tokens[place : place + 37]),
            )
        )
        place += 37
    assert made.doc.tokens == tokens
    assert made.doc.exact_length() == len(tokens)
    assert made.doc.lineage() == ROOT.extend(tokens)


@given(seed=st.integers(0, 99), length=st.integers(30, 200), step=st.integers(1, 4))
def test_tokens_under_an_overlay_are_repaired_and_others_are_what_they_were(seed, length, step):
    made = Edited.new(seed, length)
    made.run(Delete(5, 6))
    before = made.doc.taints()
    was = [taint for span, taint in before for _ in range(span.length)]
    places = set(range(10, length - 1, step))
    made.repair(10, length - 1, step - 1)
    now = [taint for taint, count in counts(made.doc) for _ in range(count)]
    assert now == [Taint.REPAIRED if n in places else taint for n, taint in enumerate(was)]
    assert made.doc.provenance().tokens["repaired"] == len(places)


def test_a_repaired_document_keeps_few_spans_through_edits() -> None:
    made = Edited.new(0, 400)
    made.repair(0, 400, 2)
    assert len(made.doc.spans) == 2
    made.insert(200, 200, 3)
    assert len(made.doc.spans) == 5
    made.delete(200, 203, 0)
    assert len(made.doc.spans) == 2
    check(made)


def test_thousands_of_edits_that_are_taken_back_leave_one_span() -> None:
    made = Edited.new(0, 300)
    spans, free = made.doc.spans, made.world.pool.free_blocks
    random = np.random.default_rng(0)
    for _ in range(1000):
        a, b = sorted(random.integers(0, 301, 2).tolist())
        if random.random() < 0.5:
            made.run(Insert(a, (1, 2, 3)))
            made.run(Delete(a, a + 3))
        else:
            to = int(random.integers(0, 301 - (b - a)))
            made.run(Move(a, b, to))
            made.run(Move(to, to + b - a, a))
    assert made.doc.spans == spans
    assert made.world.pool.free_blocks == free
    assert made.doc.exact_length() == 300


def test_an_open_segment_is_closed_before_it_is_shown_elsewhere() -> None:
    made = Edited.new(0, 70)
    made.world.append(made.doc, 5)
    built = KVDoc(made.world.pool, ROOT)
    for part in made.doc.apply(Delete(3, 4)).parts:
        add_part(built, made.doc, part)
    assert built.length == 74
    check_books(made.world.pool, [made.doc, built])
