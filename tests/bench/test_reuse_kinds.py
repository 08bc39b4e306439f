"""Every kind does what its name says, held against fresh documents."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom import LLM, KvloomError, StoreSettings
from kvloom.bench.case_results import Outcome
from kvloom.bench.reuse_cases import ReuseCase
from kvloom.bench.reuse_engine import Engines
from kvloom.bench.reuse_kinds import Kind, Scored, make_kinds, measure, new_order
from tests.model.tiny_models import CORPUS
from tests.tolerances import TOLERANCE

from .conftest import tiny_llm

NEAR = TOLERANCE["float32"]
CHUNKS = tuple(f"{number}: {text}\n" for number, text in enumerate(CORPUS[:2] * 2))
SEED = 1  # puts another chunk first, so that nothing is exact where it stands
CASE = ReuseCase("one", "Read this.\n", CHUNKS, "What now?", " nothing")


def measured(llm: LLM, case: ReuseCase, *shares: float) -> tuple[Scored, dict[str, Outcome]]:
    kinds = make_kinds(shares)
    scored, outcomes = measure(Engines(lambda: llm), case, kinds, seed=SEED, scored=8)
    assert [outcome.kind for outcome in outcomes] == [kind.name for kind in kinds]
    return scored, {outcome.kind: outcome for outcome in outcomes}


def prompt(llm: LLM, case: ReuseCase) -> list[int]:
    tokens = llm.tokenizer.encode(case.lead)
    for text in (*new_order(case, SEED), case.question):
        tokens += llm.tokenizer.encode(text, add_special_tokens=False)
    return tokens


@given(
    chunks=st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6), seed=st.integers(0, 2**16)
)
def test_orders_are_new_and_the_same_for_the_same_seed(chunks: list[str], seed: int) -> None:
    case = replace(CASE, chunks=tuple(chunks))
    order = new_order(case, seed)
    assert sorted(order) == sorted(chunks)
    assert order == new_order(case, seed)
    assert (order == chunks) == (len(set(chunks)) == 1)


def test_all_kinds_of_one_prompt(llm: LLM) -> None:
    _, found = measured(llm, CASE, 0.05, 0.15, 1.0)
    assert not any(outcome.failure for outcome in found.values())
    tokens = len(prompt(llm, CASE))
    chunked = sum(len(llm.tokenizer.encode(c, add_special_tokens=False)) for c in CHUNKS)
    exact, alone = found["exact"], found["none"]
    assert (exact.rows, exact.divergence, exact.agreement) == (tokens, 0, 1)
    assert found["prefix"].rows < tokens
    assert found["prefix"].divergence == pytest.approx(0, abs=NEAR["probabilities"])
    assert found["prefix"].nll == pytest.approx(exact.nll, rel=NEAR["logprobs"])
    # The lead, the question, and nothing of the chunks.
    assert (alone.rows, alone.repaired) == (tokens - chunked, 0)
    assert alone.divergence > 10 * NEAR["probabilities"]
    naive = found["naive"]
    assert (naive.rows, naive.repaired) == (alone.rows, 0)
    # Not the chunks that `none` joins.
    assert abs(naive.divergence - alone.divergence) > 10 * NEAR["probabilities"]
    for name in ("blend 15%", "first 15%", "random 15%", "naive 15%"):
        repaired = found[name].repaired
        assert 0.15 * chunked <= repaired <= 0.15 * chunked + len(CHUNKS)
        assert found[name].rows == alone.rows + repaired
        assert found[name].divergence > 0
    # All rows of the chunks computed again: what a fresh prefill gives.
    assert 0 < found["craft 15%"].repaired < found["craft 15%"].rows < tokens
    assert found["blend 100%"].rows == tokens
    assert found["blend 100%"].divergence == pytest.approx(0, abs=NEAR["probabilities"])


def test_exact_is_a_fresh_document_and_its_answer_is_scored_first(llm: LLM) -> None:
    scored, found = measured(llm, CASE, 0.15)
    answer = llm.tokenizer.encode(CASE.answer, add_special_tokens=False)
    assert scored.text.startswith(CASE.answer)
    assert scored.answered == len(answer)
    fresh = llm.document(prompt(llm, CASE))
    assert found["exact"].nll == pytest.approx(-sum(fresh.score(CASE.answer)), rel=NEAR["logprobs"])
    fresh.close()
    # Chunks were computed before the clock was started, for whichever kind first needs them.
    assert found["blend 15%"].rows == found["none"].rows + found["blend 15%"].repaired


def test_without_an_answer_the_model_says_what_is_scored(llm: LLM) -> None:
    scored, found = measured(llm, replace(CASE, answer=""), 0.15)
    assert scored.answered == 0
    fresh = llm.document(prompt(llm, CASE))
    assert found["exact"].nll == pytest.approx(-sum(fresh.score(scored.text)), rel=NEAR["logprobs"])
    fresh.close()


def test_a_long_answer_is_cut(llm: LLM) -> None:
    scored, _ = measured(llm, replace(CASE, answer=CORPUS[0]), 0.15)
    assert scored.tokens == scored.answered == 8
    assert CORPUS[0].startswith(scored.text)


def test_what_is_refused_is_a_reason_and_the_others_are_measured(llm: LLM) -> None:
    kinds = (Kind("exact", fidelity="exact"), Kind("odd", planner="odd"), Kind("prefix", "prefix"))
    _, (exact, odd, prefix) = measure(Engines(lambda: llm), CASE, kinds, seed=SEED, scored=8)
    assert odd.failure is not None
    assert "odd" in odd.failure
    assert exact.failure is prefix.failure is None


def test_without_the_exact_prompt_nothing_is_measured_and_nothing_is_kept(llm: LLM) -> None:
    before = llm.stats().kv_bytes_used
    with pytest.raises(KvloomError):
        measure(
            Engines(lambda: llm),
            replace(CASE, chunks=CHUNKS * 40),
            make_kinds([0.15]),
            seed=SEED,
            scored=8,
        )
    assert llm.stats().kv_bytes_used == before


def test_after_a_restart_chunks_come_from_disk_and_give_the_same(
    llm: LLM, tiny_folder: str, tmp_path: Path
) -> None:
    opened = partial(tiny_llm, tiny_folder, store=StoreSettings(folder=tmp_path))
    kinds = (Kind("exact", fidelity="exact"), Kind("blend"), Kind("none", planner="none"))
    _, kept = measure(Engines(lambda: llm), CASE, kinds, seed=SEED, scored=8)
    with closing(Engines(opened, restarts=True)) as engines:
        first = engines.llm
        _, found = measure(engines, CASE, kinds, seed=SEED, scored=8)
        assert engines.llm is not first
    assert [outcome.loaded_bytes > 0 for outcome in found] == [False, True, True]
    for loaded, one in zip(found, kept, strict=True):
        assert one.loaded_bytes == 0
        assert (loaded.rows, loaded.repaired) == (one.rows, one.repaired)
        assert loaded.divergence == pytest.approx(one.divergence, abs=NEAR["probabilities"])
