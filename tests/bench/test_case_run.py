"""A run measures what is left, keeps every case, and says what it leaves out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from kvloom import RequestError
from kvloom.bench.case_results import dump, load, save
from kvloom.bench.case_run import Running, run_cases
from kvloom.bench.edit_results import EditReport, EditResult

from .case_fakes import report, three

pytestmark = pytest.mark.usefixtures("at_once")


@dataclass(frozen=True)
class Case:
    name: str


def measure(case: Case) -> EditResult | str:
    if case.name == "refused":
        raise RequestError("refused in words")
    return "no good" if case.name.startswith("bad") else three(case.name, 0.1)


def cases(*names: str) -> list[Case]:
    return [Case(name) for name in names]


def test_cases_are_measured_up_to_the_limit_and_kept_one_by_one() -> None:
    kept: list[EditReport] = []
    said: list[tuple[str, int, int]] = []
    running = Running(limit=3, keep=kept.append, progress=lambda *note: said.append(note))
    done = run_cases(report(), cases("a", "b", "c", "d"), measure, running)
    assert [len(each.results) for each in kept] == [1, 2, 3]
    assert kept[-1] == done
    assert said[0] == ("1 of at most 3 edits", 0, 3)
    assert [note[1] for note in said] == [0, 1, 2]
    assert [result.name for result in done.results] == ["a", "b", "c"]


def test_what_cannot_be_measured_is_skipped_with_its_reason() -> None:
    running: Running[EditReport] = Running(limit=9)
    done = run_cases(report(), cases("bad", "refused", "good"), measure, running)
    assert [result.name for result in done.results] == ["good"]
    assert done.skipped == {"bad": "no good", "refused": "refused in words"}
    with pytest.raises(RequestError, match="some edits gives no edits to measure: no good"):
        run_cases(report(), cases("bad 1", "bad 2"), measure, running)
    with pytest.raises(RequestError, match="some edits gives no edits to measure: there is none"):
        run_cases(report(), [], measure, running)


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_ended_goes_on_where_it_was(tmp_path: Path, end: type[BaseException]) -> None:
    file, wanted = tmp_path / "report.json", cases("a", "bad", "b", "c")
    measured: list[str] = []

    def keep(found: EditReport) -> None:
        save(dump(found, {}), file)

    def noting(before: int) -> Callable[[Case], EditResult | str]:
        def one(case: Case) -> EditResult | str:
            if len(measured) == before:
                raise end
            measured.append(case.name)
            return measure(case)

        return one

    if end is KeyboardInterrupt:
        first = run_cases(report(), wanted, noting(2), Running(limit=9, keep=keep))
        assert first.interrupted
    else:
        with pytest.raises(RuntimeError):
            run_cases(report(), wanted, noting(2), Running(limit=9, keep=keep))
    earlier = load(file, EditReport)
    assert earlier.interrupted == (end is KeyboardInterrupt)
    assert [result.name for result in earlier.results] == ["a"]
    fresh = replace(report(), started_at="later")
    done = run_cases(fresh, wanted, noting(9), Running(limit=9, earlier=earlier, keep=keep))
    assert measured == ["a", "bad", "b", "c"]
    assert not done.interrupted
    assert done.started_at == earlier.started_at
    assert done.duration_s > earlier.duration_s
    assert [result.name for result in done.results] == ["a", "b", "c"]
    # Once more, nothing is left to do.
    again = Running(limit=9, earlier=load(file, EditReport))
    assert run_cases(fresh, wanted, noting(0), again).results == done.results


def test_a_report_of_something_else_is_refused_before_anything_is_measured() -> None:
    running = Running(limit=1, earlier=report(source="there"))
    with pytest.raises(RequestError, match="its source is"):
        run_cases(report(), cases("a"), pytest.fail, running)
