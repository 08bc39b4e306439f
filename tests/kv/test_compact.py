"""A compacted document is the same document in fewer blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.kv.compact import compact, tidy
from kvloom.kv.doc import KVDoc
from kvloom.kv.edit import Insert
from kvloom.kv.pool import PAGE_SLOTS, Pool, blocks_for
from kvloom.kv.span import Span
from kvloom.types import Taint
from tests.kv.edits import Edited, deeds
from tests.kv.worlds import ROOT, check_books, littered, small_pool


def bits(doc: KVDoc) -> list[torch.Tensor]:
    """Keys, values and scales of all tokens, in order, as they lie in the pool."""
    slots = torch.from_numpy(np.concatenate([np.arange(*x.pool_slots) for x in doc.order]))
    pool = doc.pool
    found = [rows[:, slots] for rows in pool.rows(0, 0, pool.num_slots)]
    return [*found, *(scales[:, slots] for scales in pool.arenas(0)[2:])]


def said(doc: KVDoc) -> dict[str, object]:
    """What a document says of itself that may not depend on where it lies."""
    return {
        "tokens": doc.tokens,
        "length": doc.length,
        "end": doc.end_pos,
        "taints": taints(doc),
        "pos": [pos for piece in doc.order for pos in piece.pos.tolist()],
        "turned": [pos - x.shift for x in doc.order for pos in x.pos.tolist()],
        "visible": [shown for piece in doc.order for shown in piece.visible.tolist()],
    }


def taints(doc: KVDoc) -> list[Taint]:
    """Taints by token; a stretch that is cut is pruned only where it has a hidden slot."""
    return [taint & ~Taint.PRUNED for span, taint in doc.taints() for _ in range(span.length)]


@pytest.mark.parametrize("layout", ["plain", "tiled"])
@given(seed=st.integers(0, 2**16), length=st.integers(1, 200), done=deeds)
def test_a_compacted_document_is_the_same_in_no_more_blocks(layout, seed, length, done):
    made = Edited.new(seed, length, layout=layout, done=done)
    doc = made.doc
    doc.close_tail()
    before, kv, nbytes = said(doc), bits(doc) if doc.length else [], doc.nbytes
    exact, lineage = doc.exact_length(), doc.lineage()
    compact(doc)
    after = said(doc)
    assert after == before
    for mine, theirs in zip(bits(doc) if doc.length else [], kv, strict=True):
        assert torch.equal(mine, theirs)
    assert doc.nbytes <= nbytes
    check_books(made.world.pool, [doc])
    assert doc.exact_length() >= exact
    if exact == doc.length:
        assert doc.lineage() == lineage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("layout", ["plain", "tiled"])
def test_bits_are_copied_in_every_format(dtype, layout):
    pool = small_pool(20, dtype=dtype, layout=layout)
    doc = _of_crumbs(pool, 6, 10)
    kv, nbytes = bits(doc), doc.nbytes
    assert compact(doc)
    for mine, theirs in zip(bits(doc), kv, strict=True):
        assert torch.equal(mine, theirs)
    assert doc.nbytes == pool.block_bytes < nbytes
    first = doc.spans[0].pool_slots[0]
    assert [x.pool_slots for x in doc.spans] == [
        (first + 10 * n, first + 10 * n + 10) for n in range(6)
    ]


def _of_crumbs(pool: Pool, count: int, length: int) -> KVDoc:
    """A document of stretches of few tokens, each in a block of its own."""
    crumbs = [KVDoc(pool, ROOT, start_pos=7 * number) for number in range(count)]
    for crumb in crumbs:
        slots = torch.from_numpy(crumb.append(list(range(length))))
        pool.write(0, slots, torch.randn(2, length, 8), torch.randn(2, length, 8))
        crumb.close_tail()
    spans = [crumb.spans[0].at(length * n) for n, crumb in enumerate(crumbs)]
    doc = KVDoc(pool, ROOT, spans)
    for crumb in crumbs:
        crumb.close()
    return doc


def test_many_small_edits_end_in_about_the_blocks_of_a_fresh_document():
    made = Edited.new(0, 600)
    fresh = blocks_for(600)
    most = 0
    for number in range(120):
        made.rewrite((number * 37) % 590, 599, 3)
        tidy(made.doc)
        made.note_places()
        most = max(most, made.doc.nbytes // made.world.pool.block_bytes)
    assert made.doc.length == 600
    assert most <= 2 * fresh
    check_books(made.world.pool, [made.doc])
    out, expected = made.decoded(0)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4)


def test_what_others_show_as_well_stays_where_it_is():
    made = Edited.new(0, 100)
    made.run(Insert(50, (1, 2, 3)))
    fork = made.doc.fork()
    spans = made.doc.spans
    compact(made.doc)
    assert made.doc.spans == spans
    check_books(made.world.pool, [made.doc, fork])
    fork.close()
    assert compact(made.doc)


def test_without_a_run_of_free_blocks_nothing_is_done():
    pool = littered(small_pool(6), 0.0)
    doc = _of_crumbs(pool, 6, 5)
    spans = doc.spans
    assert pool.free_blocks == 0
    assert not compact(doc)
    assert doc.spans == spans
    doc.truncate(20)
    assert compact(doc)
    check_books(pool, [doc])


def test_a_dense_document_and_an_empty_one_are_left_alone():
    made = Edited.new(0, 10 * PAGE_SLOTS)
    spans = made.doc.spans
    assert not tidy(made.doc)
    assert made.doc.spans == spans
    empty = KVDoc(made.world.pool, ROOT)
    assert not compact(empty)
    assert not tidy(empty)


def test_the_rest_behind_what_was_moved_is_for_what_comes_next():
    made = Edited.new(0, 100)
    made.run(Insert(50, (1, 2, 3)))
    assert compact(made.doc)
    end = made.doc.spans[-1].pool_slots[1]
    made.world.append(made.doc, 1)
    last: Span = made.doc.spans[-1]
    assert last.pool_slots[1] == end + 1
