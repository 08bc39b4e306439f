"""Documents: what a user holds stays what it is, whatever happens to its KV."""

from __future__ import annotations

import gc
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from kvloom import LLM, Document, RequestError
from kvloom.engine import computing as computing_module
from kvloom.engine import document as document_module
from kvloom.errors import CapacityError, KvloomError
from tests.engine.worlds import BOOKS, TOKENIZER, expected_completion, expected_logprobs, greedy
from tests.fake_model import FakeRunner, Oracle

Make = Callable[..., LLM]
STORY = TOKENIZER.decode(BOOKS[0])


def used(llm: LLM) -> int:
    """Bytes in use, prefixes not counted."""

    def count(engine: Any) -> int:
        engine.release_abandoned()
        if engine.memory.tree is not None:
            engine.memory.tree.clear()
        engine.memory.check()
        return int(engine.pool.used_bytes)

    return llm.loop.call(count).result(10)


def check(llm: LLM, doc: Document, tokens: list[int]) -> None:
    """Check a document's tokens, and that its KV is that of its tokens."""
    assert doc.tokens == tokens
    assert doc.text == TOKENIZER.decode(tokens, skip_special_tokens=False)
    answer = doc.generate("ab", greedy(4))
    prompt = [*tokens, 1, 2]
    expected = expected_completion(Oracle(), prompt, greedy(4), 0, 4000)
    assert list(answer.outputs[0].token_ids) == expected[0]
    assert list(answer.prompt_token_ids) == prompt
    assert sum(doc.provenance.tokens.values()) == len(tokens)
    assert set(doc.provenance.tokens) <= {"exact", "forgotten"}


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


def test_a_repair_without_room_leaves_the_document(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> Any:
        raise CapacityError("There is no room.")

    llm = make_llm(enable_prefix_caching=False)
    doc = llm.document(STORY[:100])
    text, held = doc.text, used(llm)
    monkeypatch.setattr(document_module, "repair", no_room)
    with pytest.raises(CapacityError):
        doc.edit(40, 41, "abc", fidelity="repaired")
    assert doc.text == text
    assert doc.provenance.tokens == {"exact": 100}
    assert used(llm) == held
    assert doc.edit(40, 41, "abc", fidelity="shifted").recomputed == 3


def edited(llm: LLM, tokens: list[int], **how: Any) -> Document:
    """Return a document of the tokens with characters put in."""
    doc = llm.document(tokens)
    doc.edit(40, 40, "1234567", **how)
    return doc


def test_a_baseline_shows_moved_keys_as_they_were_and_is_trusted_nowhere(
    tiny_folder: Any,
) -> None:
    with LLM(str(tiny_folder), kv_memory="4MiB", dtype="float32", threads=1) as llm:
        tokens = llm.tokenizer.encode(STORY[:200])
        shifted = edited(llm, tokens, fidelity="shifted")
        unrotated = edited(llm, tokens, fidelity="shifted", baseline="unrotated")
        assert unrotated.text == shifted.text == STORY[:40] + "1234567" + STORY[40:200]
        assert unrotated.tokens == shifted.tokens
        assert "moved" in shifted.provenance.tokens
        assert "moved" not in unrotated.provenance.tokens
        assert unrotated.provenance.tokens["foreign"] == shifted.provenance.tokens["foreign"]
        assert unrotated.score("the end") != shifted.score("the end")
        # Nobody is served what it shows, and a repair leaves nothing of it.
        fresh = llm.document(shifted.tokens)
        exact = fresh.score("the end")
        for doc in (shifted, unrotated):
            doc.repair()
            assert doc.provenance.tokens == {"exact": len(doc.tokens)}
            assert doc.score("the end") == pytest.approx(exact, abs=1e-5)


def test_the_baseline_of_an_edit_that_moves_nothing_is_the_shifted_one(tiny_folder: Any) -> None:
    with LLM(str(tiny_folder), kv_memory="4MiB", enable_prefix_caching=False, threads=1) as llm:
        scores = []
        for baseline in (None, "unrotated"):
            doc = llm.document(STORY[:100])
            doc.edit(40, 41, "#", fidelity="shifted", baseline=baseline)
            scores.append(doc.score("the end"))
        assert scores[0] == scores[1]


def test_rows_that_mention_what_an_edit_renames_are_repaired(tiny_folder: Any) -> None:
    text = "".join(f"line {n} of a text;\n" for n in range(8))
    text = "# A module about fruit.\ndef apples():\n" + text + "apples()\n" + text
    with LLM(str(tiny_folder), kv_memory="4MiB", enable_prefix_caching=False, threads=1) as llm:
        doc = llm.document(text)
        place = text.index("apples")
        receipt = doc.edit(
            place, place + 6, "pears", fidelity="repaired", share=0.1, selector="mentions"
        )
        assert receipt.repaired > 0
        spelled, repaired = "", []
        for span, taint in doc.kv.taints():
            part = llm.retokenizer.text(span.tokens)
            repaired += [len(spelled)] if "REPAIRED" in str(taint) else []
            spelled += part
        mentioned = spelled.index("apples")
        assert any(mentioned <= at + 2 and at < mentioned + 6 for at in repaired)


@pytest.mark.parametrize(
    ("how", "param"),
    [
        ({"fidelity": "shifted", "baseline": "odd"}, "baseline"),
        ({"fidelity": "repaired", "baseline": "unrotated"}, "baseline"),
        ({"baseline": "unrotated"}, "baseline"),
        ({"fidelity": "odd"}, "fidelity"),
        ({"fidelity": "repaired", "selector": "odd"}, "selector"),
        ({"fidelity": "repaired", "share": 1.1}, "share"),
    ],
)
def test_settings_of_edits_that_cannot_be_are_refused(
    make_llm: Make, how: dict[str, Any], param: str
) -> None:
    llm = make_llm()
    doc = llm.document(STORY[:100])
    with pytest.raises(RequestError) as raised:
        doc.edit(40, 44, "abc", **how)
    assert raised.value.param == param
    check(llm, doc, TOKENIZER.encode(STORY[:100]))
