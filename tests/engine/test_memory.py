"""The engine's memory on its own: promises, reserves, and what is forgotten for them."""

from __future__ import annotations

import pytest

from kvloom.decode.accept import GenerationState
from kvloom.decode.detokenize import TextDecoder
from kvloom.decode.state import DrawKey
from kvloom.engine.engine import Engine
from kvloom.engine.request import Sequence
from kvloom.sched.job import JobState
from kvloom.store.key import ANYBODY, hash_tenant
from tests.engine.worlds import BOOKS, TOKENIZER, fake_engine, greedy


def waiting(
    engine: Engine, prompt: list[int], max_tokens: int = 5, tenant: str = ANYBODY
) -> Sequence:
    request_id = engine.submit(prompt, greedy(max_tokens), tenant=tenant)
    (sequence,) = engine._open.by_id[request_id].sequences
    return sequence


def admitted(engine: Engine, prompt: list[int], max_tokens: int = 5) -> Sequence:
    sequence = waiting(engine, prompt, max_tokens)
    assert engine.memory.admit(sequence) == "admitted"
    sequence.state = JobState.RUNNING
    return sequence


def test_admission_needs_room_for_the_whole_prompt_and_a_block_beside_others() -> None:
    engine = fake_engine(blocks=4)
    memory = engine.memory
    first = admitted(engine, BOOKS[0][:64])
    assert memory.promise(first, 64)
    second = waiting(engine, BOOKS[1][:190])
    assert memory.admit(second) == "no room"
    assert (second.doc, second.num_computed) == (None, 0)
    assert memory.admit(waiting(engine, BOOKS[1][:128])) == "admitted"
    memory.check()


def test_promises_are_kept_until_the_next_step() -> None:
    engine = fake_engine(blocks=4)
    memory = engine.memory
    first, second = admitted(engine, BOOKS[0][:65]), admitted(engine, BOOKS[1][:10])
    assert memory.promise(first, 65)
    assert not memory.promise(second, 180)
    assert memory.promise(second, 10)
    memory.begin_step()
    assert memory.promise(second, 180)
    assert not memory.promise(first, 65)
    memory.withdraw(second)
    assert memory.promise(first, 65)


def test_reserves_come_out_of_what_nobody_was_promised() -> None:
    engine = fake_engine(blocks=8)
    memory = engine.memory
    first = admitted(engine, BOOKS[0][:64], max_tokens=200)
    second = admitted(engine, BOOKS[1][:64], max_tokens=200)
    for sequence in (first, second):
        assert memory.promise(sequence, 64)
    memory.limit_reserves()
    assert first.doc is not None
    assert second.doc is not None
    assert (first.doc.expected_length, second.doc.expected_length) == (264, 0)
    for sequence in (second, first):
        assert sequence.doc is not None
        sequence.doc.append(sequence.tokens)


def test_running_documents_give_back_their_reserve_before_anything_is_forgotten() -> None:
    engine = fake_engine(blocks=8)
    first = admitted(engine, BOOKS[0][:64], max_tokens=150)
    assert engine.memory.promise(first, 64)
    engine.memory.limit_reserves()
    assert first.doc is not None
    first.doc.append(first.tokens)
    assert engine.pool.free_blocks < 7
    kept = engine.new_document()
    kept.append([1])
    second = admitted(engine, BOOKS[1][:64])
    engine.memory.begin_step()
    assert engine.memory.promise(second, engine.pool.free_blocks * 64 + 1)
    assert first.doc.nbytes == engine.pool.block_bytes
    assert kept.length == 1


@pytest.mark.parametrize("known", [0, 40, 64, 100])
def test_a_base_answers_where_the_tree_knows_less(known: int) -> None:
    engine = fake_engine()
    base = engine.new_document()
    base.append(BOOKS[0][:100])
    short = engine.new_document()
    short.append(BOOKS[0][:known])
    engine.memory.publish(short, ANYBODY)
    sequence = waiting(engine, BOOKS[0][:130])
    sequence.request.base = base
    assert engine.memory.admit(sequence) == "admitted"
    assert sequence.num_computed == 100
    assert sequence.doc is not None
    assert sequence.doc.tokens == BOOKS[0][:100]
    engine.memory.check()


def test_a_prefix_is_waited_for_only_while_it_is_computed_and_long_enough() -> None:
    engine = fake_engine()
    running = admitted(engine, BOOKS[0][:200])
    like = waiting(engine, [*BOOKS[0][:64], 1])
    unlike = waiting(engine, [*BOOKS[0][:63], *BOOKS[1][:9]])
    assert engine.memory.admit(like) == "wait for a prefix"
    assert engine.memory.admit(unlike) == "admitted"
    running.num_computed = 199
    assert engine.memory.admit(like) == "wait for a prefix"
    running.state_of_text = GenerationState(
        greedy(), TextDecoder.probe(TOKENIZER), [], max_tokens=5, key=DrawKey(0)
    )
    assert engine.memory.admit(like) == "admitted"


def test_nobody_waits_for_a_prefix_of_another_tenant() -> None:
    engine = fake_engine()
    admitted(engine, BOOKS[0][:200])
    assert engine.memory.admit(waiting(engine, BOOKS[0][:200])) == "wait for a prefix"
    other = waiting(engine, BOOKS[0][:200], tenant=hash_tenant("another"))
    assert engine.memory.admit(other) == "admitted"
    assert other.num_computed == 0


def test_more_found_after_a_preemption_is_counted_once() -> None:
    engine = fake_engine()
    sequence = admitted(engine, BOOKS[0][:100])
    engine.memory.withdraw(sequence)
    other = engine.new_document()
    other.append(BOOKS[0][:90])
    engine.memory.publish(other, ANYBODY)
    assert engine.memory.admit(sequence) == "admitted"
    assert sequence.request.cached_tokens == 90
    assert (engine.memory.queries, engine.memory.hits) == (1, 0)


def test_wrong_books_are_found() -> None:
    engine = fake_engine()
    engine.new_document().append([1])
    engine.memory.check()
    engine.pool.retain(0, 1)
    with pytest.raises(AssertionError, match="nobody knows"):
        engine.memory.check()
