"""Figures follow from times by their definitions; warnings name what makes them doubtful."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.bench.figures import (
    Summary,
    equal_start,
    find_warnings,
    make_rows,
    summarize,
    times_as_fast,
    warm_shares,
)
from kvloom.bench.results import EngineReport, SpeedOptions

from .fakes import TASKS, report, result, sample

SECONDS = st.floats(1e-3, 1e3)
RATE, TIME = TASKS["prefill-64"], TASKS["shared-warm"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("prefill-64", 100 / 0.5),  # prompt tokens until the first token
        ("decode-48", 4 / 2.0),  # the tokens behind the first
        ("batch-4", 5 / 2.5),  # all tokens over all time
        ("shared-cold", 500.0),  # milliseconds
    ],
)
def test_each_figure_is_what_its_name_says(name: str, expected: float) -> None:
    summary = summarize(TASKS[name], [sample(0.5, 2.5)])
    assert summary is not None
    assert summary.median == pytest.approx(expected)


@given(times=st.lists(SECONDS, min_size=1, max_size=9))
def test_a_summary_is_median_and_range(times: list[float]) -> None:
    summary = summarize(TIME, [sample(time, 2 * time) for time in times])
    assert summary is not None
    values = 1000 * np.array(times)
    assert summary.median == pytest.approx(np.median(values))
    assert (summary.low, summary.high) == (min(values), max(values))


def test_no_samples_have_no_summary_and_no_ratio() -> None:
    assert summarize(RATE, []) is None
    assert times_as_fast(RATE, None, Summary(1, 1, 1)) is None
    assert times_as_fast(RATE, Summary(1, 1, 1), None) is None


@given(ours=SECONDS, peer=SECONDS)
def test_ratios_say_how_many_times_as_fast_for_rates_and_times(ours: float, peer: float) -> None:
    left, right = Summary(ours, ours, ours), Summary(peer, peer, peer)
    for task in (RATE, TIME):
        there, back = times_as_fast(task, left, right), times_as_fast(task, right, left)
        assert there is not None
        assert back is not None
        assert there * back == pytest.approx(1)
        assert (there > 1) == ((ours > peer) if task is RATE else (ours < peer)) or there == 1


@given(left=st.lists(st.integers(0, 1)), right=st.lists(st.integers(0, 1)))
def test_equal_start_ends_at_the_first_difference(left: list[int], right: list[int]) -> None:
    count = equal_start(left, right)
    assert left[:count] == right[:count]
    assert left[: count + 1] != right[: count + 1] or count == len(left) == len(right)


def test_rows_compare_every_peer_with_kvloom_and_keep_failures() -> None:
    found = report(
        result("prefill-64", kvloom=[sample(0.5)], fast=[sample(0.25)], broken="out of memory"),
        result("shared-cold", kvloom=[sample(0.5)], fast=[sample(0.25)], broken="out of memory"),
    )
    rows = make_rows(found)
    assert [(row.engine, row.times_as_fast) for row in rows] == 2 * [
        ("kvloom", None),
        ("fast", pytest.approx(0.5)),
        ("broken", None),
    ]
    assert rows[2].summary is None
    assert rows[2].failure == "out of memory"


def test_a_peer_is_shown_though_kvloom_failed() -> None:
    kvloom, peer = make_rows(report(result("prefill-64", kvloom="no room", peer=[sample()])))
    assert kvloom.summary is None
    assert peer.summary is not None
    assert peer.times_as_fast is None


def test_warm_shares_relate_warm_to_cold_times_of_the_same_engine() -> None:
    cold = result("shared-cold", kvloom=[sample(1.0)], peer=[sample(2.0)], broken="x")
    warm = result("shared-warm", kvloom=[sample(0.05)], peer=[sample(1.0)], broken="x")
    assert warm_shares(report(cold, warm)) == {
        "kvloom": pytest.approx(0.05),
        "peer": pytest.approx(0.5),
    }
    assert warm_shares(report(warm)) == {}


def test_a_clean_report_has_no_warnings() -> None:
    quiet = sample(other_cores=0.1, cached_tokens=1)
    warm = sample(other_cores=None, cached_tokens=64)
    found = report(
        result("prefill-64", kvloom=[quiet], peer=[sample()]),
        result("shared-warm", kvloom=[warm], peer=[warm]),
    )
    assert find_warnings(found) == []


def test_every_doubt_is_named() -> None:
    found = report(
        result("prefill-64", kvloom=[sample(cached_tokens=50)], peer=[sample(other_cores=1.5)]),
        result("shared-warm", kvloom=[sample(cached_tokens=0)], peer=[sample()]),
        options=SpeedOptions(quick=True),
        other_cores=0.7,
        engines=(
            EngineReport(name="kvloom", dtype="float32", threads=2),
            EngineReport(name="peer", dtype="bfloat16", threads=1),
            EngineReport(name="broken"),
        ),
    )
    warnings = find_warnings(found)
    expected = [
        "--quick",
        "Before the start other processes kept 0.7",
        "differ in dtype: kvloom float32, peer bfloat16",
        "differ in threads: kvloom 2, peer 1",
        "up to 1.5 cores busy during 1 measurements: prefill 64 on peer",
        "prefill 64 on kvloom reused 50 of 100 tokens; 0 were expected",
        "first token, 64 shared on kvloom reused 0 of 100 tokens; 64 were expected",
    ]
    assert len(warnings) == len(expected)
    for warning, text in zip(warnings, expected, strict=True):
        assert text in warning
