"""A report of cases for people and for programs: tables and JSON.

Knows: columns and number formats.
Does not know: what the cases are, or how anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvloom.bench.case_figures import KindRow, Spread, find_warnings, make_rows
from kvloom.bench.case_results import CaseReport, dump

Column = tuple[str, Callable[[KindRow], str]]
"""A heading, and what stands under it."""


@dataclass(frozen=True, slots=True)
class Notes:
    """What stands below a table.

    Attributes:
        legend: what columns and kinds mean.
        measured: what was measured, in a few words.
        warnings: what only this bench has to warn of.
    """

    legend: str
    measured: str
    warnings: Sequence[str] = ()


def share(spread: Spread) -> str:
    """Return a share as median and quartiles."""
    return f"{spread.median:.0%} ({spread.low:.0%}–{spread.high:.0%})"


def milliseconds(spread: Spread) -> str:
    """Return seconds as median and quartiles in milliseconds."""
    low, middle, high = (f"{1000 * s:,.0f}" for s in (spread.low, spread.median, spread.high))
    return f"{middle} ({low}–{high}) ms"


ROWS: Column = ("rows", lambda row: share(row.share))
ERRORS: tuple[Column, ...] = (
    ("first token", lambda row: milliseconds(row.first_token_s)),
    ("KL mean", lambda row: f"{row.divergence.mean:.4f} ± {row.divergence.error:.4f}"),
    ("median", lambda row: f"{row.divergence.median:.4f}"),
    ("90 %", lambda row: f"{row.divergence.high:.4f}"),
    ("top-1", lambda row: f"{row.agreement:.1%}"),
    ("NLL", lambda row: f"{row.nll:.3f}"),
)


def report_json(report: CaseReport, warnings: Sequence[str] = ()) -> str:
    """Return the report with its figures."""
    rows = [asdict(row) for row in make_rows(report)]
    return dump(report, {"figures": rows, "warnings": find_warnings(report, warnings)})


def render(report: CaseReport, columns: Sequence[Column], notes: Notes) -> RenderableType:
    """Return a table per group, what was measured where, and the warnings."""
    rows = make_rows(report)
    tables: list[RenderableType] = []
    for group in dict.fromkeys(row.group for row in rows):
        tables += [_table(report, [row for row in rows if row.group == group], columns), ""]
    warnings = find_warnings(report, notes.warnings)
    return Group(
        *tables,
        Text(notes.legend, style="dim"),
        Text(_describe(report, notes.measured), style="dim"),
        *(Text(f"Warning: {text}", style="yellow") for text in warnings),
    )


def _table(report: CaseReport, rows: Sequence[KindRow], columns: Sequence[Column]) -> Table:
    group = rows[0].group
    tokens = sorted(result.tokens for result in report.results if result.group == group)
    title = f"{group}: {rows[0].cases}, of {tokens[0]:,} to {tokens[-1]:,} tokens"
    table = Table(box=None, header_style="bold", pad_edge=False, title=title, title_justify="left")
    table.add_column("kind")
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.kind, *(cell(row) for _, cell in columns))
    return table


def _describe(report: CaseReport, measured: str) -> str:
    options, machine = report.options, report.machine
    settings = ", ".join(f"{name} {value}" for name, value in options.settings.items())
    return (
        f"{report.source} · {measured}\n"
        f"model {options.model}{f' ({settings})' if settings else ''} · {machine.cpu} "
        f"({machine.physical_cores or '?'} cores) · {report.started_at} · "
        f"{report.duration_s:.0f} s in all"
    )
