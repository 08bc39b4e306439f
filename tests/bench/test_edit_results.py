"""Reports survive the way to a file and back; what is none is refused in words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvloom import RequestError
from kvloom.bench.edit_places import PlaceRule
from kvloom.bench.edit_results import EditOptions, dump, load, save

from .edit_fakes import outcome, report, result, three


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
    assert load(file) == made
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
    assert len(load(file).results) == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", "7", "[]", "null", "{}", '{"schema": "kvloom.bench.speed", "schema_version": 1}'],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(RequestError, match="holds no report of edits to go on with"):
        load(file)


@pytest.mark.parametrize("what", ["schema_version", "results", "options", "kinds"])
def test_a_broken_report_is_refused(tmp_path: Path, what: str) -> None:
    content = json.loads(dump(report(three("one", 0.1)), {}))
    content[what] = "broken"
    file = tmp_path / "report.json"
    file.write_text(json.dumps(content))
    with pytest.raises(RequestError, match="name another file or remove it"):
        load(file)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"places": PlaceRule(-1)}, "behind is -1"),
        ({"places": PlaceRule(scored=0)}, "scored is 0"),
        ({"places": PlaceRule(20, 24, 20)}, "no room for a change"),
        ({"shares": ()}, "shares are"),
        ({"shares": (0.5, 1.5)}, "shares are"),
        ({"shares": (0.0,)}, "shares are"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        replace(EditOptions(), **options)
