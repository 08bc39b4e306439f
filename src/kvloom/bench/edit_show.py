"""A report of edits for people and for programs: what only edits have to say.

Knows: the columns, the wording and the warnings of edits.
Does not know: how tables are drawn, or how anything was measured.
"""

from __future__ import annotations

from statistics import median

from kvloom.bench.case_picture import Wording
from kvloom.bench.case_show import ERRORS, ROWS, Column, Presentation
from kvloom.bench.edit_results import EditReport

_PREFERENCES: tuple[Column, ...] = (
    ("new over old", lambda row: f"{row.preference:+.2f}"),
    ("error", lambda row: f"{row.preference_error:.2f}"),
)
_LEGEND = (
    "KL and top-1: next tokens against exact, which is what reusing the prefix only comes to · "
    "± standard error of the mean · rows and times: median (quartiles) · "
    "blend, mentions, first, random: ways to choose the rows that are computed again · "
    "unrotated: old keys at new places as they are · dropped: nothing behind the change is kept or "
    "computed · ignored: the document before the edit"
)


def edit_warnings(report: EditReport) -> list[str]:
    """Return what a reader of the figures of edits must know."""
    results = report.results
    warnings = []
    if exact := sum(any(outcome.fell_back for outcome in r.outcomes) for r in results):
        warnings.append(
            f"{exact} edits change the first tokens of the document, which kvloom computes exactly "
            "whatever is asked for; they are not in the table."
        )
    if cut := [result.cut for result in results if result.cut]:
        warnings.append(
            f"{len(cut)} files were longer than the context of {report.options.places.context} "
            f"tokens; a median of {median(cut):,.0f} tokens before it was cut off."
        )
    return warnings


def _columns(report: EditReport) -> tuple[Column, ...]:
    return (ROWS, *ERRORS, *(_PREFERENCES if _has_others(report) else ()))


def _measured(report: EditReport) -> str:
    places = report.options.places
    scored = f"{places.scored} tokens scored {places.behind} behind the last change"
    if _has_others(report):
        scored = "the name scored that comes next"
    return f"{scored} · documents of at most {places.context:,} tokens"


def _has_others(report: EditReport) -> bool:
    return any(outcome.nll_other is not None for r in report.results for outcome in r.outcomes)


EDITS = Presentation(
    kind=EditReport,
    wording=Wording("document", "the tokens that really follow", ("repaired", "shifted")),
    columns=_columns,
    legend=_LEGEND,
    measured=_measured,
    warnings=edit_warnings,
)
