"""Prompts become results; those that are too long are skipped and counted."""

from __future__ import annotations

import pytest

from kvloom import LLM, RequestError
from kvloom.bench.case_figures import make_rows
from kvloom.bench.case_run import Running
from kvloom.bench.reuse_cases import Questions, Texts
from kvloom.bench.reuse_engine import Engines
from kvloom.bench.reuse_results import ReuseOptions, ReuseReport
from kvloom.bench.reuse_run import run_reuse
from kvloom.bench.reuse_source import Question
from tests.model.tiny_models import CORPUS

OPTIONS = ReuseOptions(chunks=3, chunk_tokens=30, scored=6, shares=(0.15,))


pytestmark = pytest.mark.usefixtures("at_once")


def run(llm: LLM, material: Questions | Texts, options: ReuseOptions = OPTIONS) -> ReuseReport:
    return run_reuse(Engines(lambda: llm), options, material, Running(limit=3))


def test_prompts_of_texts_are_measured(llm: LLM) -> None:
    report = run(llm, Texts("here", [text * 3 for text in CORPUS]))
    assert [result.name for result in report.results] == [
        "chunks 1 to 3",
        "chunks 4 to 6",
        "chunks 7 to 9",
    ]
    for result in report.results:
        assert result.chunks == 3
        assert 60 < result.tokens < 200
        assert result.scored == result.answered == 6
        assert [outcome.kind for outcome in result.outcomes] == list(report.kinds)
        assert result.outcomes[0].rows == result.tokens
    assert [row.kind for row in make_rows(report)] == list(report.kinds)


def test_prompts_that_are_too_long_are_skipped_and_counted(llm: LLM) -> None:
    questions = [
        Question("long", (CORPUS[0] * 200,), "what", "it"),
        Question("short", (CORPUS[0], CORPUS[1]), "what", "it"),
    ]
    options = ReuseOptions(chunks=2, chunk_tokens=0, scored=6, shares=(0.15,))
    report = run(llm, Questions("a set", questions), options)
    assert report.skipped == {"long": "the prompt is longer than the context of 1024 tokens"}
    assert [result.name for result in report.results] == ["short"]


def test_no_text_and_prefix_caching_are_refused(llm: LLM, tiny_folder: str) -> None:
    with pytest.raises(RequestError, match="nowhere gives no prompts to measure: there is none"):
        run(llm, Texts("nowhere", []))
    with (
        LLM(tiny_folder, dtype="float32", kv_memory="4MiB", threads=1) as caching,
        pytest.raises(RequestError, match="bench of prompts needs a model without prefix caching"),
    ):
        run(caching, Texts("here", CORPUS))
