"""Every kind does what its name says, held against plain softmaxes and fresh documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom import LLM, KvloomError
from kvloom.bench import edit_kinds
from kvloom.bench.edit_kinds import Case, Kind, compare, make_kinds, measure
from tests.model.tiny_models import CORPUS, tiny_llama, write_folder
from tests.tolerances import TOLERANCE

NEAR = TOLERANCE["float32"]
TEXT = (CORPUS[0] + CORPUS[1]) * 4


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder = write_folder(
        tmp_path_factory.mktemp("models") / "tiny",
        tiny_llama(max_position_embeddings=1024, initializer_range=0.4),
    )
    with LLM(
        str(folder),
        dtype="float32",
        enable_prefix_caching=False,
        repair_when_idle=False,
        kv_memory="16MiB",
        threads=1,
    ) as llm:
        yield llm


def case(llm: LLM, at: int = 60, put_in: str = "more = 12\n") -> Case:
    old = llm.tokenizer.encode(TEXT)
    new = llm.tokenizer.encode(put_in)
    whole = [*old[:at], *new, *old[at:]]
    # The tokens of the whole text, as any edit comes to.
    whole = llm.tokenizer.encode(llm.retokenizer.text(whole))
    (part,) = llm.retokenizer.replace_text(old, llm.retokenizer.text(whole)).replaced
    change = (part.start, part.start + len(part.tokens))
    return Case("one", "edits", tuple(old), tuple(whole), change, "    return left")


@given(seed=st.integers(0, 2**16), rows=st.integers(1, 6), scale=st.floats(0.1, 20))
def test_divergence_and_agreement_are_those_of_torch(seed: int, rows: int, scale: float) -> None:
    random = torch.Generator().manual_seed(seed)
    full, other = (scale * torch.randn(2, rows, 11, generator=random)).unbind()
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=full.double()),
        torch.distributions.Categorical(logits=other.double()),
    ).mean()
    divergence, agreement = compare(full, other)
    assert divergence == pytest.approx(float(expected), rel=NEAR["probabilities"])
    best = zip(full.numpy(), other.numpy(), strict=True)
    assert agreement == np.mean([np.argmax(a) == np.argmax(b) for a, b in best])
    assert compare(full, full) == (0.0, 1.0)
    assert compare(full, full + 3)[0] == pytest.approx(0, abs=NEAR["probabilities"])


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
    assert found["repaired 15%"].rows == last - first + -(-stale * 15 // 100)
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
