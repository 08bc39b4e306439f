"""A line says of which model, where and when a run was."""

from __future__ import annotations

import pytest

from kvloom.bench.results import Machine, RunReport
from kvloom.bench.run_show import describe_run


@pytest.mark.parametrize(
    ("cores", "settings", "expected"),
    [
        (4, {"dtype": "float32", "threads": 1}, "model m (dtype float32, threads 1) · a cpu (4 co"),
        (None, {}, "model m · a cpu (? cores) · today · 12 s in all"),
    ],
)
def test_what_is_known_is_said(
    cores: int | None, settings: dict[str, object], expected: str
) -> None:
    machine = Machine(
        cpu="a cpu",
        physical_cores=cores,
        logical_cores=cores,
        memory_bytes=2**30,
        platform="any",
        python="3",
    )
    report = RunReport(started_at="today", duration_s=12.3, machine=machine)
    assert expected in describe_run(report, "m", settings)
