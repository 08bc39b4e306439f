"""A report of a chain of edits for people and for programs.

Knows: columns and number formats.
Does not know: how anything was measured.
"""

from __future__ import annotations

import json
from statistics import median
from typing import Any

from pydantic import TypeAdapter
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvloom.bench.chain import ChainReport
from kvloom.bench.figures import BUSY_CORES
from kvloom.bench.run_show import describe_run

SCHEMA = "kvloom.bench.chain"
SCHEMA_VERSION = 1
_SOME = 100
_LEGEND = (
    "fresh: a document of the same tokens, computed at once · blocks: of 64 tokens · views: runs "
    "of slots that a decode step reads"
)


def report_json(report: ChainReport) -> str:
    """Return the report with its figures; `schema_version` changes when a field changes meaning."""
    content: dict[str, Any] = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION}
    content |= TypeAdapter(ChainReport).dump_python(report, mode="json")
    content["edit_ms"] = {name: 1000 * seconds for name, seconds in edit_times(report).items()}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def edit_times(report: ChainReport) -> dict[str, float]:
    """Return median seconds of an edit, over the first ones, the last ones and all, and most."""
    seconds = report.edit_s
    return {
        "first": median(seconds[:_SOME]),
        "last": median(seconds[-_SOME:]),
        "all": median(seconds),
        "most": max(seconds),
    }


def render(report: ChainReport) -> RenderableType:
    """Return the tables, what was measured where, and what makes it doubtful."""
    busy = []
    if report.other_cores > BUSY_CORES:
        text = (
            f"Warning: before the start other processes kept {report.other_cores:.1f} cores busy."
        )
        busy.append(Text(text, style="yellow"))
    return Group(
        _table(report),
        "",
        Text(_edits(report)),
        Text(
            f"Layer 0 of both differs by at most {report.key_deviation:.1e} of the largest key "
            f"({report.key_deviation_after_one:.1e} after the first edit) and by "
            f"{report.value_deviation:.1e} of the largest value."
        ),
        "",
        Text(_LEGEND, style="dim"),
        Text(_described(report), style="dim"),
        *busy,
    )


def _table(report: ChainReport) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"after {len(report.edit_s):,} edits, {report.tokens:,} tokens")
    for heading in ("edited", "fresh", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    edited, fresh = report.edited, report.fresh
    rows = {
        "first token, ms": (1000 * edited.first_token_s, 1000 * fresh.first_token_s),
        "decode, ms per token": (1000 * edited.decode_s, 1000 * fresh.decode_s),
        "KV memory, MiB": (edited.layout.nbytes / 2**20, fresh.layout.nbytes / 2**20),
        "blocks": (edited.layout.blocks, fresh.layout.blocks),
        "spans": (edited.layout.spans, fresh.layout.spans),
        "views": (edited.layout.views, fresh.layout.views),
    }
    for name, (ours, theirs) in rows.items():
        whole = isinstance(ours, int)
        cells = [f"{value:,}" if whole else f"{value:.1f}" for value in (ours, theirs)]
        table.add_row(name, *cells, f"{ours / theirs:.2f}")
    return table


def _edits(report: ChainReport) -> str:
    times = {name: f"{1000 * seconds:.1f}" for name, seconds in edit_times(report).items()}
    some = min(_SOME, len(report.edit_s))
    return (
        f"An edit takes {times['first']} ms (median of the first {some}), {times['last']} ms (of "
        f"the last {some}), {times['most']} ms at most."
    )


def _described(report: ChainReport) -> str:
    options = report.options
    return (
        "lines of Python's standard library replaced, inserted and deleted, shifted, seed "
        f"{options.seed}\n{describe_run(report, options.model, options.settings)}"
    )
