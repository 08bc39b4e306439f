"""A picture of a report of cases: error against rows, and against time, drawn by matplotlib.

Knows: matplotlib, and which kinds belong together.
Does not know: how anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from kvloom.bench.case_figures import KindRow, make_rows
from kvloom.bench.case_results import CaseReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OUR_COLOUR, _COLOUR, _FAINT = "#c2410c", "#475569", "#64748b"
_MARKERS = "os^vDP*X<>dph"
_ROUNDING = 1e-6
"""Nats below which a kind is exact but for the order of its sums."""

Place = Callable[[KindRow], float]
"""Says where on an axis a kind stands."""


@dataclass(frozen=True, slots=True)
class Wording:
    """How a bench speaks of what it measures.

    Attributes:
        whole: what rows are a share of.
        scored: the tokens that predictions are compared at.
        curve: how the names of kinds begin that a line joins.
    """

    whole: str
    scored: str
    curve: tuple[str, ...]


def draw(report: CaseReport, wording: Wording, path: Path) -> None:
    """Draw two charts per group: mean KL against rows computed, and against the first token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = make_rows(report)
    groups = list(dict.fromkeys(row.group for row in rows))
    # A figure of its own, without pyplot: no window, nothing global.
    figure = Figure(figsize=(11, 4.6 * max(len(groups), 1) + 0.6), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12)
    FigureCanvasAgg(figure)
    axes: tuple[tuple[str, Place], ...] = (
        (f"rows computed, % of the {wording.whole}", lambda row: 100 * row.share.mean),
        ("first token, ms", lambda row: 1000 * row.first_token_s.median),
    )
    charts = figure.subplots(max(len(groups), 1), len(axes), squeeze=False)
    for line, group in zip(charts, groups, strict=False):
        members = [row for row in rows if row.group == group]
        for chart, (label, place) in zip(line, axes, strict=True):
            _draw(chart, members, place, wording.curve)
            chart.set_xlabel(label, fontsize=8, color=_FAINT, loc="left")
        line[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
        title = f"{group}: {members[0].cases}"
        line[0].set_title(title, fontsize=11, loc="left", fontweight="bold")
    figure.supxlabel(
        f"{report.source} · {report.options.model} on {report.machine.cpu} · "
        f"{report.started_at[:10]}\nmean KL to full recompute over {wording.scored}, "
        "with its standard error; the dashed line is exact",
        fontsize=8,
        color=_FAINT,
        x=0.01,
        ha="left",
    )
    figure.savefig(path)


def _draw(chart: Axes, rows: Sequence[KindRow], place: Place, joined: tuple[str, ...]) -> None:
    chart.axvline(place(rows[0]), color=_FAINT, linestyle="--", linewidth=1, label=rows[0].kind)
    wrong = [row for row in rows if row.divergence.mean > _ROUNDING]
    curve = [row for row in wrong if row.kind.startswith(joined)]
    chart.plot(
        [place(row) for row in curve], [row.divergence.mean for row in curve], color=_OUR_COLOUR
    )
    for row, marker in zip(wrong, cycle(_MARKERS), strict=False):
        chart.errorbar(
            place(row),
            row.divergence.mean,
            yerr=row.divergence.error,
            fmt=marker,
            color=_OUR_COLOUR if row in curve else _COLOUR,
            capsize=2,
            label=row.kind,
        )
    chart.set_yscale("log")
    chart.spines[["top", "right"]].set_visible(False)
