"""Documents: what a user holds stays what it is, whatever happens to its KV."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import LLM, Document, RequestError
from kvloom.engine import computing as computing_module
from kvloom.engine import document as document_module
from kvloom.engine.engine import Engine
from kvloom.errors import CapacityError, KvloomError, UnsupportedModelError
from kvloom.outputs import Fidelity
from tests.engine.worlds import (
    BOOKS,
    TOKENIZER,
    check_states,
    expected_completion,
    expected_logprobs,
    greedy,
)
from tests.fake_model import FakeRunner, Oracle
from tests.tolerances import TOLERANCE

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


def check_edited(llm: LLM, doc: Document, text: str) -> None:
    """Check what holds of any edited document: its text, and that nobody else gets its KV."""
    assert doc.text == text
    check_states(doc.provenance.tokens, len(doc.tokens))
    (fresh,) = llm.generate([[*doc.tokens, 1]], greedy(2))
    expected = expected_completion(Oracle(), [*doc.tokens, 1], greedy(2), 0, 4000)
    assert list(fresh.outputs[0].token_ids) == expected[0]
    assert set(fresh.usage.provenance.tokens) == {"exact"}
    llm.loop.call(lambda engine: engine.memory.check()).result(10)


FIDELITIES: list[Fidelity] = ["exact", "repaired", "shifted"]
edits = st.tuples(
    st.integers(0, 120), st.integers(0, 60), st.text("abc .\n", max_size=70), st.booleans()
)


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_edits_change_the_text_and_repair_makes_all_exact(
    make_llm: Make, fidelity: Fidelity, caching: bool
) -> None:
    llm = make_llm(runner=FakeRunner(num_layers=2), enable_prefix_caching=caching)

    @settings(max_examples=12)
    @given(st.lists(edits, min_size=1, max_size=3), st.sampled_from(["blend", "first", "random"]))
    def run(made: list[tuple[int, int, str, bool]], selector: str) -> None:
        doc, text = llm.document(STORY[:180]), STORY[:180]
        for place, length, new, whole in made:
            start = min(place, len(text))
            stop = min(start + length, len(text))
            text = text[:start] + new + text[stop:]
            asked: Any = {"fidelity": fidelity, "selector": selector, "share": 0.3}
            receipt = doc.replace(text, **asked) if whole else doc.edit(start, stop, new, **asked)
            assert receipt == doc.receipt
            check_states(receipt.tokens, len(doc.tokens))
            assert receipt.lossless
            check_edited(llm, doc, text)
            if receipt.fidelity == "exact":
                check(llm, doc, TOKENIZER.encode(text))
        receipt = doc.repair()
        assert receipt.tokens in ({"exact": len(text)}, {})
        check(llm, doc, TOKENIZER.encode(text))
        doc.close()

    run()
    assert used(llm) == 0


@pytest.mark.parametrize("share", [0, 1])
def test_a_repair_of_all_is_exact_and_of_nothing_is_a_shift(make_llm: Make, share: float) -> None:
    llm = make_llm(runner=FakeRunner(num_layers=2))
    doc, other = llm.document(STORY[:180]), llm.document(STORY[:180])
    text = STORY[:50] + "abc" + STORY[60:180]
    receipt = doc.edit(50, 60, "abc", fidelity="repaired", share=share)
    shifted = other.edit(50, 60, "abc", fidelity="shifted")
    if share:
        assert (receipt.repaired, receipt.recomputed) == (120, 123)
        expected = expected_completion(Oracle(), [*doc.tokens, 1], greedy(3), 0, 4000)[0]
    else:
        assert (receipt.repaired, receipt.recomputed) == (0, 3)
        assert receipt.tokens == shifted.tokens
        expected = list(other.generate("a", greedy(3)).outputs[0].token_ids)
    assert list(doc.generate("a", greedy(3)).outputs[0].token_ids) == expected
    check_edited(llm, doc, text)


def test_an_edit_and_its_reverse_leave_everything_exact(make_llm: Make) -> None:
    llm = make_llm(enable_prefix_caching=False)
    doc = llm.document(STORY[:180])
    assert doc.edit(50, 50, "abc", fidelity="shifted").tokens["moved"] == 130
    receipt = doc.edit(50, 53, "", fidelity="shifted")
    assert (receipt.tokens, receipt.recomputed) == ({"exact": 180}, 0)
    check(llm, doc, BOOKS[0][:180])


@pytest.mark.parametrize("fidelity", ["repaired", "shifted"])
def test_the_first_tokens_are_edited_exactly(make_llm: Make, fidelity: Fidelity) -> None:
    llm = make_llm(runner=FakeRunner(num_layers=2))
    doc = llm.document(STORY[:180])
    assert doc.edit(3, 5, "z", fidelity=fidelity).fidelity == "exact"
    check(llm, doc, TOKENIZER.encode(STORY[:3] + "z" + STORY[5:180]))
    assert doc.edit(4, 5, "zz", fidelity=fidelity).fidelity == fidelity


@pytest.mark.parametrize("positions", ["opaque", "absolute"])
def test_a_model_that_cannot_move_keys_edits_exactly(make_llm: Make, positions: Any) -> None:
    llm = make_llm(runner=FakeRunner(positions=positions))
    doc, source = llm.document(STORY[:180]), llm.document(STORY[40:180])
    for refused in (
        lambda: doc.edit(50, 60, "abc", fidelity="shifted"),
        lambda: doc.edit(50, 60, "abc", fidelity="repaired"),
        lambda: doc.transplant(50, source, 10, 30),
    ):
        with pytest.raises(UnsupportedModelError, match=positions):
            refused()
        check(llm, doc, BOOKS[0][:180])
    doc.edit(50, 60, "abc")
    check(llm, doc, TOKENIZER.encode(STORY[:50] + "abc" + STORY[60:180]))


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_an_edit_that_fails_changes_nothing(make_llm: Make, fidelity: Fidelity) -> None:
    runner = FakeRunner(num_layers=2)
    llm = make_llm(blocks=9, runner=runner)
    doc = llm.document(STORY[:200])
    for start, stop, text in ((0, 300, "a"), (-1, 3, "a"), ((9, 9), (9, 9), "a")):
        with pytest.raises(RequestError):
            doc.edit(start, stop, text, fidelity=fidelity)
    with pytest.raises(RequestError, match="one of"):
        doc.edit(50, 60, "a", fidelity="best")  # type: ignore[arg-type]
    changed = STORY[:50] + "abc" + STORY[60:90] + "abc" + STORY[99:200]
    for passes in range(1 if fidelity == "exact" else 2 if fidelity == "shifted" else 3):
        runner.failures = [None] * passes + [ValueError("no weights")]
        with pytest.raises(KvloomError, match="no weights"):
            doc.replace(changed, fidelity=fidelity)
        check(llm, doc, BOOKS[0][:200])
    with pytest.raises((CapacityError, RequestError)):
        doc.edit(50, 60, "abc" * 130, fidelity=fidelity)
    check(llm, doc, BOOKS[0][:200])
    doc.close()
    assert used(llm) == 0


def test_a_repair_without_room_changes_nothing(make_llm: Make) -> None:
    llm = make_llm(blocks=4, runner=FakeRunner(num_layers=2), enable_prefix_caching=False)
    doc = llm.document(STORY[:190])
    with pytest.raises(CapacityError):
        doc.edit(50, 60, "abc", fidelity="repaired", share=1)
    check(llm, doc, BOOKS[0][:190])
    doc.close()
    assert used(llm) == 0


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_kv_that_is_forgotten_or_let_go_in_the_middle_is_computed(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch, fidelity: Fidelity
) -> None:
    """Whatever else the engine does between two calls of an edit, the text's KV comes of it."""
    llm = make_llm(runner=FakeRunner(num_layers=2), enable_prefix_caching=False)
    doc = llm.document(STORY[:180])
    plain = computing_module.call

    def disturbed(loop: Any, task: Any) -> Any:
        def forget(engine: Any) -> None:
            for held in list(engine.memory.idle):
                held.truncate(0)

        loop.call(forget).result(10)
        return plain(loop, task)

    with monkeypatch.context() as patch:
        patch.setattr(computing_module, "call", disturbed)
        patch.setattr(document_module, "call", disturbed)
        doc.edit(50, 60, "abc", fidelity=fidelity)
        doc.edit(90, 91, "", fidelity=fidelity)
    text = STORY[:50] + "abc" + STORY[60:180]
    check_edited(llm, doc, text[:90] + text[91:])
    doc.repair()
    check(llm, doc, TOKENIZER.encode(text[:90] + text[91:]))
    doc.close()
    assert used(llm) == 0


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_generations_that_run_meanwhile_are_those_of_the_old_text(
    make_llm: Make, fidelity: Fidelity
) -> None:
    llm = make_llm(runner=FakeRunner(num_layers=2))
    doc = llm.document(STORY[:180])
    fork = doc.fork()
    streams = [each.stream("ab", greedy(20, ignore_eos=True)) for each in (doc, fork)]
    doc.edit(50, 60, "abc", fidelity=fidelity)
    prompt = [*BOOKS[0][:180], 1, 2]
    expected = expected_completion(Oracle(), prompt, greedy(20, ignore_eos=True), 0, 4000)[0]
    for stream in streams:
        assert [token for chunk in stream for token in chunk.token_ids] == expected
    check(llm, fork, BOOKS[0][:180])
    check_edited(llm, doc, STORY[:50] + "abc" + STORY[60:180])


