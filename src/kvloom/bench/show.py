"""A speed report for people and for programs: tables and JSON.

Knows: columns, number formats and the version of the JSON.
Does not know: how anything was measured.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvloom.bench.figures import (
    Row,
    Standing,
    find_warnings,
    make_rows,
    make_standings,
)
from kvloom.bench.results import EngineReport, SpeedReport
from kvloom.bench.shares import Share, make_shares

SCHEMA = "kvloom.bench.speed"
SCHEMA_VERSION = 2
_NONE = "–"
_LEGEND = (
    "median and range over the rounds · *: the fastest peer · x as fast: how many times as fast as "
    "this engine kvloom is · same: generated tokens that equal kvloom's exact ones, up to the "
    "first other one · repaired, shifted: KV behind the change is kept, so that tokens may differ"
)


def report_json(report: SpeedReport) -> str:
    """Return the report with its figures; `schema_version` changes when a field changes meaning."""
    content: dict[str, Any] = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION}
    content |= TypeAdapter(SpeedReport).dump_python(report, mode="json")
    content["figures"] = [asdict(row) for row in make_rows(report)]
    content["standings"] = [asdict(standing) for standing in make_standings(report)]
    content["shares"] = [asdict(share) for share in make_shares(report)]
    content["warnings"] = find_warnings(report)
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def render(report: SpeedReport) -> RenderableType:
    """Return the tables, what to know about the machine, and the warnings."""
    warnings = [Text(f"Warning: {text}", style="yellow") for text in find_warnings(report)]
    return Group(
        _figures_table(make_rows(report)),
        Text(_LEGEND, style="dim"),
        "",
        *_standings_part(make_standings(report)),
        *_shares_part(make_shares(report)),
        _engines_table(report.engines),
        "",
        Text(_describe(report), style="dim"),
        *(Text(failure, style="red") for failure in _failures(report)),
        *warnings,
    )


def _figures_table(rows: list[Row]) -> Table:
    table = _table("task", "engine")
    for heading in ("median", "range", "x as fast", "same"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, row in enumerate(rows):
        first = place == 0 or rows[place - 1].name != row.name
        table.add_row(
            row.task if first else "",
            f"{row.engine} *" if row.best_peer else row.engine,
            _NONE if row.summary is None else f"{_number(row.summary.median)} {row.unit}",
            _range(row),
            "" if row.times_as_fast is None else f"{row.times_as_fast:.2f}",
            f"{row.equal_tokens}/{row.compared_tokens}" if row.compared_tokens else "",
        )
    return table


def _standings_part(standings: list[Standing]) -> list[RenderableType]:
    """Return a table of kvloom against the best peer of each task; nothing without peers."""
    if not standings:
        return []
    table = _table("kvloom against the best peer", "best peer")
    for heading in ("kvloom", "best peer's", "x as fast", "place"):
        table.add_column(heading, justify="right", no_wrap=True)
    for standing in standings:
        ratio, ours = standing.times_as_fast, standing.ours
        table.add_row(
            standing.task,
            standing.peer,
            "failed" if ours is None else f"{_number(ours)} {standing.unit}",
            f"{_number(standing.theirs)} {standing.unit}",
            _NONE if ratio is None else f"{ratio:.2f}",
            _NONE if standing.place is None else f"{standing.place} of {standing.engines}",
        )
    return [table, ""]


def _shares_part(shares: list[Share]) -> list[RenderableType]:
    """Return a table of what is saved where less is computed; nothing if no task tells."""
    if not shares:
        return []
    table = _table("part of the time that computing takes", "engine")
    for heading in ("of its own", "of the best peer's"):
        table.add_column(heading, justify="right", no_wrap=True)
    for place, share in enumerate(shares):
        first = place == 0 or shares[place - 1].name != share.name
        table.add_row(
            share.task if first else "",
            share.engine,
            _part(share.of_own),
            _NONE
            if share.of_best_peer is None
            else f"{_part(share.of_best_peer)} {share.best_peer}",
        )
    return [table, ""]


def _part(share: float | None) -> str:
    """Return a share with, as people say it, one in how many it is."""
    return _NONE if share is None else f"{share:.3f} (1/{1 / share:.1f})"


def _engines_table(engines: tuple[EngineReport, ...]) -> Table:
    table = _table("engine")
    for heading in ("ready in", "ready MiB", "peak MiB", "peak – ready", "threads", "format"):
        table.add_column(heading, justify="right")
    for engine in engines:
        grown = None
        if engine.peak_rss_bytes is not None and engine.ready_rss_bytes is not None:
            grown = engine.peak_rss_bytes - engine.ready_rss_bytes
        table.add_row(
            engine.name,
            _NONE if engine.ready_s is None else f"{engine.ready_s:.1f} s",
            _mebibytes(engine.ready_rss_bytes),
            _mebibytes(engine.peak_rss_bytes),
            _mebibytes(grown),
            _NONE if engine.threads is None else str(engine.threads),
            _format(engine),
        )
    return table


def _format(engine: EngineReport) -> str:
    """Return the engine's own format, or what it was told to compute in."""
    if engine.format is None:
        return engine.dtype or _NONE
    same = engine.dtype in (None, engine.format)
    return engine.format if same else f"{engine.format} ({engine.dtype})"


def _table(*headings: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for heading in headings:
        table.add_column(heading)
    return table


def _describe(report: SpeedReport) -> str:
    machine = report.machine
    cores = f"{machine.physical_cores or '?'} cores, {machine.logical_cores or '?'} logical"
    versions = dict(pair for engine in report.engines for pair in engine.versions.items())
    return (
        f"{report.started_at} · {machine.cpu} ({cores}) · "
        f"{machine.memory_bytes / 2**30:.0f} GiB · {machine.platform} · Python {machine.python}\n"
        f"model {report.options.model} · {report.options.rounds} rounds · "
        f"KV memory {report.options.kv_memory} · other processes kept "
        f"{report.other_cores:.2f} cores busy before the start · {report.duration_s:.0f} s in all\n"
        + ", ".join(f"{name} {version}" for name, version in versions.items())
    )


def _failures(report: SpeedReport) -> list[str]:
    """Return each reason once: by engine if it ended, else by task."""
    ended = {engine.name: engine.failure for engine in report.engines}
    lines = [f"{name} ended: {failure}" for name, failure in ended.items() if failure is not None]
    lines += [
        f"{row.task}, {row.engine}: {row.failure}"
        for row in make_rows(report)
        if row.failure not in (None, ended.get(row.engine))
    ]
    return lines


def _range(row: Row) -> str:
    """Return the range; of an engine that cannot do such a thing there is none."""
    if row.summary is None:
        return _NONE if row.failure is None else "failed"
    return f"{_number(row.summary.low)}–{_number(row.summary.high)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _mebibytes(nbytes: int | None) -> str:
    return _NONE if nbytes is None else f"{nbytes / 2**20:,.0f}"
