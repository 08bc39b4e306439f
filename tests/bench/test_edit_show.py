"""Tables and JSON hold every kind, what was measured where, and the warnings."""

from __future__ import annotations

import json
from typing import Any

from kvloom.bench.case_figures import make_rows
from kvloom.bench.edit_results import EditResult
from kvloom.bench.edit_show import EDITS, edit_warnings

from .case_fakes import outcome, report, result, three
from .fakes import printed


def shown(*results: EditResult, **changes: Any) -> str:
    return printed(EDITS.render(report(*results, **changes)))


def test_every_kind_is_a_line_with_its_figures() -> None:
    text = shown(three("a", 0.02), three("b", 0.04))
    for part in ("edits: 2, of 100 to 100 tokens", "exact", "repaired 15%", "shifted"):
        assert part in text
    for part in (
        "0.0300 ± 0.0100",
        "0.0150 ± 0.0050",
        "60% (60%–60%)",
        "500 (500–500) ms",
        "80.0%",
    ):
        assert part in text
    assert "new over old" not in text
    for part in (
        "some edits",
        "24 tokens scored 20 behind",
        "dtype float32",
        "Abacus",
        "2 edits are few",
    ):
        assert part in text


def test_preferences_have_columns_of_their_own() -> None:
    pair = (outcome("exact", nll_other=50.0), outcome("shifted", nll_other=51.5))
    text = shown(result("a", *pair), kinds=("exact", "shifted"))
    assert "the name scored that comes next" in text
    for part in ("new over old", "+2.00", "+3.50", "1.50"):
        assert part in text


def test_a_report_without_comparable_edits_is_shown_too() -> None:
    text = shown(result("a", outcome("exact"), outcome("shifted", fell_back=True)))
    assert "change the first tokens" in text


def test_readers_are_warned_of_what_only_edits_have() -> None:
    exact = result("exact", outcome("exact"), outcome("repaired 15%", fell_back=True))
    found = edit_warnings(report(three("one", 0.1, cut=500), exact))
    assert "1 edits change the first tokens" in found[0]
    assert "median of 500 tokens" in found[1]
    assert edit_warnings(report(three("one", 0.1))) == []


def test_json_holds_figures_and_results() -> None:
    made = report(three("a", 0.02))
    content = json.loads(EDITS.json(made))
    assert (content["schema"], content["schema_version"]) == ("kvloom.bench.edit", 1)
    assert [row["kind"] for row in content["figures"]] == [row.kind for row in make_rows(made)]
    assert content["results"][0]["outcomes"][2]["divergence"] == 0.02
    assert content["warnings"]
