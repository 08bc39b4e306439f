"""The report of a chain holds both documents, the times of edits, and what it was measured on."""

from __future__ import annotations

import json
from dataclasses import replace

from pydantic import TypeAdapter

from kvloom import DocumentLayout
from kvloom.bench.chain import ChainOptions, ChainReport, DocumentFigures
from kvloom.bench.chain_show import render, report_json

from .fakes import printed
from .fakes import report as speed_report

REPORT = ChainReport(
    started_at="2026-01-02T03:04:05+00:00",
    duration_s=60.0,
    options=ChainOptions(edits=300, settings={"dtype": "float32"}),
    machine=speed_report().machine,
    other_cores=0.0,
    tokens=1234,
    edit_s=(*(0.010,) * 100, *(0.020,) * 99, 0.5, *(0.030,) * 100),
    edited=DocumentFigures(
        first_token_s=0.02, decode_s=0.009, layout=DocumentLayout(3 * 2**20, 3, 70, 60)
    ),
    fresh=DocumentFigures(
        first_token_s=0.01, decode_s=0.006, layout=DocumentLayout(2 * 2**20, 2, 1, 1)
    ),
    key_deviation=2.5e-6,
    value_deviation=0.0,
    key_deviation_after_one=1.5e-6,
)


def shown(found: ChainReport) -> str:
    return printed(render(found))


def test_both_documents_and_their_ratio_are_shown() -> None:
    text = " ".join(shown(REPORT).split())
    for part in (
        "after 300 edits, 1,234 tokens",
        "first token, ms 20.0 10.0 2.00",
        "decode, ms per token 9.0 6.0 1.50",
        "KV memory, MiB 3.0 2.0 1.50",
        "blocks 3 2 1.50",
        "spans 70 1 70.00",
        "takes 10.0 ms (median of the first 100), 30.0 ms (of the last 100), 500.0 ms at most",
        "2.5e-06 of the largest key (1.5e-06 after the first edit) and by 0.0e+00 of the largest",
        "dtype float32",
    ):
        assert part in text
    assert "Warning" not in text
    assert "kept 1.5 cores busy" in shown(replace(REPORT, other_cores=1.5))


def test_json_holds_the_whole_report() -> None:
    content = json.loads(report_json(REPORT))
    assert (content["schema"], content["schema_version"]) == ("kvloom.bench.chain", 1)
    assert TypeAdapter(ChainReport).validate_python(content) == REPORT
    assert content["edit_ms"] == {"first": 10.0, "last": 30.0, "all": 20.0, "most": 500.0}
