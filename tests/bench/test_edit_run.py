"""Edits become cases, and cases results; what cannot be measured has a reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from kvloom import LLM, RequestError
from kvloom.bench.case_figures import make_rows
from kvloom.bench.case_run import Running
from kvloom.bench.case_source import Source
from kvloom.bench.edit_places import PlaceRule
from kvloom.bench.edit_results import EditOptions, EditReport
from kvloom.bench.edit_run import AnyEdit, cut_case, file_case, run_edits
from kvloom.bench.edit_source import CutEdit, FileEdit
from tests.model.tiny_models import CORPUS

TEXT = (CORPUS[0] + CORPUS[1] + "\n") * 3
OPTIONS = EditOptions(places=PlaceRule(5, 6, 200), shares=(0.15,))


pytestmark = pytest.mark.usefixtures("at_once")


def file_edits(count: int) -> list[FileEdit]:
    return [
        FileEdit(f"edit {n}", TEXT, TEXT[: 60 + n] + f" new{n} = {n}\n" + TEXT[60 + n :])
        for n in range(count)
    ]


def run(llm: LLM, edits: Sequence[AnyEdit]) -> EditReport:
    return run_edits(llm, OPTIONS, Source("here", edits), Running(limit=99))


def test_edits_are_measured_and_what_cannot_be_is_skipped_with_its_reason(llm: LLM) -> None:
    good = file_edits(2)
    late = FileEdit("late", TEXT, TEXT + "x")
    same = FileEdit("same", TEXT, TEXT)
    report = run(llm, [late, same, *good])
    assert [result.name for result in report.results] == ["edit 0", "edit 1"]
    assert all(len(result.outcomes) == len(report.kinds) for result in report.results)
    assert make_rows(report)[0].kind == "exact"
    assert report.skipped == {
        "late": "no change is followed by 11 unchanged tokens",
        "same": "nothing changes",
    }


def test_a_model_with_prefix_caching_or_too_little_context_is_refused(
    llm: LLM, tiny_folder: str
) -> None:
    with (
        LLM(tiny_folder, dtype="float32", kv_memory="4MiB", threads=1) as caching,
        pytest.raises(RequestError, match="without prefix caching"),
    ):
        run(caching, file_edits(1))
    options = EditOptions(places=PlaceRule(5, 100, 1000))
    with pytest.raises(
        RequestError, match="takes 1024 tokens, and context and scored come to 1100"
    ):
        run_edits(llm, options, Source("here", []), Running(limit=1))


@pytest.mark.parametrize("context", [40, 200])
def test_cases_of_files_are_stretches_of_both_texts(llm: LLM, context: int) -> None:
    edit = file_edits(1)[0]
    case = file_case(llm, edit, PlaceRule(5, 6, context))
    assert not isinstance(case, str)
    text = llm.retokenizer.text
    before, after = text(case.old_tokens), text(case.new_tokens)
    assert before + case.continuation in edit.before
    assert after + case.continuation in edit.after
    assert len(case.new_tokens) <= context
    assert (case.cut > 0) == (context == 40)
    assert "new0" in text(case.new_tokens[slice(*case.change)])
    assert llm.tokenizer.encode(after) == list(case.new_tokens)


def test_cases_that_were_cut_already_are_taken_as_they_are(llm: LLM) -> None:
    edit = CutEdit("one", "group", TEXT, TEXT.replace("left", "right", 1), " right", " left")
    case = cut_case(llm, edit, PlaceRule())
    assert not isinstance(case, str)
    assert llm.retokenizer.text(case.new_tokens) == edit.after
    assert (case.group, case.continuation, case.other) == ("group", " right", " left")
    report = run(llm, [edit])
    assert make_rows(report)[0].preference is not None
    assert cut_case(llm, replace(edit, after=TEXT), PlaceRule()) == "nothing changes"
    assert "longer than the context" in str(cut_case(llm, edit, PlaceRule(context=30)))
