"""Figures are those of the standard library's statistics, over cases that can be compared."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.bench.case_figures import comparable, find_warnings, make_rows

from .case_fakes import joined, outcome, report, result, reuse_report, three

divergences = st.lists(st.floats(0, 10), min_size=2, max_size=12)


@given(values=divergences)
def test_spreads_are_those_of_the_standard_library(values: list[float]) -> None:
    rows = make_rows(report(*(three(str(n), value) for n, value in enumerate(values))))
    assert [row.kind for row in rows] == ["exact", "repaired 15%", "shifted"]
    shown = rows[2].divergence
    assert shown.mean == pytest.approx(statistics.fmean(values))
    assert shown.error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))
    assert shown.median == pytest.approx(statistics.median(values))
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    assert (shown.low, shown.high) == (pytest.approx(tenths[0]), pytest.approx(tenths[-1]))
    assert rows[1].divergence.mean == pytest.approx(shown.mean / 2)
    assert [row.share.mean for row in rows] == pytest.approx([0.6, 0.2, 0.05])
    assert rows[0].nll == pytest.approx(2.0)
    assert all(row.preference is None for row in rows)


def test_a_case_that_one_kind_did_not_carry_out_counts_for_none() -> None:
    failed = result("failed", outcome("exact"), outcome("repaired 15%", failure="no room"))
    exact = result("exact", outcome("exact"), outcome("repaired 15%", fell_back=True))
    good = three("good", 0.5)
    assert comparable([failed, exact, good]) == [good]
    rows = make_rows(report(good, failed, exact))
    assert {row.cases for row in rows} == {1}
    assert rows[2].divergence.error == 0
    assert make_rows(report(exact)) == []
    warnings = find_warnings(report(good, failed, exact))
    assert any("1 times: no room" in warning for warning in warnings)


def test_preferences_are_held_against_full_recompute() -> None:
    results = [
        result(
            str(n),
            outcome("exact", nll=10.0, nll_other=12.0),
            outcome("shifted", nll=10.0, nll_other=12.0 + away),
            group="names",
        )
        for n, away in enumerate([3.0, -5.0])
    ]
    exact, shifted = make_rows(report(*results, kinds=("exact", "shifted")))
    assert (exact.preference, exact.preference_error) == (2.0, 0.0)
    assert (shifted.preference, shifted.preference_error) == (1.0, 4.0)


def test_groups_are_summed_up_apart() -> None:
    rows = make_rows(report(three("a", 1.0), three("b", 2.0, group="names"), three("c", 3.0)))
    assert [(row.group, row.cases) for row in rows[::3]] == [("edits", 2), ("names", 1)]
    assert rows[2].divergence.mean == 2.0


def test_readers_are_warned() -> None:
    quiet = report(*(three(str(n), 0.1, other_cores=0.0) for n in range(30)))
    assert find_warnings(quiet) == []
    loud = report(
        three("one", 0.1, other_cores=1.5),
        skipped={"a": "nothing changes", "b": "nothing changes"},
        interrupted=True,
    )
    warnings = " ".join(find_warnings(loud, ["of its own"]))
    for part in (
        "1 edits are few",
        "1.5 cores",
        "2 skipped",
        "interrupted",
        "of its own",
    ):
        assert part in warnings


def test_rows_bytes_and_answers_are_those_of_the_outcomes() -> None:
    answered = joined("a", outcome("exact", rows=100, nll=8.0), outcome("b", repaired=4, nll=6.0))
    other = joined("b", outcome("exact", rows=100), outcome("b", loaded_bytes=9), answered=0)
    exact, row = make_rows(reuse_report(answered, other, kinds=("exact", "b")))
    assert exact.share.mean == 1
    assert row.repaired.mean == pytest.approx(0.02)
    assert row.loaded_bytes.mean == pytest.approx(4.5)
    # The answer's tokens count, or all that were scored where there is none.
    assert exact.nll == pytest.approx((8 / 4 + 48 / 24) / 2)
    assert row.nll == pytest.approx((6 / 4 + 48 / 24) / 2)
