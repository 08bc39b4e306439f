"""Kept texts: what a user holds stays what it is, whatever happens to its KV."""

from __future__ import annotations

import gc
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from kvloom import LLM, RequestError
from kvloom.engine import computing as computing_module
from kvloom.errors import KvloomError
from tests.engine.documents import STORY, check, used
from tests.engine.worlds import (
    BOOKS,
    TOKENIZER,
    expected_logprobs,
    greedy,
)
from tests.fake_model import FakeRunner, Oracle

Make = Callable[..., LLM]


@pytest.mark.parametrize("caching", [True, False])
def test_documents_grow_are_cut_and_fork(make_llm: Make, caching: bool) -> None:
    llm = make_llm(enable_prefix_caching=caching)
    tokens = TOKENIZER.encode(STORY[:100])
    doc = llm.document(STORY[:100])
    check(llm, doc, tokens)
    doc.append("more")
    check(llm, doc, [*tokens, *TOKENIZER.encode("more")])
    doc.append("")
    fork = doc.fork()
    doc.truncate(70)
    check(llm, doc, tokens[:70])
    fork.append("!" if "!" in TOKENIZER.letters else "z")
    check(llm, fork, [*tokens, *TOKENIZER.encode("morez")])
    check(llm, doc, tokens[:70])
    doc.truncate(0)
    assert doc.tokens == []
    doc.append(STORY[:5])
    check(llm, doc, tokens[:5])
    for each in (doc, fork):
        each.close()
    assert used(llm) == 0


def test_a_document_is_not_computed_again(make_llm: Make) -> None:
    llm = make_llm(enable_prefix_caching=False)
    doc = llm.document(STORY[:150])
    answer = doc.generate("ab", greedy(2))
    assert (answer.usage.cached_tokens, answer.usage.computed_tokens) == (150, 2)
    doc.append("abc")
    assert llm.stats().computed_tokens == 150 + 2 + 3
    fork = doc.fork()
    assert fork.generate("", greedy(1)).usage.computed_tokens == 1


def test_bytes_are_those_of_the_blocks(make_llm: Make) -> None:
    llm = make_llm(enable_prefix_caching=False)
    doc = llm.document(STORY[:150])
    assert doc.nbytes == llm.stats().kv_bytes_used == 3 * 64 * 4 * 4
    assert doc.provenance.nbytes == {"plain": doc.nbytes}
    fork = doc.fork()
    assert llm.stats().kv_bytes_used == doc.nbytes == fork.nbytes
    doc.truncate(10)
    doc.close()
    assert fork.nbytes == llm.stats().kv_bytes_used


@pytest.mark.parametrize("length", [1, 64, 100])
def test_scores_are_those_of_a_plain_softmax(make_llm: Make, length: int) -> None:
    llm = make_llm(step_tokens=30)
    doc = llm.document(STORY[:length])
    text = "the end of it all. " * 4
    tokens = [*doc.tokens, *TOKENIZER.encode(text)]
    for _ in range(2):
        assert doc.score(text) == pytest.approx(
            expected_logprobs(Oracle(), tokens, length - 1), abs=1e-5
        )
    scores, logits = doc.score(text, return_logits=True)
    assert logits.shape == (len(text), 32)
    own = logits.log_softmax(-1)[torch.arange(len(text)), torch.tensor(tokens[length:])]
    assert own.tolist() == pytest.approx(scores, abs=1e-5)
    check(llm, doc, tokens[:length])
    doc.close()
    assert used(llm) == 0


def test_forgotten_kv_is_computed_again(make_llm: Make) -> None:
    llm = make_llm(blocks=5, enable_prefix_caching=False)
    doc = llm.document(STORY[:200])
    llm.generate(BOOKS[1][:200], greedy(2))
    assert doc.provenance.tokens == {"forgotten": 200}
    assert doc.nbytes == 0
    check(llm, doc, BOOKS[0][:200])
    fork = doc.fork()
    doc.truncate(150)
    doc.append("ab")
    check(llm, doc, [*BOOKS[0][:150], 1, 2])
    check(llm, fork, BOOKS[0][:200])


def test_a_dropped_document_gives_its_pages_back(make_llm: Make) -> None:
    llm = make_llm(enable_prefix_caching=False)
    doc = llm.document(STORY[:150])
    assert used(llm) > 0
    del doc
    gc.collect()
    assert used(llm) == 0
    assert llm.stats().idle_documents == 0


def test_a_closed_document_is_only_forgotten(make_llm: Make) -> None:
    llm = make_llm(enable_prefix_caching=False)
    doc = llm.document(STORY[:150])
    stream = doc.stream("ab", greedy(4))
    doc.close()
    assert len(list(stream)) >= 1
    doc.close()
    assert used(llm) == 0
    check(llm, doc, BOOKS[0][:150])


@pytest.mark.parametrize("length", [-1, 151, 1.5, None, "3"])
def test_a_wrong_length_changes_nothing(make_llm: Make, length: Any) -> None:
    llm = make_llm()
    doc = llm.document(STORY[:150])
    with pytest.raises(RequestError) as refused:
        doc.truncate(length)
    assert refused.value.param == "length"
    check(llm, doc, BOOKS[0][:150])


def test_what_cannot_be_done_is_said_and_changes_nothing(make_llm: Make) -> None:
    runner = FakeRunner()
    llm = make_llm(blocks=4, runner=runner)
    doc = llm.document(STORY[:100])
    with pytest.raises(RequestError, match="fit"):
        doc.append(STORY[:200])
    for call in (doc.append, doc.score, doc.generate, doc.stream):
        with pytest.raises(RequestError, match="string"):
            call([1, 2])  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="no text"):
        doc.score("")
    with pytest.raises(RequestError, match="empty"):
        llm.document("").score("a")
    with pytest.raises(RequestError, match="empty"):
        llm.document("").generate()
    runner.failures = [ValueError("no weights today")]
    with pytest.raises(KvloomError, match="no weights today"):
        doc.append("abc")
    check(llm, doc, BOOKS[0][:100])


@pytest.mark.parametrize("late", [False, True])
def test_an_interrupt_while_waiting_leaves_nothing(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    class Interrupted(SimpleQueue):  # type: ignore[type-arg]
        first = True

        def get(self, *args: Any) -> Any:
            if self.first:
                self.first = False
                if late:
                    while self.empty():
                        pass
                raise KeyboardInterrupt
            return super().get(*args)

    llm = make_llm(enable_prefix_caching=False)
    doc = llm.document(STORY[:10])
    before = used(llm)
    with monkeypatch.context() as patch:
        patch.setattr(computing_module, "SimpleQueue", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            doc.append(STORY[:200])
    assert used(llm) == before
    check(llm, doc, BOOKS[0][:10])


def test_scores_of_a_tiny_model_are_a_fresh_prefill_s(tiny_llm: LLM) -> None:
    text = "The quick brown fox jumps"
    doc = tiny_llm.document("def add(left, right):")
    scores = doc.score(text)
    (whole,) = tiny_llm.generate(
        [*doc.tokens, *tiny_llm.tokenizer.encode(text, add_special_tokens=False)],
        greedy(1, prompt_logprobs=0),
    )
    assert whole.prompt_logprobs is not None
    entries = whole.prompt_logprobs[len(doc.tokens) :]
    tokens = whole.prompt_token_ids[len(doc.tokens) :]
    fresh = [entry[token].logprob for entry, token in zip(entries, tokens, strict=True) if entry]
    assert scores == pytest.approx(fresh, abs=1e-4)
