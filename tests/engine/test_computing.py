"""What is computed for a document comes whole, or leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from kvloom import LLM
from kvloom.engine.computing import carry_out, compute, document_of, forked, kept, repair
from kvloom.engine.engine import Engine
from kvloom.kv.plan import Compute, EditPlan, Keep
from kvloom.reuse.select import selector
from kvloom.store.key import ANYBODY
from tests.engine.worlds import BOOKS
from tests.fake_model import FakeRunner

Make = Callable[..., LLM]
TOKENS = BOOKS[0][:150]


def state(llm: LLM) -> tuple[int, int, int, int]:
    """Used bytes, documents in work and idle, and mailboxes, after a check of the books."""

    def count(engine: Any) -> tuple[int, int, int]:
        engine.release_abandoned()
        engine.memory.check()
        memory = engine.memory
        return int(engine.pool.used_bytes), len(memory.in_work), len(memory.idle)

    return (*llm.loop.call(count).result(10), len(llm.loop._mailboxes))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("wait", range(12))
def test_an_interrupt_of_any_wait_leaves_nothing(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, wait: int, late: bool
) -> None:
    """Interrupted before the task could run, or behind it."""
    llm = make_llm(runner=FakeRunner(num_layers=2), enable_prefix_caching=False)
    doc = llm.document(TOKENS)
    before = state(llm)
    waits = 0
    result = Future.result

    def interrupted(future: Any, timeout: Any = None) -> Any:
        nonlocal waits
        waits += 1
        if waits == wait + 1:
            if late:
                result(future, 10)
            raise KeyboardInterrupt
        return result(future, timeout)

    with monkeypatch.context() as patch:
        patch.setattr(Future, "result", interrupted)
        try:
            doc.edit(50, 60, "abc", fidelity="repaired")
        except KeyboardInterrupt:
            edited = doc.tokens != TOKENS
            assert not edited or doc.tokens == [*TOKENS[:50], 1, 2, 3, *TOKENS[60:]]
        else:
            assert waits <= wait
            return
    after = state(llm)
    assert after[1:] == before[1:]
    assert edited or after[0] == before[0]
    doc.repair()
    assert doc.provenance.tokens == {"exact": len(doc.tokens)}


def test_protection_ends_with_its_context(make_llm: Make) -> None:
    llm = make_llm()
    doc = document_of(llm.loop, Engine.new_document)
    with kept(llm.loop, doc), kept(llm.loop, doc):
        assert state(llm)[1:3] == (1, 0)
    assert state(llm)[1:3] == (0, 1)
    with forked(llm.loop, doc) as fork:
        assert fork is not doc
        assert state(llm)[1:3] == (1, 1)
    with kept(llm.loop, doc):
        llm.loop.abandon(doc)
        assert state(llm)[1:3] == (0, 0)
    assert state(llm)[1:3] == (0, 0)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_new_document_that_is_forgotten_is_computed(make_llm: Make, gone: int) -> None:
    llm = make_llm(enable_prefix_caching=False)
    base = compute(llm.loop, TOKENS, tenant=ANYBODY).doc
    parts = (Keep(0, 40), Compute((7, 8)), Keep(50, 90), Compute((9,)), Keep(100, 150))
    plan = EditPlan(parts)
    calls = 0
    real = llm.loop.call

    def call(task: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3 == gone:
            real(lambda engine: [doc.truncate(0) for doc in engine.memory.idle])
        return real(task)

    with forked(llm.loop, base) as fork:
        llm.loop.call = call  # type: ignore[method-assign]
        built, _ = carry_out(llm.loop, fork, plan, tenant=ANYBODY)
        llm.loop.call = real  # type: ignore[method-assign]
        assert plan.tokens(fork) == [*TOKENS[:40], 7, 8, *TOKENS[50:90], 9, *TOKENS[100:150]]
    assert built.tokens in ([], [*TOKENS[:40], 7, 8, *TOKENS[50:90], 9, *TOKENS[100:150]])
    state(llm)


def test_rows_are_counted_and_exactness_may_be_asked_for(make_llm: Make) -> None:
    llm = make_llm(runner=FakeRunner(num_layers=2), enable_prefix_caching=False)
    base = compute(llm.loop, TOKENS, tenant=ANYBODY).doc
    with forked(llm.loop, base) as fork:
        plan = EditPlan((Keep(0, 40), Compute((7,)), Keep(60, 150)))
        built, rows = carry_out(llm.loop, fork, plan, tenant=ANYBODY)
    assert rows == 1
    exact = compute(llm.loop, [*built.tokens, 3], built, tenant=ANYBODY, exact_only=True)
    assert (exact.usage.cached_tokens, exact.doc.exact_length()) == (41, 132)
    any_kv = compute(llm.loop, [*built.tokens, 3], built, tenant=ANYBODY)
    assert any_kv.usage.cached_tokens == 131
    done = repair(llm.loop, built, 1, selector("first"))
    assert done.receipt.repaired == 90
    assert state(llm)[1] == 0
