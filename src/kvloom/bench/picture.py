"""A picture of a speed report: bars per task, drawn by matplotlib.

Knows: matplotlib, and how bars stay readable.
Does not know: how anything was measured.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING

from kvloom import RequestError
from kvloom.bench.figures import FIGURES, Row, make_rows
from kvloom.bench.peers.registry import OURS
from kvloom.bench.results import SpeedReport, TaskResult
from kvloom.bench.shares import Share, make_shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUFFIXES = (".svg", ".png")
_COLUMNS = 3
_OUR_COLOUR, _BEST_COLOUR, _COLOUR, _FAINT = "#c2410c", "#475569", "#a3b1c2", "#64748b"
_REASON_CHARACTERS = 46


def check_picture(path: Path) -> None:
    """Make sure that a picture can be drawn, before anything is measured.

    Raises:
        RequestError: the file is of another kind, or matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(
            f"{path.name} must end in {' or '.join(SUFFIXES)}; name another file.", param="picture"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(
            "a picture needs matplotlib, which is missing; run `pip install 'kvloom[bench]'`.",
            param="picture",
        )


def draw(report: SpeedReport, path: Path) -> None:
    """Draw one small chart of horizontal bars per task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, shares = make_rows(report), make_shares(report)
    columns = min(_COLUMNS, len(report.results)) or 1
    lines = math.ceil(len(report.results) / columns) or 1
    height = 0.95 + 0.3 * len(report.engines)
    # A figure of its own, without pyplot: no window, nothing global.
    figure = Figure(figsize=(4.6 * columns, height * lines + 1.4), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12)
    FigureCanvasAgg(figure)
    charts = figure.subplots(lines, columns, squeeze=False).flatten()
    for chart, result in zip(charts, report.results, strict=False):
        name = result.task.name
        ours = next((x for x in shares if (x.name, x.engine) == (name, OURS)), None)
        _draw_task(chart, result, [row for row in rows if row.name == name], _described(ours))
    for chart in charts[len(report.results) :]:
        chart.set_visible(False)
    figure.suptitle(_heading(report), fontsize=13, fontweight="bold", x=0.01, ha="left")
    figure.supxlabel(_origin(report), fontsize=8, color=_FAINT, x=0.01, ha="left")
    figure.savefig(path)


def _described(share: Share | None) -> str:
    """Return how much of the whole work's time a task takes, in a few words."""
    if share is None:
        return ""
    found = ((share.of_own, "its own"), (share.of_best_peer, "the best peer's"))
    parts = [f"1/{1 / part:.0f} of {whose}" for part, whose in found if part]
    return " and ".join(parts) + " for all of it" if parts else ""


def _draw_task(chart: Axes, result: TaskResult, rows: list[Row], share: str) -> None:
    """Draw the engines of a task, in the order of the report, so that rows line up."""
    figure = FIGURES[result.task.figure]
    longest = max((row.summary.high for row in rows if row.summary is not None), default=1.0)
    for place, row in enumerate(rows):
        _draw_bar(chart, place, row, longest)
    chart.set_yticks(range(len(rows)), [row.engine for row in rows], fontsize=9)
    for label, row in zip(chart.get_yticklabels(), rows, strict=True):
        if row.engine == OURS:
            label.set_color(_OUR_COLOUR)
            label.set_fontweight("bold")
    chart.invert_yaxis()
    chart.set_xlim(0, 1.38 * longest)  # room for the numbers behind the bars
    better = "more is better" if figure.larger_is_better else "less is better"
    chart.set_title(f"{result.task.title}", fontsize=10, loc="left", fontweight="bold")
    part = f" · kvloom: {share}" if share else ""
    chart.set_xlabel(f"{figure.unit}, {better}{part}", fontsize=8, color=_FAINT, loc="left")
    chart.set_xticks([])
    chart.tick_params(length=0)
    chart.spines[["top", "right", "bottom"]].set_visible(False)
    chart.spines["left"].set_color(_COLOUR)


def _draw_bar(chart: Axes, place: int, row: Row, longest: float) -> None:
    if row.summary is None:
        reason = row.failure or "–"
        short = reason if len(reason) <= _REASON_CHARACTERS else f"{reason[:_REASON_CHARACTERS]}…"
        chart.text(0.02 * longest, place, short, va="center", fontsize=7, color=_FAINT)
        return
    summary = row.summary
    colour = _OUR_COLOUR if row.engine == OURS else _BEST_COLOUR if row.best_peer else _COLOUR
    chart.barh(place, summary.median, color=colour, height=0.68)
    chart.plot([summary.low, summary.high], [place, place], color="black", linewidth=1)
    number = f"{summary.median:,.0f}" if summary.median >= 100 else f"{summary.median:.1f}"
    ratio = "" if row.times_as_fast is None else f"   ×{row.times_as_fast:.2f}"
    chart.text(
        max(summary.high, summary.median) + 0.02 * longest,
        place,
        f"{number}{ratio}",
        va="center",
        fontsize=8,
        fontweight="bold" if row.engine == OURS else "normal",
    )


def _heading(report: SpeedReport) -> str:
    names = [engine.name for engine in report.engines if engine.name != OURS]
    return f"kvloom beside {', '.join(names)}" if names else "kvloom"


def _origin(report: SpeedReport) -> str:
    machine = report.machine
    formats = ", ".join(
        f"{engine.name} {engine.format or engine.dtype}"
        for engine in report.engines
        if engine.format or engine.dtype
    )
    parts = [
        f"bars: medians of {report.options.rounds} rounds, lines: ranges, "
        "×: how many times as fast kvloom is, dark: the best peer",
        f"{report.options.model} on {machine.cpu}, "
        f"{machine.physical_cores or '?'} cores · {report.started_at[:10]}",
        f"formats: {formats}",
    ]
    if report.options.quick or report.interrupted:
        parts.append("quick sizes or an interrupted run: these figures say nothing about speed")
    return "\n".join(parts)
