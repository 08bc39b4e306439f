"""Chunks are found by tokens and tenant in several variants, until they are forgotten."""

from __future__ import annotations

import pytest

from kvloom.engine.chunks import MAX_VARIANTS, variant_id
from kvloom.engine.engine import Engine
from kvloom.kv.doc import KVDoc
from kvloom.kv.span import cut
from tests.engine.worlds import BOOKS, fake_engine

TOKENS = BOOKS[0][2:90]


def add(engine: Engine, before: list[int], tokens: list[int] = TOKENS, tenant: str = "a") -> str:
    """Keep a chunk as it was computed behind something."""
    doc = engine.new_document()
    doc.append([*before, *tokens])
    doc.close_tail()
    name = engine.chunks.add(cut(doc.order, len(before), doc.length), tenant)
    engine.release(doc)
    return name


def take(engine: Engine, name: str, tokens: list[int] = TOKENS, tenant: str = "a") -> KVDoc | None:
    return engine.chunks.take(tokens, tenant, name, 7.0)


@pytest.fixture
def engine() -> Engine:
    return fake_engine(blocks=8)


def test_a_chunk_is_found_by_who_it_belongs_to(engine: Engine) -> None:
    behind = [3, 4]
    name = add(engine, behind)
    assert name == variant_id(engine.memory.root.extend(behind))
    assert take(engine, name, tenant="b") is None
    assert take(engine, name, TOKENS[:-1]) is None
    assert take(engine, "another") is None
    doc = take(engine, name)
    assert doc is not None
    assert (doc.tokens, doc.start_pos) == (TOKENS, 2)
    (variant,) = engine.chunks.variants(TOKENS, "a")
    assert (variant.base, variant.saved_rows) == (2, 7.0)
    assert variant.origin == engine.memory.root.extend(behind)
    engine.release(doc)
    engine.memory.check()
    assert not engine.memory.in_work
    engine.chunks.clear()
    assert engine.pool.free_blocks == engine.pool.num_blocks


def test_what_is_in_work_outlives_its_chunk(engine: Engine) -> None:
    name = add(engine, [3])
    doc = take(engine, name)
    assert doc is not None
    assert add(engine, [3]) == name  # in place of the first
    assert len(engine.chunks.variants(TOKENS, "a")) == 1
    engine.chunks.clear()
    assert not engine.memory.make_room(7)
    assert doc.tokens == TOKENS
    engine.release(doc)
    assert engine.memory.make_room(8)


def test_forgotten_chunks_are_no_chunks(engine: Engine) -> None:
    names = [add(engine, [3], [number + 1, *TOKENS]) for number in range(3)]
    assert len(engine.chunks) == 3
    assert take(engine, names[0], [1, *TOKENS]) is not None  # and used last, and in work
    assert engine.memory.make_room(4)
    assert take(engine, names[1], [2, *TOKENS]) is None
    assert len(engine.chunks) == 2
    assert len(engine.memory.idle) == 2
    engine.memory.check()


def test_the_variant_that_saved_least_goes(engine: Engine) -> None:
    short = TOKENS[:5]
    names = [add(engine, [number + 1], short) for number in range(MAX_VARIANTS)]
    for name in names[1:]:
        doc = take(engine, name, short)
        assert doc is not None
        engine.release(doc)
    last = add(engine, [25], short)
    assert [one.id for one in engine.chunks.variants(short, "a")] == [*names[1:], last]
    engine.memory.check()
