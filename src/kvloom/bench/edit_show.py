"""A report of edits for people and for programs: tables and JSON.

Knows: columns and number formats.
Does not know: how anything was measured.
"""

from __future__ import annotations

from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvloom.bench.edit_figures import KindRow, find_warnings, make_rows
from kvloom.bench.edit_results import EditReport, dump

_LEGEND = (
    "KL and top-1: next tokens against exact, which is what reusing the prefix only comes to · "
    "± standard error of the mean · rows and times: median (quartiles) · "
    "blend, mentions, first, random: ways to choose the rows that are computed again · "
    "unrotated: old keys at new places as they are · dropped: nothing behind the change is kept or "
    "computed · ignored: the document before the edit"
)


def report_json(report: EditReport) -> str:
    """Return the report with its figures."""
    rows = [asdict(row) for row in make_rows(report)]
    return dump(report, {"figures": rows, "warnings": find_warnings(report)})


def render(report: EditReport) -> RenderableType:
    """Return a table per group, what was measured where, and the warnings."""
    rows = make_rows(report)
    tables: list[RenderableType] = []
    for group in dict.fromkeys(row.group for row in rows):
        tables += [_table(report, [row for row in rows if row.group == group]), ""]
    return Group(
        *tables,
        Text(_LEGEND, style="dim"),
        Text(_describe(report), style="dim"),
        *(Text(f"Warning: {text}", style="yellow") for text in find_warnings(report)),
    )


def _table(report: EditReport, rows: list[KindRow]) -> Table:
    tokens = sorted(result.tokens for result in report.results if result.group == rows[0].group)
    title = f"{rows[0].group}: {rows[0].edits}, of {tokens[0]:,} to {tokens[-1]:,} tokens"
    table = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    table.add_column("kind")
    headings = ["rows", "first token", "KL mean", "median", "90 %", "top-1", "NLL"]
    if rows[0].preference is not None:
        headings += ["new over old", "error"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        seconds, kl = row.first_token_s, row.divergence
        cells = [
            f"{row.share.median:.0%} ({row.share.low:.0%}–{row.share.high:.0%})",
            f"{_ms(seconds.median)} ({_ms(seconds.low)}–{_ms(seconds.high)}) ms",
            f"{kl.mean:.4f} ± {kl.error:.4f}",
            f"{kl.median:.4f}",
            f"{kl.high:.4f}",
            f"{row.agreement:.1%}",
            f"{row.nll:.3f}",
        ]
        if row.preference is not None:
            cells += [f"{row.preference:+.2f}", f"{row.preference_error:.2f}"]
        table.add_row(row.kind, *cells)
    return table


def _describe(report: EditReport) -> str:
    options, machine = report.options, report.machine
    places = options.places
    scored = f"{places.scored} tokens scored {places.behind} behind the last change"
    if any(outcome.nll_other is not None for r in report.results for outcome in r.outcomes):
        scored = "the name scored that comes next"
    settings = ", ".join(f"{name} {value}" for name, value in options.settings.items())
    return (
        f"{report.source} · {scored} · documents of at most {places.context:,} tokens\n"
        f"model {options.model}{f' ({settings})' if settings else ''} · {machine.cpu} "
        f"({machine.physical_cores or '?'} cores) · {report.started_at} · "
        f"{report.duration_s:.0f} s in all"
    )


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}"
