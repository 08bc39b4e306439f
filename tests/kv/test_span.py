"""Spans are cut, joined and read in order without a slot being lost, doubled or moved."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.kv.doc import KVDoc
from kvloom.kv.segment import SlotArrays
from kvloom.kv.span import Span, assembled, cut, reading_order
from kvloom.ops.partial import MIN_LOGIT
from kvloom.types import SlotRange
from tests.kv.edits import Edited, deeds
from tests.kv.worlds import ROOT, small_pool


def visible(spans) -> list[tuple[int, int]]:
    """Return (position, pool slot) of everything that spans show, by position."""
    shown = []
    for span in spans:
        slots = np.arange(*span.pool_slots)
        seen = span.visible
        shown += zip(span.pos[seen].tolist(), slots[seen].tolist(), strict=True)
    return sorted(shown)


def span_of(length: int, base: int = 0, hidden: tuple[SlotRange, ...] = (), shift: int = 0) -> Span:
    doc = KVDoc(small_pool(4), ROOT, start_pos=base)
    doc.append(list(range(length)))
    doc.close_tail()
    return Span(doc.spans[0].segment, 0, length, shift, hidden)


@given(seed=st.integers(0, 2**16), length=st.integers(1, 150), done=deeds)
def test_reading_order_is_the_order_of_positions_and_assembling_is_its_inverse(seed, length, done):
    doc = Edited.new(seed, length, done=done).doc
    order = reading_order(doc.spans)
    pos = [pos for piece in order for pos in piece.pos.tolist()]
    assert pos == list(range(doc.start_pos, doc.start_pos + doc.length))
    whole = assembled(order)
    assert visible(whole) == visible(doc.spans)
    assert [p for piece in reading_order(whole) for p in piece.pos.tolist()] == pos
    assert assembled(reading_order(whole)) == whole
    assert len(whole) <= len(order)


@given(
    seed=st.integers(0, 2**16),
    length=st.integers(1, 150),
    done=deeds,
    edges=st.sets(st.integers(0, 500), max_size=5),
)
def test_pieces_that_are_cut_and_assembled_again_are_what_they_were(seed, length, done, edges):
    doc = Edited.new(seed, length, done=done).doc
    places = sorted({0, doc.length, *(edge % (doc.length + 1) for edge in edges)})
    parts = [list(cut(doc.order, a, b)) for a, b in pairwise(places)]
    lengths = [sum(piece.length for piece in part) for part in parts]
    assert lengths == np.diff(places).tolist()
    assert assembled(piece for part in parts for piece in part) == assembled(doc.order)


@given(
    length=st.integers(1, 60),
    base=st.integers(0, 9),
    shift=st.integers(-5, 5),
    taken=st.lists(st.sets(st.integers(-5, 80), max_size=30), max_size=3),
)
def test_hiding_positions_hides_them_and_no_other(length, base, shift, taken):
    span = span_of(length, base, shift=shift)
    for pos in taken:
        span = span.without(np.array(sorted(pos), dtype=np.int64))
    gone = set().union(*taken) if taken else set()
    expected = [base + shift + n not in gone for n in range(length)]
    assert span.visible.tolist() == expected
    edges = [edge for hidden in span.hidden for edge in hidden]
    assert edges == sorted(set(edges)), "ranges that touch or are empty"


@given(length=st.integers(1, 60), base=st.integers(0, 9), pos=st.integers(-50, 50))
def test_a_span_stands_where_it_is_put(length, base, pos):
    span = span_of(length, base).at(pos)
    assert span.pos.tolist() == list(range(pos, pos + length))
    assert (span.first_pos, span.stop_pos) == (pos, pos + length)
    assert span.at(pos) is span
    assert span.at(base) == span_of(length, base).at(base) or span.at(base).shift == 0


@given(seed=st.integers(0, 99), length=st.integers(5, 60), biased=st.booleans())
def test_holes_are_added_to_the_biases_there_are(seed, length, biased):
    span = span_of(length, hidden=(SlotRange(1, 2), SlotRange(3, 5)))
    bias = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    if biased:
        span.segment.arrays = SlotArrays(bias=bias)
    part = span.sub(1, length)
    expected = bias[1:] if biased else torch.zeros(length - 1)
    expected = torch.where(torch.tensor(part.visible), expected, MIN_LOGIT)
    assert torch.equal(part.holed.bias, expected)
    assert part.holed is part.holed, "made again"
    assert not biased or torch.equal(span.segment.arrays.bias, bias), "the segment was changed"


def test_of_overlays_that_replace_each_other_the_shown_slot_stays_the_tokens_own():
    doc = KVDoc(small_pool(8), ROOT)
    doc.append(list(range(4)))
    for _ in range(2):
        doc.overlay(list(range(4)), np.arange(4))
    older, newer = (replace(span, hidden=()) for span in doc.spans if span.segment.placed)
    pieces = (older.sub(0, 1), newer.sub(1, 2), older.sub(2, 3), newer.sub(3, 4))
    spans = assembled(pieces)
    assert reading_order(spans) == pieces
    pruned = reading_order([span.without(np.arange(4)) for span in spans])
    assert [piece.pool_slots for piece in pruned] == [piece.pool_slots for piece in pieces]
