"""A run measures what is left, keeps every edit, and says what it leaves out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvloom import LLM, RequestError
from kvloom.bench import edit_run
from kvloom.bench.edit_figures import make_rows
from kvloom.bench.edit_places import PlaceRule
from kvloom.bench.edit_results import EditOptions, EditReport, dump, load, save
from kvloom.bench.edit_run import cut_case, file_case, run_edits
from kvloom.bench.edit_source import CutEdit, FileEdit, Source
from tests.model.tiny_models import CORPUS, tiny_llama, write_folder

TEXT = (CORPUS[0] + CORPUS[1] + "\n") * 3
OPTIONS = EditOptions(places=PlaceRule(5, 6, 200), shares=(0.15,))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edit_run, "watch_idle", lambda: 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("models") / "tiny"
    return str(write_folder(made, tiny_llama(max_position_embeddings=512)))


@pytest.fixture(scope="module")
def llm(folder: str) -> Iterator[LLM]:
    with LLM(
        folder,
        dtype="float32",
        enable_prefix_caching=False,
        repair_when_idle=False,
        kv_memory="16MiB",
        threads=1,
    ) as llm:
        yield llm


def file_edits(count: int) -> list[FileEdit]:
    return [
        FileEdit(f"edit {n}", TEXT, TEXT[: 60 + n] + f" new{n} = {n}\n" + TEXT[60 + n :])
        for n in range(count)
    ]


def run(llm: LLM, edits: list[FileEdit], limit: int = 99, **more: object) -> EditReport:
    return run_edits(llm, OPTIONS, Source("here", edits), limit=limit, **more)  # type: ignore[arg-type]


def without_times(report: EditReport) -> list[object]:
    return [
        replace(
            result,
            other_cores=None,
            outcomes=tuple(replace(outcome, first_token_s=0.0) for outcome in result.outcomes),
        )
        for result in report.results
    ]


def test_edits_are_measured_up_to_the_limit_and_kept_one_by_one(llm: LLM) -> None:
    kept: list[EditReport] = []
    said: list[tuple[str, int, int]] = []
    report = run(llm, file_edits(4), 3, keep=kept.append, progress=lambda *note: said.append(note))
    assert [len(each.results) for each in kept] == [1, 2, 3]
    assert kept[-1] == report
    assert [done for _, done, _ in said] == [0, 1, 2]
    assert [result.name for result in report.results] == ["edit 0", "edit 1", "edit 2"]
    assert all(len(result.outcomes) == len(report.kinds) for result in report.results)
    assert make_rows(report)[0].kind == "exact"


def test_what_cannot_be_measured_is_skipped_with_its_reason(llm: LLM) -> None:
    good = file_edits(1)
    late = FileEdit("late", TEXT, TEXT + "x")
    same = FileEdit("same", TEXT, TEXT)
    report = run(llm, [late, same, *good])
    assert [result.name for result in report.results] == ["edit 0"]
    assert report.skipped == {
        "late": "no change is followed by 11 unchanged tokens",
        "same": "nothing changes",
    }
    with pytest.raises(RequestError, match="here gives no edit to measure: nothing changes"):
        run(llm, [same])
    with pytest.raises(RequestError, match="here gives no edit to measure: there is none"):
        run(llm, [])


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_ended_goes_on_where_it_was(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    whole = run(llm, file_edits(4))
    file = tmp_path / "report.json"

    def keep(report: EditReport) -> None:
        save(dump(report, {}), file)

    measured: list[str] = []
    measure = edit_run.measure

    def failing(llm, case, kinds):
        if len(measured) == 2:
            measured.append("the end")
            raise end
        measured.append(case.name)
        return measure(llm, case, kinds)

    monkeypatch.setattr(edit_run, "measure", failing)
    if end is KeyboardInterrupt:
        assert run(llm, file_edits(4), keep=keep).interrupted
        assert load(file).interrupted
    else:
        with pytest.raises(RuntimeError):
            run(llm, file_edits(4), keep=keep)
    assert without_times(load(file)) == without_times(whole)[:2]
    resumed = run(llm, file_edits(4), earlier=load(file), keep=keep)
    assert measured == ["edit 0", "edit 1", "the end", "edit 2", "edit 3"]
    assert not resumed.interrupted
    assert without_times(resumed) == without_times(whole)
    assert resumed.started_at == load(file).started_at
    # Once more, nothing is left to do.
    assert run(llm, file_edits(4), earlier=load(file)).results == load(file).results
    assert len(measured) == 5


def test_a_report_of_something_else_is_not_gone_on_with(llm: LLM) -> None:
    report = run(llm, file_edits(1))
    others = {
        "source": replace(report, source="there"),
        "options": replace(report, options=EditOptions()),
        "kinds": replace(report, kinds=("exact",)),
        "model": replace(report, model="other"),
    }
    for what, other in others.items():
        with pytest.raises(RequestError, match=f"its {what} is"):
            run(llm, file_edits(2), earlier=other)


@pytest.mark.parametrize("setting", ["enable_prefix_caching", "repair_when_idle"])
def test_a_model_that_makes_edits_exact_is_refused(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setattr(llm, "config", replace(llm.config, **{setting: True}))
    with pytest.raises(RequestError, match=f"{setting}.* to False"):
        run(llm, file_edits(1))


def test_too_little_context_is_refused(llm: LLM) -> None:
    options = EditOptions(places=PlaceRule(5, 100, 500))
    with pytest.raises(RequestError, match="takes 512 tokens, and context and scored come to 600"):
        run_edits(llm, options, Source("here", []), limit=1)


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
    report = run_edits(llm, OPTIONS, Source("here", [edit]), limit=1)
    assert make_rows(report)[0].preference is not None
    assert cut_case(llm, replace(edit, after=TEXT), PlaceRule()) == "nothing changes"
    assert "longer than the context" in str(cut_case(llm, edit, PlaceRule(context=30)))
