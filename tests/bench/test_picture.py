"""A picture shows every engine of every task, or says early why it cannot be drawn."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvloom import RequestError
from kvloom.bench.picture import check_picture, draw
from kvloom.bench.results import EngineReport, SpeedOptions

from .fakes import report, result, sample

pytest.importorskip("matplotlib")


def test_engines_numbers_and_reasons_are_drawn(tmp_path: Path) -> None:
    import matplotlib

    picture = tmp_path / "speed.svg"
    found = report(
        result("prefill-64", kvloom=[sample(0.5), sample(0.4)], peer=[sample(0.1)], gone="x" * 99),
        result("shared-cold", kvloom=[sample(0.5)], peer=[sample(1.0)], gone="not installed"),
        options=SpeedOptions(quick=True),
        engines=(EngineReport(name="kvloom", dtype="float32"), EngineReport(name="peer")),
    )
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters instead of their outlines
        draw(found, picture)
    text = picture.read_text()
    for part in ("prefill 64", "first token, 72 cold", ">gone<", "not installed", "×2.00"):
        assert part in text
    for part in ("tok/s, more is better", "ms, less is better", "say nothing about speed"):
        assert part in text
    assert "x" * 99 not in text


def test_a_share_of_the_whole_work_is_drawn_and_who_cannot_do_such_a_thing(tmp_path: Path) -> None:
    import matplotlib

    picture = tmp_path / "speed.svg"
    whole = result("edit-72", kvloom=[sample(1.0)], peer=[sample(2.0)], plain=[sample(3.0)])
    part = result("edit-72-shifted", kvloom=[sample(0.1)], peer=[sample(0.5)], plain=[])
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw(report(whole, part), picture)
    text = picture.read_text()
    assert "kvloom: 1/10 of its own and 1/20 of the best peer\u0027s for all of it" in text.replace(
        "&#39;", "\u0027"
    )
    assert text.count(">plain<") == 2
    assert ">–<" in text


@pytest.mark.parametrize("count", [1, 4])
def test_any_number_of_tasks_fits(tmp_path: Path, count: int) -> None:
    picture = tmp_path / "speed.png"
    names = ["prefill-64", "decode-48", "shared-cold", "shared-warm"][:count]
    draw(report(*(result(name, kvloom=[sample()]) for name in names)), picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_report_without_results_is_a_picture_too(tmp_path: Path) -> None:
    draw(report(), tmp_path / "speed.png")
    assert (tmp_path / "speed.png").exists()


@pytest.mark.parametrize("name", ["speed.jpg", "speed"])
def test_another_kind_of_file_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=r"must end in \.svg or \.png"):
        check_picture(Path(name))


def test_without_matplotlib_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    check_picture(Path("speed.SVG"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"kvloom\[bench\]"):
        check_picture(Path("speed.svg"))
