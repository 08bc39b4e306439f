"""Chunks are found by sink, tokens and tenant, until they are forgotten."""

from __future__ import annotations

import pytest

from kvloom.engine.chunks import chunk_spans
from kvloom.engine.engine import Engine
from kvloom.kv.doc import KVDoc
from tests.engine.worlds import BOOKS, fake_engine

SINK, TOKENS = BOOKS[0][:2], BOOKS[0][2:90]


def computed(engine: Engine, tokens: list[int]) -> KVDoc:
    doc = engine.new_document()
    doc.append(tokens)
    return doc


@pytest.fixture
def engine() -> Engine:
    return fake_engine(blocks=8)


def test_a_chunk_is_found_by_who_it_belongs_to(engine: Engine) -> None:
    chunks = engine.chunks
    fork = chunks.add(SINK, TOKENS, "a", computed(engine, [*SINK, *TOKENS]))
    assert fork is not None
    for sink, tokens, tenant in (
        (SINK[:1], TOKENS, "a"),
        (SINK, TOKENS[:-1], "a"),
        (SINK, TOKENS, "b"),
    ):
        assert chunks.find(sink, tokens, tenant) is None
    again = chunks.find(SINK, TOKENS, "a")
    assert again is not None
    assert again.tokens == fork.tokens == [*SINK, *TOKENS]
    assert [token for span in chunk_spans(again, SINK) for token in span.tokens] == TOKENS
    for doc in (fork, again):
        engine.release(doc)
    engine.memory.check()
    assert not engine.memory.in_work
    chunks.clear()
    assert engine.pool.free_blocks == engine.pool.num_blocks


def test_what_is_in_work_outlives_its_chunk(engine: Engine) -> None:
    fork = engine.chunks.add(SINK, TOKENS, "", computed(engine, [*SINK, *TOKENS]))
    assert fork is not None
    other = engine.chunks.add(SINK, TOKENS, "", computed(engine, [*SINK, *TOKENS]))
    assert other is not None
    engine.release(other)
    engine.chunks.clear()
    assert not engine.memory.make_room(7)
    assert fork.tokens == [*SINK, *TOKENS]
    engine.release(fork)
    assert engine.memory.make_room(8)


def test_forgotten_chunks_are_no_chunks(engine: Engine) -> None:
    for number in range(3):
        tokens = [number + 1, *TOKENS]
        fork = engine.chunks.add(SINK, tokens, "", computed(engine, [*SINK, *tokens]))
        assert fork is not None
        engine.release(fork)
    assert len(engine.chunks) == 3
    assert engine.chunks.find(SINK, [1, *TOKENS], "") is not None  # and used last, and in work
    assert engine.memory.make_room(4)
    assert engine.chunks.find(SINK, [2, *TOKENS], "") is None
    assert len(engine.chunks) == 2
    assert len(engine.memory.idle) == 2
    engine.memory.check()
