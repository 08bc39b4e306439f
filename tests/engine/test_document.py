"""Documents: what a user holds stays what it is, whatever happens to its KV."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import LLM, Document, RequestError
from kvloom.engine import computing as computing_module
from kvloom.engine import kept_text as kept_text_module
from kvloom.engine.engine import Engine
from kvloom.errors import CapacityError, KvloomError, UnsupportedModelError
from kvloom.outputs import Fidelity
from tests.engine.documents import STORY, check, used
from tests.engine.worlds import (
    BOOKS,
    TOKENIZER,
    check_states,
    expected_completion,
    greedy,
)
from tests.fake_model import FakeRunner, Oracle
from tests.tolerances import TOLERANCE

Make = Callable[..., LLM]


def make_tiny(folder: Path, **settings: Any) -> LLM:
    """A real model whose documents nobody makes better than they were asked for."""
    return LLM(str(folder), kv_memory="4MiB", repair_when_idle=False, threads=1, **settings)


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
        patch.setattr(kept_text_module, "call", disturbed)
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
    with make_tiny(tiny_folder, **settings) as llm:
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
    with make_tiny(tiny_folder, dtype="float32") as llm:
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
    with make_tiny(tiny_folder, enable_prefix_caching=False) as llm:
        scores = []
        for baseline in (None, "unrotated"):
            doc = llm.document(STORY[:100])
            doc.edit(40, 41, "#", fidelity="shifted", baseline=baseline)
            scores.append(doc.score("the end"))
        assert scores[0] == scores[1]


def test_rows_that_mention_what_an_edit_renames_are_repaired(tiny_folder: Any) -> None:
    text = "".join(f"line {n} of a text;\n" for n in range(8))
    text = "# A module about fruit.\ndef apples():\n" + text + "apples()\n" + text
    with make_tiny(tiny_folder, enable_prefix_caching=False) as llm:
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
