"""The page of supported models says what the catalogue and the probe say."""

from __future__ import annotations

import re

import pytest
from tools.model_table import OUTCOMES, PAGE, Outcome, probe_all, render, without_figures

from tests.model.families import FAMILIES

STALE = "docs/models.md is stale; run python tools/model_table.py"
ROW = re.compile(r"^\| `([\w-]+)`[^|]*\|.*\| ([^|]*) \|$", re.MULTILINE)


def listed() -> dict[str, set[tuple[str, str]]]:
    """Return the page's entries and their remarks, by outcome."""
    page = PAGE.read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n)*)", page, re.MULTILINE))
    return {
        key: {(name, reason.strip()) for name, reason in ROW.findall(sections[title])}
        for key, (title, _) in OUTCOMES.items()
    }


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_page_lists_the_catalogue(outcome: str) -> None:
    expected = {(entry.name, entry.reason) for entry in FAMILIES if entry.expect == outcome}
    assert listed()[outcome] == expected, STALE


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_page_shows_what_the_probe_finds(name: str) -> None:
    (outcome,) = probe_all([name])
    row = render([outcome]).splitlines()[-1] if outcome.outcome == "refused" else None
    page = PAGE.read_text(encoding="utf-8")
    assert f"| `{name}` | {outcome.found} |" in page, STALE
    if row is not None:
        assert row in page, STALE


@pytest.mark.long
def test_page_is_what_the_tool_writes() -> None:
    assert render(probe_all()) == PAGE.read_text(encoding="utf-8"), STALE


def test_refusals_hold_no_measured_numbers() -> None:
    text = "X gives other logits (1.25e+04 times the tolerance): it (really) cannot be run."
    assert without_figures(text) == "X gives other logits: it (really) cannot be run."


def test_page_counts_its_rows() -> None:
    rows = [
        Outcome("a", "a", "movable", "half", ""),
        Outcome("a_far", "a", "refused", "No | never.", "it is far"),
    ]
    page = render(rows)
    assert "2 configurations of 1 model types" in page
    assert "| `a_far` (a) | No \\| never. | it is far |" in page
