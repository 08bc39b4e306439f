"""From outcomes to figures: means, medians, spreads, and what a reader must be warned of.

Knows: which cases can be compared.
Does not know: how the outcomes came about or how they are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from kvloom.bench.case_results import CaseReport, CaseResult, Outcome
from kvloom.bench.figures import BUSY_CORES

FEW = 20


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
    """One line of the table: one kind over the cases of one group.

    Attributes:
        group: cases that are summed up together.
        kind: its name.
        cases: how many were compared.
        share: rows that were run, as shares of all tokens.
        repaired: of these, rows whose KV was there already, likewise.
        loaded_bytes: bytes of KV that were brought into memory.
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
    cases: int
    share: Spread
    repaired: Spread
    loaded_bytes: Spread
    first_token_s: Spread
    divergence: Spread
    agreement: float
    nll: float
    preference: float | None
    preference_error: float | None


def make_rows(report: CaseReport) -> list[KindRow]:
    """Return one row per group and kind, over the cases that all kinds carried out as asked."""
    groups = dict.fromkeys(result.group for result in report.results)
    rows = []
    for group in groups:
        results = [r for r in comparable(report.results) if r.group == group]
        if results:
            rows += [_row(group, results, kind) for kind in range(len(report.kinds))]
    return rows


def comparable(results: Sequence[CaseResult]) -> list[CaseResult]:
    """Return the cases in which no kind failed or was computed exactly instead."""
    return [
        result
        for result in results
        if not any(outcome.failure or outcome.fell_back for outcome in result.outcomes)
    ]


def find_warnings(report: CaseReport, own: Sequence[str] = ()) -> list[str]:
    """Return what a reader of the figures must know.

    Args:
        report: of a bench.
        own: what only this bench has to warn of.
    """
    results = report.results
    warnings = []
    if 0 < (count := len(comparable(results))) < FEW:
        warnings.append(f"{count} {report.noun} are few: read the figures as a sign that it works.")
    warnings += own
    failures = Counter(o.failure for r in results for o in r.outcomes if o.failure)
    warnings += [f"{count} times: {reason}" for reason, count in failures.items()]
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


def _row(group: str, results: Sequence[CaseResult], kind: int) -> KindRow:
    outcomes = [result.outcomes[kind] for result in results]
    liked, liked_exactly = _preferences(outcomes), _preferences([r.outcomes[0] for r in results])
    tokens = np.array([result.tokens for result in results])
    expected = np.array([result.expected for result in results])
    return KindRow(
        group=group,
        kind=outcomes[0].kind,
        cases=len(results),
        share=_spread(np.array([outcome.rows for outcome in outcomes]) / tokens, 25),
        repaired=_spread(np.array([outcome.repaired for outcome in outcomes]) / tokens, 25),
        loaded_bytes=_spread(np.array([outcome.loaded_bytes for outcome in outcomes]), 25),
        first_token_s=_spread(np.array([outcome.first_token_s for outcome in outcomes]), 25),
        divergence=_spread(np.array([outcome.divergence for outcome in outcomes]), 10),
        agreement=float(np.mean([outcome.agreement for outcome in outcomes])),
        nll=float(np.mean(np.array([outcome.nll for outcome in outcomes]) / expected)),
        preference=float(liked.mean()) if len(liked) else None,
        preference_error=float(abs(liked - liked_exactly).mean()) if len(liked) else None,
    )


def _preferences(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.array([o.nll_other - o.nll for o in outcomes if o.nll_other is not None])


def _spread(values: np.ndarray, percent: int) -> Spread:
    low, middle, high = np.percentile(values, (percent, 50, 100 - percent))
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
    return Spread(float(values.mean()), error, float(low), float(middle), float(high))
