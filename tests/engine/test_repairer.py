"""Documents become exact while nobody waits, at nobody's expense."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import LLM, Document
from kvloom.engine import idle as idle_module
from kvloom.engine import repairer as repairer_module
from kvloom.kv.views import views_of
from kvloom.store.key import ANYBODY, hash_tenant
from tests.engine.worlds import (
    BOOKS,
    TOKENIZER,
    World,
    expected_completion,
    greedy,
)
from tests.fake_model import Oracle

STORY = TOKENIZER.decode(BOOKS[0])
ENOUGH = 1000


def world(**settings: Any) -> World:
    return World(**{"repair_when_idle": True, "enable_prefix_caching": False, **settings})


def document(made: World, length: int = 180, fidelity: Any = "shifted") -> Document:
    """A document whose tenth character gave way to three."""
    host: Any = made
    doc = Document(host)
    doc.append_tokens(TOKENIZER.encode(STORY[:length]))
    doc.edit(10, 11, "abc", fidelity=fidelity, share=0.2)
    return doc


def check_exact(made: World, doc: Document) -> None:
    assert set(doc.provenance.tokens) <= {"exact"}
    answer = list(doc.generate("ab", greedy(4)).outputs[0].token_ids)
    prompt = [*doc.tokens, 1, 2]
    assert answer == expected_completion(Oracle(), prompt, greedy(4), 0, 4000)[0]


changes = st.lists(
    st.tuples(
        st.sampled_from(["edit", "edit", "append", "truncate", "fork", "repair", "ask"]),
        st.integers(0, 200),
        st.integers(0, 60),
        st.text("ab ", max_size=80),
        st.sampled_from(["exact", "repaired", "shifted"]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("caching", [True, False])
@given(changes=changes, step_tokens=st.sampled_from([5, 64, 512]))
@settings(max_examples=8)
def test_after_any_changes_enough_idle_steps_make_a_fresh_prefill(
    caching: bool, changes: list[Any], step_tokens: int
) -> None:
    made = world(enable_prefix_caching=caching, step_tokens=step_tokens)
    docs = [document(made)]
    for what, place, length, text, fidelity, steps in changes:
        doc = docs[place % len(docs)]
        start = min(place, len(doc.tokens))
        if what == "edit":
            stop = min(start + length, len(doc.tokens))
            doc.edit(start, stop, text, fidelity=fidelity, share=0.3)
        elif what == "append":
            doc.append(text)
        elif what == "truncate":
            doc.truncate(start)
        elif what == "fork":
            docs.append(doc.fork())
        elif what == "repair":
            doc.repair()
        elif len(doc.tokens):
            made.submit(doc.tokens, greedy(3))
            made.step()
        texts = [each.text for each in docs]
        made.idle(steps)
        assert [each.text for each in docs] == texts
        for each in docs:
            made.check_exact_part(each.kv)
    made.run()
    assert made.idle(ENOUGH) < ENOUGH
    for doc in docs:
        if doc.tokens:
            check_exact(made, doc)
        doc.close()
    made.engine.release_abandoned()
    made.close()


@pytest.mark.parametrize("fidelity", ["shifted", "repaired"])
def test_pieces_are_small_and_documents_of_others_stay(fidelity: str) -> None:
    made = world(blocks=40)
    doc = document(made, 390, fidelity)
    fork = doc.fork()
    answers = [list(each.generate("b", greedy(5)).outputs[0].token_ids) for each in (doc, fork)]
    assert answers[0] == answers[1]
    before, runs = fork.kv.version, len(made.runner.steps)
    made.engine.idle.release(fork.kv)  # it alone stays as it is
    made.idle(ENOUGH)
    piece = repairer_module.PIECE_ROWS
    assert made.runner.steps[runs:] == [[piece]] * (379 // piece) + [[379 % piece]]
    assert made.engine.stats().idle_repaired_rows == 379
    assert fork.kv.version is before
    assert list(fork.generate("b", greedy(5)).outputs[0].token_ids) == answers[0]
    check_exact(made, doc)


def test_pieces_lie_behind_each_other_where_there_is_a_run_for_all() -> None:
    made = world(blocks=60)
    fillers = [made.engine.new_document() for _ in range(32)]
    for filler in fillers:
        filler.append([3] * 64)
        filler.close_tail()
    doc = document(made, 390, "exact")
    for filler in fillers[::2]:
        made.engine.release(filler)
    doc.edit(20, 20, "z", fidelity="shifted")
    made.idle(ENOUGH)
    assert len(views_of(doc.kv)) <= 4
    check_exact(made, doc)


def test_what_is_known_is_not_computed() -> None:
    made = world(enable_prefix_caching=True)
    doc = document(made)
    made.submit([*doc.tokens, 7], greedy(2))
    made.run()
    assert made.idle(ENOUGH) == 1
    assert made.engine.stats().idle_repaired_rows == 0
    check_exact(made, doc)


def test_what_has_become_exact_answers_for_others() -> None:
    made = world(enable_prefix_caching=True)
    doc = document(made)
    assert made.engine.memory.known_prefix(doc.tokens, ANYBODY) < 20
    made.idle(ENOUGH)
    assert made.engine.memory.known_prefix(doc.tokens, ANYBODY) == len(doc.tokens)
    assert made.engine.memory.known_prefix(doc.tokens, hash_tenant("another")) == 0


def test_prefixes_make_room_that_nobody_used_since_the_edit() -> None:
    made = world(blocks=16, enable_prefix_caching=True)
    old, used, new = ([3 + n, *BOOKS[1][:126]] for n in range(3))
    for prompt in (old, used):
        made.submit(prompt, greedy(1))
        made.run()
    doc = document(made, 300)
    for prompt in (used, new):
        made.submit(prompt, greedy(1))
        made.run()
    made.engine.memory.make_room(0)
    hog = made.engine.new_document()
    hog.append([3] * (64 * made.engine.pool.free_blocks))
    made.engine.memory.protect(hog)
    known = partial(made.engine.memory.known_prefix, tenant=ANYBODY)
    assert [known(prompt) for prompt in (used, new)] == [127, 127]
    rows = made.engine.stats().idle_repaired_rows
    assert 0 < made.idle(ENOUGH) < ENOUGH
    assert made.engine.stats().idle_repaired_rows > rows
    assert [known(prompt) for prompt in (used, new)] == [127, 127]
    assert known(old) < 127
    made.check_exact_part(doc.kv)
    # What it lacks room for is gone on with when somebody has let go of some.
    made.engine.release(hog)
    assert made.idle(ENOUGH) < ENOUGH
    check_exact(made, doc)


def test_what_has_become_exact_answers_for_its_tenant_only() -> None:
    made = world(enable_prefix_caching=True)
    host: Any = made
    whose = hash_tenant("whose")
    doc = Document(host, tenant=whose)
    doc.append_tokens(TOKENIZER.encode(STORY[:180]))
    doc.edit(10, 11, "abc", fidelity="shifted")
    made.idle(ENOUGH)
    check_exact(made, doc)
    assert made.engine.memory.known_prefix(doc.tokens, whose) == len(doc.tokens)
    assert made.engine.memory.known_prefix(doc.tokens, ANYBODY) == 0


@pytest.mark.parametrize("shared", [True, False])
def test_it_takes_free_room_only(shared: bool) -> None:
    made = world(blocks=12)
    doc = document(made, 300)
    fork = doc.fork() if shared else None
    hog = made.engine.new_document()
    hog.append([3] * (64 * made.engine.pool.free_blocks))
    made.engine.memory.protect(hog)
    assert made.engine.pool.free_blocks == 0
    assert made.idle(5) == 1, "it looks for room once"
    assert made.engine.stats().idle_repaired_rows == 0
    hog.truncate(hog.length - 64)
    hog.shrink()
    # One block is enough, where nobody else shows what it replaces.
    assert 0 < made.idle(ENOUGH) < ENOUGH
    exact = doc.provenance.tokens.get("exact", 0)
    assert exact < len(doc.tokens) if shared else exact == len(doc.tokens)
    made.check_exact_part(doc.kv)
    made.engine.release(hog)
    assert made.idle(ENOUGH) < ENOUGH
    assert fork is None or fork.provenance.tokens.get("exact", 0) > exact
    check_exact(made, doc)


def test_what_fails_is_left_alone_until_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    made = world()
    doc = document(made)
    before = doc.provenance
    made.runner.failures = [ValueError("no weights")]
    assert made.idle(ENOUGH) == 1
    assert "no weights" in caplog.text
    assert doc.provenance == before
    assert made.engine.stats().idle_repair_failures == 1
    doc.edit(0, 0, "", fidelity="exact")
    doc = document(made)
    made.idle(ENOUGH)
    check_exact(made, doc)


@pytest.mark.parametrize("gone", ["closed", "changed", "forgotten"])
def test_what_is_gone_is_not_repaired(gone: str) -> None:
    made = world(blocks=32)
    doc = document(made, 390)
    made.idle(1)
    rows = made.engine.stats().idle_repaired_rows
    assert rows == repairer_module.PIECE_ROWS
    if gone == "closed":
        doc.close()
    elif gone == "changed":
        doc.truncate(30)
    else:
        assert made.engine.memory.make_room(made.engine.pool.num_blocks)
        assert doc.provenance.tokens == {"forgotten": len(doc.tokens)}
    made.idle(ENOUGH)
    assert made.engine.stats().idle_repaired_rows == rows
    made.engine.memory.check()
    assert gone == "closed" or doc.generate("a", greedy(1)).usage.provenance.tokens["exact"]


def test_the_last_changed_document_comes_first() -> None:
    made = world()
    docs = [document(made, 70) for _ in range(3)]
    made.idle(1)
    assert [set(doc.provenance.tokens) == {"exact"} for doc in docs] == [False, False, True]


def test_what_is_so_on_purpose_stays() -> None:
    made = world()
    doc, source = document(made, fidelity="exact"), document(made, fidelity="exact")
    source.edit(0, 0, "xyzxyz", fidelity="exact")
    doc.transplant(40, source, 46, 60)
    fork = doc.fork()
    shown = document(made)
    shown.edit(5, 5, "a", fidelity="shifted", baseline="unrotated")
    made.idle(ENOUGH)
    for each in (doc, fork, shown):
        assert "foreign" in each.provenance.tokens
        each.repair()
        check_exact(made, each)
        each.edit(20, 20, "b", fidelity="shifted")
    made.idle(ENOUGH)
    for each in (doc, fork, shown):
        check_exact(made, each)


def test_nothing_is_repaired_where_nobody_wants_it() -> None:
    made = world(repair_when_idle=False)
    doc = document(made)
    assert made.idle(ENOUGH) == 0
    assert "foreign" in doc.provenance.tokens


def test_a_document_becomes_exact_by_itself(
    make_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle_module, "QUIET_S", 0.01)
    llm = make_llm(repair_when_idle=True)
    doc = llm.document(STORY[:180])
    doc.edit(10, 11, "abc", fidelity="shifted")
    deadline = time.monotonic() + 20
    while doc.provenance.tokens != {"exact": 182}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert llm.stats().idle_repaired_rows == 169
    receipt = doc.repair()
    assert receipt.recomputed == 1  # the last token is always run again
    assert (
        list(doc.generate("a", greedy(3)).outputs[0].token_ids)
        == (expected_completion(Oracle(), [*doc.tokens, 1], greedy(3), 0, 4000)[0])
    )
