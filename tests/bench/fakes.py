"""Fake engines as the bench starts them, and reports made by hand, as they are printed.

Knows: the command of the fake worker, small valid reports, and a terminal that is a text.
Does not know: any engine.
"""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from kvloom.bench.peers.registry import Engine
from kvloom.bench.results import (
    EngineReport,
    Machine,
    Measurement,
    Sample,
    SpeedOptions,
    SpeedReport,
    TaskResult,
)
from kvloom.bench.tasks import QUICK, Task, make_tasks

FAKE_WORKER = Path(__file__).with_name("fake_worker.py")
TASKS = {task.name: task for task in make_tasks(QUICK)}


def printed(shown: RenderableType, width: int = 160) -> str:
    """Return what a terminal of so many columns shows."""
    console = Console(width=width, no_color=True, file=StringIO(), record=True)
    console.print(shown)
    return console.export_text()


def fake_command(name: str = "fake", **settings: Any) -> tuple[str, ...]:
    """Return the command of a fake worker."""
    return (sys.executable, "-I", str(FAKE_WORKER), json.dumps({"name": name, **settings}))


def fake_engine(name: str, **settings: Any) -> Engine:
    """Return a fake engine."""
    return Engine(name, fake_command(name, **settings))


def sample(first_token_s: float = 1.0, total_s: float = 3.0, **changes: Any) -> Sample:
    """Return a sample with 100 prompt tokens and 5 new ones."""
    settings: dict[str, Any] = {"prompt_tokens": 100, "new_tokens": 5, **changes}
    return Sample(first_token_s=first_token_s, total_s=total_s, **settings)


def result(name: str, **samples: list[Sample] | str) -> TaskResult:
    """Return a task's result by engine: samples, or why there are none."""
    measurements = [
        Measurement(engine=engine, failure=content)
        if isinstance(content, str)
        else Measurement(engine=engine, samples=tuple(content))
        for engine, content in samples.items()
    ]
    task: Task = TASKS[name]
    return TaskResult(task, tuple(measurements))


def report(*results: TaskResult, **changes: Any) -> SpeedReport:
    """Return a report of an idle machine."""
    names = [m.engine for m in results[0].measurements] if results else ["kvloom"]
    settings: dict[str, Any] = {
        "started_at": "2026-01-02T03:04:05+00:00",
        "duration_s": 12.0,
        "options": SpeedOptions(),
        "model_path": "folder",
        "machine": Machine(
            cpu="Abacus",
            physical_cores=2,
            logical_cores=None,
            memory_bytes=2**34,
            platform="Linux",
            python="3.11",
        ),
        "other_cores": 0.0,
        "engines": tuple(EngineReport(name=name, dtype="float32", threads=2) for name in names),
        "results": results,
    }
    return SpeedReport(**{**settings, **changes})
