"""Reports of cases made by hand: most are of edits.

Knows: small valid reports.
Does not know: any model.
"""

from __future__ import annotations

from typing import Any

from kvloom.bench.case_results import Outcome
from kvloom.bench.edit_results import EditOptions, EditReport, EditResult
from kvloom.bench.reuse_results import ReuseOptions, ReuseReport, ReuseResult

from .fakes import report as speed_report

KINDS = ("exact", "repaired 15%", "shifted")


def outcome(kind: str, **changes: Any) -> Outcome:
    """Return an outcome."""
    return Outcome(kind=kind, **{"rows": 10, "first_token_s": 0.5, "nll": 48.0, **changes})


def result(name: str, *outcomes: Outcome, **changes: Any) -> EditResult:
    """Return an edit of 100 tokens, 24 of them scored."""
    made: dict[str, Any] = {"group": "edits", "tokens": 100, "first_change": 40, "hunks": 1}
    return EditResult(name=name, outcomes=outcomes, **{**made, "cut": 0, "scored": 24, **changes})


def settings(**changes: Any) -> dict[str, Any]:
    """Return what every report has."""
    return {
        "started_at": "2026-01-02T03:04:05+00:00",
        "duration_s": 12.0,
        "source": "some edits",
        "model": "abc",
        "machine": speed_report().machine,
        "kinds": KINDS,
        **changes,
    }


def report(*results: EditResult, **changes: Any) -> EditReport:
    """Return a report of edits."""
    options = EditOptions(settings={"dtype": "float32"})
    return EditReport(**settings(**{"options": options, "results": results, **changes}))


def reuse_report(*results: ReuseResult, **changes: Any) -> ReuseReport:
    """Return a report of joined chunks."""
    options = ReuseOptions(settings={"dtype": "float32"})
    return ReuseReport(**settings(**{"options": options, "results": results, **changes}))


def joined(name: str, *outcomes: Outcome, **changes: Any) -> ReuseResult:
    """Return a prompt of 100 tokens in 8 chunks, with an answer of 4 of the 24 scored tokens."""
    made: dict[str, Any] = {"group": "prompts", "tokens": 100, "scored": 24, "chunks": 8}
    return ReuseResult(name=name, outcomes=outcomes, **{**made, "answered": 4, **changes})


def three(name: str, divergence: float, **changes: Any) -> EditResult:
    """Return an edit in three ways, the last with this divergence and the middle one with half."""
    return result(
        name,
        outcome("exact", rows=60, agreement=1.0),
        outcome("repaired 15%", rows=20, divergence=divergence / 2, agreement=0.9),
        outcome("shifted", rows=5, divergence=divergence, agreement=0.8),
        **changes,
    )
