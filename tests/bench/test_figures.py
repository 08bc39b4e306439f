"""Figures follow from times by their definitions; warnings name what makes them doubtful."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.bench.figures import (
    Summary,
    find_warnings,
    make_rows,
    make_standings,
    summarize,
    times_as_fast,
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


def test_the_best_peer_is_the_fastest_for_rates_and_times() -> None:
    engines = {"kvloom": [sample(0.5)], "slow": [sample(1.0)], "fast": [sample(0.25)]}
    found = report(
        result("prefill-64", **engines, broken="x"), result("shared-cold", **engines, broken="x")
    )
    assert [row.engine for row in make_rows(found) if row.best_peer] == ["fast", "fast"]
    for standing in make_standings(found):
        assert (standing.peer, standing.place, standing.engines) == ("fast", 2, 3)
        assert standing.times_as_fast == pytest.approx(0.5)
    rate, time = make_standings(found)
    assert (rate.ours, rate.theirs, rate.unit) == (200.0, 400.0, "tok/s")
    assert (time.ours, time.theirs, time.unit) == (500.0, 250.0, "ms")


@given(seconds=st.lists(SECONDS, min_size=2, max_size=6))
def test_no_peer_is_faster_than_the_best_and_the_place_counts_those_ahead(
    seconds: list[float],
) -> None:
    engines = {f"engine{number}": [sample(time, 2e3)] for number, time in enumerate(seconds)}
    for name in ("prefill-64", "shared-cold"):
        (standing,) = make_standings(report(result(name, **engines)))
        assert seconds[int(standing.peer.removeprefix("engine"))] == min(seconds[1:])
        assert standing.place is not None
        assert 1 <= standing.place <= len(seconds) == standing.engines
        assert (standing.place == 1) == (standing.times_as_fast >= 1)


def test_without_a_peer_or_kvloom_there_is_no_standing() -> None:
    alone = report(result("prefill-64", kvloom=[sample()], broken="x"))
    assert make_standings(alone) == []
    assert not any(row.best_peer for row in make_rows(alone))
    (failed,) = make_standings(report(result("prefill-64", kvloom="no room", peer=[sample()])))
    assert failed.ours is failed.times_as_fast is failed.place is None
    assert (failed.peer, failed.engines) == ("peer", 1)


def test_a_format_of_its_own_is_no_difference_in_dtype() -> None:
    engines = (
        EngineReport(name="kvloom", dtype="float32", threads=2),
        EngineReport(name="peer", dtype="int8_float32", format="int8", threads=2),
    )
    assert find_warnings(report(result("prefill-64", kvloom=[sample()]), engines=engines)) == []


def test_whatever_is_reused_of_an_edited_text_is_right_but_what_was_new() -> None:
    for cached_tokens in (0, 30, 96):
        edited = [sample(cached_tokens=cached_tokens)]
        assert find_warnings(report(result("edit-72-shifted", kvloom=edited))) == []
    accident = [sample(cached_tokens=99)]
    (warning,) = find_warnings(report(result("edit-72-shifted", kvloom=accident)))
    assert "computed 1 tokens; 4 were new" in warning


def test_an_interrupted_run_is_marked() -> None:
    found = report(result("prefill-64", kvloom=[sample()]), interrupted=True)
    assert find_warnings(found) == ["The run was interrupted: rounds, tasks or both are missing."]


def test_a_peer_is_shown_though_kvloom_failed() -> None:
    kvloom, peer = make_rows(report(result("prefill-64", kvloom="no room", peer=[sample()])))
    assert kvloom.summary is None
    assert peer.summary is not None
    assert peer.times_as_fast is None


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