@pytest.mark.parametrize(("keys", "values"), [(True, True), (True, False), (False, True)])
def test_a_transplant_changes_kv_and_no_text(make_llm: Make, keys: bool, values: bool) -> None:
    llm = make_llm(enable_prefix_caching=False)
    doc, source = llm.document(STORY[:180]), llm.document("zz" + STORY[20:180])
    receipt = doc.transplant(60, source, 42, 92, keys=keys, values=values)
    assert receipt.tokens["foreign"] >= 50
    check_edited(llm, doc, STORY[:180])
    check(llm, source, TOKENIZER.encode("zz" + STORY[20:180]))
    with pytest.raises(RequestError, match="differ"):
        doc.transplant(60, source, 43, 93)
    with pytest.raises(RequestError, match="another model"):
        doc.transplant(60, make_llm().document(STORY), 60, 70)
    doc.repair()
    check(llm, doc, BOOKS[0][:180])
    for each in (doc, source):
        each.close()
    assert used(llm) == 0


@pytest.mark.parametrize("store", ["plain", "codes"])
def test_a_tiny_model_answers_after_a_repair_of_all_as_after_a_fresh_prefill(
    tiny_folder: Path, store: str
) -> None:
    settings: Any = {"kv_dtype": "int8"} if store == "codes" else {"dtype": "float32"}
    text = "The quick brown fox jumps over the lazy dog. " * 6
    new = text[:60] + "def add(left, right)" + text[80:]
    with LLM(str(tiny_folder), kv_memory="4MiB", **settings) as llm:
        doc, fresh = llm.document(text), llm.document(new)
        wanted = fresh.score("and so on")
        receipt = doc.edit(60, 80, "def add(left, right)", fidelity="repaired", share=1)
        assert doc.text == new
        assert receipt.repaired > 0
        kind = "int8 KV" if store == "codes" else "float32"
        close = TOLERANCE[kind]["logits"]
        if doc.tokens == fresh.tokens:
            assert doc.score("and so on") == pytest.approx(wanted, abs=close, rel=close)
        doc.repair()
        assert set(doc.provenance.tokens) == {"exact"}


