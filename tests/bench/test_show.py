"""Tables and JSON show what was measured and what failed."""

from __future__ import annotations

import json
from dataclasses import replace

from pydantic import TypeAdapter

from kvloom.bench.results import EngineReport, Measurement, SpeedReport, TaskResult
from kvloom.bench.show import SCHEMA_VERSION, render, report_json

from .fakes import TASKS, printed, report, result, sample


def rendered(found: SpeedReport, width: int = 160) -> str:
    return printed(render(found), width)


def some_report() -> SpeedReport:
    engines = (
        EngineReport(
            name="kvloom",
            versions={"kvloom": "0.1"},
            dtype="float32",
            threads=2,
            ready_s=3.25,
            ready_rss_bytes=500 * 2**20,
            peak_rss_bytes=1700 * 2**20,
        ),
        EngineReport(name="peer", failure="it is [not] installed"),
    )
    compared = Measurement(
        engine="other", samples=(sample(0.25),), equal_tokens=3, compared_tokens=5
    )
    first = result("prefill-64", kvloom=[sample(0.5), sample(0.4), sample(0.1)], peer="[bold]x")
    first = TaskResult(first.task, (*first.measurements, compared))
    return replace(report(first), engines=engines)


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_the_table_shows_median_range_ratio_and_equal_tokens() -> None:
    text = rendered(some_report())
    assert lines_with(text, "prefill 64", "kvloom", "250 tok/s", "200–1,000")
    assert lines_with(text, "other", "400 tok/s", "0.62", "3/5")


def test_a_failed_engine_is_an_empty_row_with_its_reason() -> None:
    text = rendered(some_report())
    assert lines_with(text, "peer", "–", "failed")
    assert lines_with(text, "prefill 64, peer: [bold]x")


def test_start_and_memory_are_shown_per_engine() -> None:
    assert lines_with(rendered(some_report()), "kvloom", "3.2 s", "500", "1,700", "1,200", "2")


def test_a_reason_names_its_task_unless_the_engine_ended() -> None:
    both = [result(name, kvloom=[sample()], peer="gone") for name in ("prefill-64", "batch-4")]
    found = report(*both)
    assert len(lines_with(rendered(found), "peer: gone")) == len(both)
    ended = replace(found, engines=(EngineReport(name="peer", failure="gone"),))
    text = rendered(ended)
    assert not lines_with(text, "peer: gone")
    assert len(lines_with(text, "peer ended: gone")) == 1


def test_warnings_and_shares_are_shown() -> None:
    cold = result("shared-cold", kvloom=[sample(1.0)], peer=[sample(0.5)])
    warm = result("shared-warm", kvloom=[sample(0.05, cached_tokens=64)], peer=[])
    found = report(cold, warm, other_cores=1.0)
    text = rendered(found)
    assert lines_with(text, "64 shared", "kvloom", "0.050 (1/20.0)", "0.100 (1/10.0) peer")
    assert lines_with(text, "Warning", "1.0 cores busy")
    (share,) = json.loads(report_json(found))["shares"]
    assert (share["name"], share["of_own"]) == ("shared-warm", 0.05)
    assert "part of the time" not in rendered(report(warm))


def test_an_engine_that_cannot_do_such_a_thing_has_an_empty_row_without_a_reason() -> None:
    text = rendered(report(result("edit-72-shifted", kvloom=[sample()], peer=[])))
    row, *_ = lines_with(text, "peer", "–")
    assert row.split() == ["peer", "–", "–"]
    assert "failed" not in text


def test_json_is_versioned_and_holds_the_whole_report_and_its_figures() -> None:
    found = some_report()
    content = json.loads(report_json(found))
    assert content["schema"] == "kvloom.bench.speed"
    assert content["schema_version"] == SCHEMA_VERSION == 2
    read = TypeAdapter(SpeedReport).validate_python(content)
    assert read == found
    figures = content["figures"]
    assert [row["engine"] for row in figures] == ["kvloom", "peer", "other"]
    assert figures[0]["summary"] == {"median": 250.0, "low": 200.0, "high": 1000.0}
    assert figures[1]["failure"] == "[bold]x"
    assert content["results"][0]["task"]["name"] == TASKS["prefill-64"].name


def test_the_best_peer_is_marked_and_kvloom_stands_beside_it() -> None:
    found = some_report()
    text = rendered(found)
    assert lines_with(text, "other *", "400 tok/s")
    assert lines_with(text, "prefill 64", "other", "250 tok/s", "400 tok/s", "0.62", "2 of 2")
    (standing,) = json.loads(report_json(found))["standings"]
    assert (standing["peer"], standing["place"]) == ("other", 2)
    assert "kvloom against" not in rendered(report(result("prefill-64", kvloom=[sample()])))
    failed = report(result("prefill-64", kvloom="no room", peer=[sample()]))
    assert lines_with(rendered(failed), "prefill 64", "peer", "failed", "–")


def test_a_format_of_its_own_is_shown_with_what_the_engine_says() -> None:
    engines = (
        EngineReport(name="kvloom", dtype="bfloat16"),
        EngineReport(name="plain", dtype="int8", format="int8"),
        EngineReport(name="wordy", dtype="int8_float32", format="int8"),
    )
    text = rendered(report(engines=engines))
    assert lines_with(text, "kvloom", "bfloat16")
    assert lines_with(text, "plain", " int8")
    assert lines_with(text, "wordy", "int8 (int8_float32)")
