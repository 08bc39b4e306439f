"""Shares: the time of a task that is done with less work, as a part of what all of it takes.

Knows: which tasks do the same thing with more work.
Does not know: how the times came about or how they are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvloom.bench.figures import Row, make_rows
from kvloom.bench.results import SpeedReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The time of one task on one engine, held against the task that does the same in full.

    Attributes:
        task: title of the task.
        name: name of the task.
        engine: that did it.
        of_own: its median time, the engine's own for the whole work being 1; None without one.
        best_peer: the peer that is fastest at the whole work; None without peers.
        of_best_peer: its median time, that peer's for the whole work being 1; None likewise.
    """

    task: str
    name: str
    engine: str
    of_own: float | None
    best_peer: str | None
    of_best_peer: float | None


def make_shares(report: SpeedReport) -> list[Share]:
    """Return one entry per engine and task that another one of the report is the whole of."""
    rows = make_rows(report)
    wholes = {result.task.name: result.task.held_against for result in report.results}
    return [
        share
        for name, whole in wholes.items()
        if whole in wholes
        for share in _of(rows, name, whole)
    ]


def _of(rows: list[Row], name: str, whole: str) -> Iterator[Share]:
    full = {row.engine: row for row in rows if row.name == whole}
    best = next((row for row in full.values() if row.best_peer), None)
    for row in rows:
        if row.name != name or row.summary is None:
            continue
        yield Share(
            task=row.task,
            name=name,
            engine=row.engine,
            of_own=_ratio(row, full[row.engine]),
            best_peer=None if best is None else best.engine,
            of_best_peer=None if best is None else _ratio(row, best),
        )


def _ratio(row: Row, whole: Row) -> float | None:
    if row.summary is None or whole.summary is None:
        return None
    return row.summary.median / whole.summary.median