def test_a_repair_without_room_leaves_the_document(
    make_llm: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any) -> Any:
        raise CapacityError("There is no room.")

    llm = make_llm(enable_prefix_caching=False)
    doc = llm.document(STORY[:100])
    text, held = doc.text, used(llm)
    monkeypatch.setattr(Engine, "repair", no_room)
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


def test_many_edits_leave_about_the_blocks_of_a_fresh_document(make_llm: Make) -> None:
    llm = make_llm(enable_prefix_caching=False)
    doc = llm.document(STORY * 3)
    fresh = doc.layout
    assert (fresh.spans, fresh.views) == (1, 1)
    most = 0
    for number in range(40):
        place = 10 + number * 37 % (len(doc.text) - 20)
        doc.edit(place, place + 3, "ab", fidelity="shifted")
        most = max(most, doc.layout.nbytes)
    assert doc.layout.spans > 10
    assert most <= 3 * fresh.nbytes
    assert used(llm) == doc.nbytes


def test_a_deviation_needs_documents_of_the_same_tokens(make_llm: Make) -> None:
    llm = make_llm()
    doc, same = llm.document(STORY), llm.document(STORY)
    assert doc.deviation(same) == (0.0, 0.0)
    with pytest.raises(RequestError, match="of the same tokens"):
        doc.deviation(llm.document(STORY[:-1]))
    with pytest.raises(RequestError, match="none that is 99"):
        doc.deviation(same, layer=99)
