"""A report of cases for people and for programs: tables, JSON and a picture.

Knows: columns and number formats.
Does not know: what the cases are, or how anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kvloom.bench.case_figures import KindRow, Spread, find_warnings, make_rows
from kvloom.bench.case_picture import Wording, draw
from kvloom.bench.case_results import CaseReport, R, dump
from kvloom.bench.run_show import describe_run

Column = tuple[str, Callable[[KindRow], str]]
"""A heading, and what stands under it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Presentation(Generic[R]):
    """How a bench speaks of what it measures.

    Attributes:
        kind: of its reports.
        wording: of its pictures.
        columns: of its tables.
        legend: what columns and kinds mean.
        measured: says in a few words what was measured.
        warnings: says what only this bench has to warn of.
    """

    kind: type[R]
    wording: Wording
    columns: Callable[[R], Sequence[Column]]
    legend: str
    measured: Callable[[R], str]
    warnings: Callable[[R], Sequence[str]]

    def json(self, report: R) -> str:
        """Return a report with its figures."""
        rows = [asdict(row) for row in make_rows(report)]
        return dump(report, {"figures": rows, "warnings": self._all_warnings(report)})

    def render(self, report: R) -> RenderableType:
        """Return a table per group, what was measured where, and the warnings."""
        rows, columns = make_rows(report), self.columns(report)
        tables: list[RenderableType] = []
        for group in dict.fromkeys(row.group for row in rows):
            tables += [_table(report, [row for row in rows if row.group == group], columns), ""]
        return Group(
            *tables,
            Text(self.legend, style="dim"),
            Text(self._described(report), style="dim"),
            *(Text(f"Warning: {text}", style="yellow") for text in self._all_warnings(report)),
        )

    def draw(self, report: R, path: Path) -> None:
        """Draw error against cost."""
        draw(report, self.wording, path)

    def _described(self, report: R) -> str:
        options = report.options
        return (
            f"{report.source} · {self.measured(report)}\n"
            f"{describe_run(report, options.model, options.settings)}"
        )

    def _all_warnings(self, report: R) -> list[str]:
        return find_warnings(report, self.warnings(report))


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
