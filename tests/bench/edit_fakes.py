"""Reports of edits made by hand.

Knows: small valid reports.
Does not know: any model.
"""

from __future__ import annotations

from typing import Any

from kvloom.bench.edit_results import EditOptions, EditReport, EditResult, Outcome

from .fakes import report as speed_report

KINDS = ("exact", "repaired 15%", "shifted")


def outcome(kind: str, **changes: Any) -> Outcome:
    """Return an outcome."""
    return Outcome(kind=kind, **{"rows": 10, "first_token_s": 0.5, "nll": 48.0, **changes})


def result(name: str, *outcomes: Outcome, **changes: Any) -> EditResult:
    """Return an edit of 100 tokens, 24 of them scored."""
    settings: dict[str, Any] = {"group": "edits", "tokens": 100, "first_change": 40, "hunks": 1}
    settings |= {"cut": 0, "scored": 24, **changes}
    return EditResult(name=name, outcomes=outcomes, **settings)


def report(*results: EditResult, **changes: Any) -> EditReport:
    """Return a report."""
    settings: dict[str, Any] = {
        "started_at": "2026-01-02T03:04:05+00:00",
        "duration_s": 12.0,
        "source": "some edits",
        "options": EditOptions(settings={"dtype": "float32"}),
        "model": "abc",
        "machine": speed_report().machine,
        "kinds": KINDS,
        "results": results,
    }
    return EditReport(**{**settings, **changes})


def three(name: str, divergence: float, **changes: Any) -> EditResult:
    """Return an edit in three ways, the last with this divergence and the middle one with half."""
    return result(
        name,
        outcome("exact", rows=60, agreement=1.0),
        outcome("repaired 15%", rows=20, divergence=divergence / 2, agreement=0.9),
        outcome("shifted", rows=5, divergence=divergence, agreement=0.8),
        **changes,
    )
