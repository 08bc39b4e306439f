"""A picture of a report of edits: error against rows, and against time, drawn by matplotlib.

Knows: matplotlib, and which kinds belong together.
Does not know: how anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from kvloom.bench.edit_figures import KindRow, make_rows
from kvloom.bench.edit_results import EditReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS = ("repaired", "shifted")
_OUR_COLOUR, _COLOUR, _FAINT = "#c2410c", "#475569", "#64748b"
_MARKERS = "os^vDP*X<>dph"


def draw(report: EditReport, path: Path) -> None:
    """Draw two charts per group: mean KL against rows computed, and against the first token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = make_rows(report)
    groups = list(dict.fromkeys(row.group for row in rows))
    # A figure of its own, without pyplot: no window, nothing global.
    figure = Figure(figsize=(11, 4.6 * max(len(groups), 1) + 0.6), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.12)
    FigureCanvasAgg(figure)
    charts = figure.subplots(max(len(groups), 1), 2, squeeze=False)
    for (left, right), group in zip(charts, groups, strict=False):
        members = [row for row in rows if row.group == group]
        _draw(left, members, lambda row: 100 * row.share.mean, "rows computed, % of the document")
        _draw(right, members, lambda row: 1000 * row.first_token_s.median, "first token, ms")
        right.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
        left.set_title(f"{group}: {members[0].edits}", fontsize=11, loc="left", fontweight="bold")
    figure.supxlabel(
        f"{report.source} · {report.options.model} on {report.machine.cpu} · "
        f"{report.started_at[:10]}\nmean KL to full recompute over the tokens that really follow, "
        "with its standard error; the dashed line is exact",
        fontsize=8,
        color=_FAINT,
        x=0.01,
        ha="left",
    )
    figure.savefig(path)


def _draw(
    chart: Axes, rows: Sequence[KindRow], place: Callable[[KindRow], float], label: str
) -> None:
    chart.axvline(place(rows[0]), color=_FAINT, linestyle="--", linewidth=1, label=rows[0].kind)
    wrong = [row for row in rows if row.divergence.mean > 0]
    curve = [row for row in wrong if row.kind.startswith(_OURS)]
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
    chart.set_xlabel(label, fontsize=8, color=_FAINT, loc="left")
    chart.spines[["top", "right"]].set_visible(False)
