"""Every kind does what its name says, held against fresh documents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvloom import LLM, KvloomError
from kvloom.bench import edit_kinds
from kvloom.bench.edit_kinds import Case, Kind, make_kinds, measure
from tests.model.tiny_models import CORPUS
from tests.tolerances import TOLERANCE

NEAR = TOLERANCE["float32"]
TEXT = (CORPUS[0] + CORPUS[1]) * 4


def case(llm: LLM, at: int = 60, put_in: str = "more = 12\n") -> Case:
    old = llm.tokenizer.encode(TEXT)
    new = llm.tokenizer.encode(put_in)
    whole = [*old[:at], *new, *old[at:]]
    # The tokens of the whole text, as any edit comes to.
    whole = llm.tokenizer.encode(llm.retokenizer.text(whole))
    (part,) = llm.retokenizer.replace_text(old, llm.retokenizer.text(whole)).replaced
    change = (part.start, part.start + len(part.tokens))
    return Case("one", "edits", tuple(old), tuple(whole), change, "    return left")


def test_all_kinds_of_one_edit(llm: LLM) -> None:
    one = case(llm)
    kinds = make_kinds([0.05, 0.15, 1.0])
    found = {outcome.kind: outcome for outcome in measure(llm, one, kinds)}
    assert list(found) == [kind.name for kind in kinds]
    assert not any(outcome.failure or outcome.fell_back for outcome in found.values())
    size, (first, last) = len(one.new_tokens), one.change
    assert found["exact"].rows == size - first
    assert found["shifted"].rows == found["unrotated"].rows == found["dropped"].rows == last - first
    assert found["ignored"].rows == 0
    stale = size - last
    assert found["repaired 15%"].repaired == -(-stale * 15 // 100)
    assert found["repaired 15%"].rows == last - first + found["repaired 15%"].repaired
    assert found["exact"].divergence == 0
    assert found["exact"].agreement == 1
    # All stale rows computed again: what a fresh prefill gives.
    assert found["repaired 100%"].rows == found["exact"].rows
    assert found["repaired 100%"].divergence == pytest.approx(0, abs=NEAR["probabilities"])
    for name in ("shifted", "unrotated", "dropped", "ignored"):
        assert found[name].divergence > 10 * NEAR["probabilities"], name


def test_exact_ignored_and_dropped_are_those_of_fresh_documents(llm: LLM) -> None:
    one = replace(case(llm), other=" nothing")
    found = {outcome.kind: outcome for outcome in measure(llm, one, make_kinds([0.15]))}
    texts = {
        "exact": one.new_tokens,
        "ignored": one.old_tokens,
        "dropped": one.new_tokens[: one.change[1]],
    }
    for name, tokens in texts.items():
        fresh = llm.document(list(tokens))
        assert found[name].nll == pytest.approx(
            -sum(fresh.score(one.continuation)), rel=NEAR["logprobs"]
        )
        assert found[name].nll_other == pytest.approx(
            -sum(fresh.score(one.other)), rel=NEAR["logprobs"]
        )
        fresh.close()


def test_an_edit_of_equal_length_moves_nothing_and_unrotated_is_shifted(llm: LLM) -> None:
    old = llm.tokenizer.encode(TEXT)
    place = max(i for i, token in enumerate(old) if llm.retokenizer.text([token]) == ",")
    new = [*old[:place], llm.tokenizer.encode(";")[0], *old[place + 1 :]]
    one = Case("one", "edits", tuple(old), tuple(new), (place, place + 1), "    return")
    found = {outcome.kind: outcome for outcome in measure(llm, one, make_kinds([0.15]))}
    assert found["shifted"].rows == 1
    assert found["unrotated"].divergence == found["shifted"].divergence


def test_an_edit_of_the_first_tokens_is_computed_exactly_once(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried: list[str] = []
    carry_out = edit_kinds._carry_out

    def note(llm: LLM, old: object, case: Case, kind: Kind) -> object:
        carried.append(kind.name)
        return carry_out(llm, old, case, kind)  # type: ignore[arg-type]

    monkeypatch.setattr(edit_kinds, "_carry_out", note)
    kinds = make_kinds([0.15])
    found = measure(llm, case(llm, at=1), kinds)
    assert carried == ["exact", "repaired 15%", "dropped", "ignored"]
    assert [outcome.kind for outcome in found] == [kind.name for kind in kinds]
    fell_back = {outcome.kind for outcome in found if outcome.fell_back}
    assert fell_back == {kind.name for kind in kinds} - {"exact", "dropped", "ignored"}
    exact = found[0]
    assert all((x.rows, x.nll) == (exact.rows, exact.nll) for x in found if x.fell_back)


def test_what_is_refused_is_a_reason_and_the_others_are_measured(llm: LLM) -> None:
    kinds = (
        Kind("exact"),
        Kind("odd", fidelity="repaired", selector="odd"),
        Kind("ignored", "ignore"),
    )
    exact, odd, ignored = measure(llm, case(llm), kinds)
    assert odd.failure is not None
    assert "no selector 'odd'" in odd.failure
    assert exact.failure is None
    assert ignored.nll > 0


def test_without_the_exact_document_nothing_is_measured(llm: LLM, tmp_path: Path) -> None:
    long = replace(case(llm), new_tokens=tuple([5] * 2000))
    before = llm.stats().kv_bytes_used
    with pytest.raises(KvloomError):
        measure(llm, long, make_kinds([0.15]))
    assert llm.stats().kv_bytes_used == before
