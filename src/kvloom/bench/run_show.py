"""A run in words: of which model, where and when.

Knows: settings and machines.
Does not know: what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvloom.bench.results import RunReport


def describe_run(report: RunReport, model: str, settings: Mapping[str, Any]) -> str:
    """Return of which model, and where and when, a report is.

    Args:
        report: of the run.
        model: as it was asked for.
        settings: further ones of it.
    """
    named = ", ".join(f"{name} {value}" for name, value in settings.items())
    machine = report.machine
    return (
        f"model {model}{f' ({named})' if named else ''} · {machine.cpu} "
        f"({machine.physical_cores or '?'} cores) · {report.started_at} · "
        f"{report.duration_s:.0f} s in all"
    )
