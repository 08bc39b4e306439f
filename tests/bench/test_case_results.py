"""Reports survive the way to a file and back; what is none is refused in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvloom import RequestError
from kvloom.bench.case_results import dump, gone_on_with, load, save
from kvloom.bench.edit_places import PlaceRule
from kvloom.bench.edit_results import EditOptions, EditReport
from kvloom.bench.reuse_results import ReuseReport

from .case_fakes import joined, outcome, report, result, reuse_report, three


def test_a_report_comes_back_as_it_was(tmp_path: Path) -> None:
    made = report(
        three("ünusual", 0.1, cut=7, other_cores=0.5),
        result("none", outcome("exact", nll_other=1.5), outcome("shifted", failure="no")),
        skipped={"left out": "why"},
        interrupted=True,
        options=EditOptions(places=PlaceRule(1, 2, 30), shares=(0.5,), settings={"threads": 1}),
    )
    file = tmp_path / "report.json"
    save(dump(made, {"figures": [1]}), file)
    assert load(file, EditReport) == made
    assert json.loads(file.read_text())["figures"] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_file_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "report.json"
    save(dump(report(three("one", 0.1)), {}), file)

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        save("", file)
    assert len(load(file, EditReport).results) == 1


def test_reports_of_one_bench_are_none_of_another(tmp_path: Path) -> None:
    made, file = reuse_report(joined("one", outcome("exact"))), tmp_path / "report.json"
    save(dump(made, {}), file)
    assert load(file, ReuseReport) == made
    with pytest.raises(RequestError, match=r"holds no report of edits .*kvloom\.bench\.reuse"):
        load(file, EditReport)


def test_a_report_of_something_else_is_not_gone_on_with() -> None:
    fresh = report()
    others = {
        "source": replace(fresh, source="there"),
        "options": replace(fresh, options=EditOptions()),
        "kinds": replace(fresh, kinds=("exact",)),
        "model": replace(fresh, model="other"),
    }
    for what, other in others.items():
        with pytest.raises(RequestError, match=f"its {what} is"):
            gone_on_with(other, fresh)
    earlier = report(three("one", 0.1), interrupted=True)
    assert gone_on_with(earlier, fresh) == replace(earlier, interrupted=False)


@pytest.mark.parametrize(
    "text",
    ["", "{", "7", "[]", "null", "{}", '{"schema": "kvloom.bench.speed", "schema_version": 1}'],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(RequestError, match="holds no report of edits to go on with"):
        load(file, EditReport)


@pytest.mark.parametrize("what", ["schema_version", "results", "options", "kinds"])
def test_a_broken_report_is_refused(tmp_path: Path, what: str) -> None:
    content = json.loads(dump(report(three("one", 0.1)), {}))
    content[what] = "broken"
    file = tmp_path / "report.json"
    file.write_text(json.dumps(content))
    with pytest.raises(RequestError, match="name another file or remove it"):
        load(file, EditReport)
