"""From outcomes to figures: means, medians, spreads, and what a reader must be warned of.

Knows: which edits can be compared.
Does not know: how the outcomes came about or how they are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from kvloom.bench.edit_results import EditReport, EditResult, Outcome
from kvloom.bench.figures import BUSY_CORES

FEW_EDITS = 20


@dataclass(frozen=True, slots=True)
class Spread:
    """Many values in a few: their mean with its standard error, and three of them in order."""

    mean: float
    error: float
    low: float
    median: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KindRow:
    """One line of the table: one kind over the edits of one group.

    Attributes:
        group: edits that are summed up together.
        kind: its name.
        edits: how many were compared.
        share: rows that were run, as shares of the document's.
        first_token_s: seconds; low and high are the quartiles.
        divergence: KL to full recompute in nats; high is the ninth decile, low the first.
        agreement: mean share of equal likeliest tokens.
        nll: mean negative log-likelihood of a real token, in nats.
        preference: mean of the likelihood of the other continuation less that of the real one, in
            nats; None where there is no other.
        preference_error: mean distance of that from what it is after full recompute.
    """

    group: str
    kind: str
    edits: int
    share: Spread
    first_token_s: Spread
    divergence: Spread
    agreement: float
    nll: float
    preference: float | None
    preference_error: float | None


def make_rows(report: EditReport) -> list[KindRow]:
    """Return one row per group and kind, over the edits that all kinds carried out as asked."""
    groups = dict.fromkeys(result.group for result in report.results)
    rows = []
    for group in groups:
        results = [r for r in comparable(report.results) if r.group == group]
        if results:
            rows += [_row(group, results, kind) for kind in range(len(report.kinds))]
    return rows


def comparable(results: Sequence[EditResult]) -> list[EditResult]:
    """Return the edits in which no kind failed or was computed exactly instead."""
    return [
        result
        for result in results
        if not any(outcome.failure or outcome.fell_back for outcome in result.outcomes)
    ]


def find_warnings(report: EditReport) -> list[str]:
    """Return what a reader of the figures must know."""
    results = report.results
    warnings = []
    if 0 < (count := len(comparable(results))) < FEW_EDITS:
        warnings.append(f"{count} edits are few: read the figures as a sign that it works.")
    if exact := sum(any(outcome.fell_back for outcome in r.outcomes) for r in results):
        warnings.append(
            f"{exact} edits change the first tokens of the document, which kvloom computes exactly "
            "whatever is asked for; they are not in the table."
        )
    failures = Counter(o.failure for r in results for o in r.outcomes if o.failure)
    warnings += [f"{count} times: {reason}" for reason, count in failures.items()]
    if cut := [result.cut for result in results if result.cut]:
        warnings.append(
            f"{len(cut)} files were longer than the context of {report.options.places.context} "
            f"tokens; a median of {median(cut):,.0f} tokens before it was cut off."
        )
    busy = [result.other_cores for result in results if result.other_cores is not None]
    if busy and median(busy) > BUSY_CORES:
        warnings.append(
            f"other processes kept a median of {median(busy):.1f} cores busy; the times are "
            "doubtful, what was predicted is not."
        )
    warnings += [f"{n} skipped: {reason}" for reason, n in Counter(report.skipped.values()).items()]
    if report.interrupted:
        warnings.append("the run was interrupted; run the command again to go on.")
    return warnings


def _row(group: str, results: Sequence[EditResult], kind: int) -> KindRow:
    outcomes = [result.outcomes[kind] for result in results]
    liked, liked_exactly = _preferences(outcomes), _preferences([r.outcomes[0] for r in results])
    tokens = np.array([result.tokens for result in results])
    scored = np.array([result.scored for result in results])
    return KindRow(
        group=group,
        kind=outcomes[0].kind,
        edits=len(results),
        share=_spread(np.array([outcome.rows for outcome in outcomes]) / tokens, 25),
        first_token_s=_spread(np.array([outcome.first_token_s for outcome in outcomes]), 25),
        divergence=_spread(np.array([outcome.divergence for outcome in outcomes]), 10),
        agreement=float(np.mean([outcome.agreement for outcome in outcomes])),
        nll=float(np.mean(np.array([outcome.nll for outcome in outcomes]) / scored)),
        preference=float(liked.mean()) if len(liked) else None,
        preference_error=float(abs(liked - liked_exactly).mean()) if len(liked) else None,
    )


def _preferences(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.array([o.nll_other - o.nll for o in outcomes if o.nll_other is not None])


def _spread(values: np.ndarray, percent: int) -> Spread:
    low, middle, high = np.percentile(values, (percent, 50, 100 - percent))
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return Spread(float(values.mean()), error, float(low), float(middle), float(high))
