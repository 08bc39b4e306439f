"""From times to figures: medians, spreads, ratios, and what a reader must be warned of.

Knows: which figure is better when it is larger.
Does not know: how the times came about or how they are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from kvloom.bench.results import Measurement, Sample, SpeedReport, TaskResult
from kvloom.bench.tasks import FigureName, Task

BUSY_CORES = 0.2
_TOLERATED_SHARE = 0.02
_TOLERATED_TOKENS = 4  # per prompt: texts may begin alike by chance


@dataclass(frozen=True, slots=True)
class Figure:
    """How a sample becomes a number.

    Attributes:
        unit: of the number.
        larger_is_better: true of rates, false of times.
        value: the number.
    """

    unit: str
    larger_is_better: bool
    value: Callable[[Sample], float]


def _decode_rate(sample: Sample) -> float:
    return (sample.new_tokens - 1) / (sample.total_s - sample.first_token_s)


FIGURES: dict[FigureName, Figure] = {
    "prefill": Figure("tok/s", True, lambda sample: sample.prompt_tokens / sample.first_token_s),
    "decode": Figure("tok/s", True, _decode_rate),
    "throughput": Figure("tok/s", True, lambda sample: sample.new_tokens / sample.total_s),
    "first_token": Figure("ms", False, lambda sample: 1000 * sample.first_token_s),
}


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and range over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        task: title of the task.
        name: name of the task.
        engine: name of the engine.
        unit: of the summary.
        summary: None if the engine failed.
        times_as_fast: how many times as fast as this engine kvloom is; None on kvloom's own line.
        best_peer: whether it is the fastest of the peers.
        equal_tokens: generated tokens that equal kvloom's up to the first difference.
        compared_tokens: generated tokens that were compared.
        failure: why there is no summary.
    """

    task: str
    name: str
    engine: str
    unit: str
    summary: Summary | None
    times_as_fast: float | None
    best_peer: bool
    equal_tokens: int
    compared_tokens: int
    failure: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """kvloom against the best peer of one task.

    Attributes:
        task: title of the task.
        name: name of the task.
        unit: of the medians.
        ours: kvloom's median; None if it failed.
        peer: the fastest peer.
        theirs: its median.
        times_as_fast: how many times as fast as this peer kvloom is; None if kvloom failed.
        place: kvloom's among all engines that were measured, 1 being the fastest; None as above.
        engines: how many were measured.
    """

    task: str
    name: str
    unit: str
    ours: float | None
    peer: str
    theirs: float
    times_as_fast: float | None
    place: int | None
    engines: int


def summarize(task: Task, samples: Sequence[Sample]) -> Summary | None:
    """Return median, minimum and maximum of a task's figure; None without samples."""
    values = [FIGURES[task.figure].value(sample) for sample in samples]
    return Summary(median(values), min(values), max(values)) if values else None


def times_as_fast(task: Task, ours: Summary | None, peer: Summary | None) -> float | None:
    """Return how many times as fast ours is, by the medians; below 1 it is slower."""
    if ours is None or peer is None:
        return None
    if FIGURES[task.figure].larger_is_better:
        return ours.median / peer.median
    return peer.median / ours.median


def make_rows(report: SpeedReport) -> list[Row]:
    """Return one row per task and engine."""
    return [row for result in report.results for row in _task_rows(result)]


def _task_rows(result: TaskResult) -> Iterator[Row]:
    task = result.task
    summaries = [summarize(task, measurement.samples) for measurement in result.measurements]
    best = _best_peer(task, summaries)
    for number, (measurement, summary) in enumerate(
        zip(result.measurements, summaries, strict=True)
    ):
        yield Row(
            task=task.title,
            name=task.name,
            engine=measurement.engine,
            unit=FIGURES[task.figure].unit,
            summary=summary,
            times_as_fast=times_as_fast(task, summaries[0], summary) if number else None,
            best_peer=number == best,
            equal_tokens=measurement.equal_tokens,
            compared_tokens=measurement.compared_tokens,
            failure=measurement.failure,
        )


def make_standings(report: SpeedReport) -> list[Standing]:
    """Return how kvloom stands against the best peer, for each task that a peer completed."""
    standings = []
    for result in report.results:
        task = result.task
        summaries = [summarize(task, measurement.samples) for measurement in result.measurements]
        best = _best_peer(task, summaries)
        if best is None:
            continue
        ours, theirs = summaries[0], summaries[best]
        assert theirs is not None
        ratios = [times_as_fast(task, ours, peer) for peer in summaries[1:] if peer is not None]
        standings.append(
            Standing(
                task=task.title,
                name=task.name,
                unit=FIGURES[task.figure].unit,
                ours=None if ours is None else ours.median,
                peer=result.measurements[best].engine,
                theirs=theirs.median,
                times_as_fast=times_as_fast(task, ours, theirs),
                place=None if ours is None else 1 + sum(r is not None and r < 1 for r in ratios),
                engines=sum(summary is not None for summary in summaries),
            )
        )
    return standings


def _best_peer(task: Task, summaries: Sequence[Summary | None]) -> int | None:
    """Return the place of the fastest engine behind the first."""
    medians = [
        (summary.median, number)
        for number, summary in enumerate(summaries)
        if number and summary is not None
    ]
    if not medians:
        return None
    larger = FIGURES[task.figure].larger_is_better
    return (max if larger else min)(medians, key=lambda pair: pair[0])[1]


def find_warnings(report: SpeedReport) -> list[str]:
    """Return what makes the figures doubtful."""
    found = []
    if report.options.quick:
        found.append("The sizes are those of --quick: the figures say nothing about speed.")
    if report.other_cores > BUSY_CORES:
        found.append(
            f"Before the start other processes kept {report.other_cores:.1f} cores busy; "
            "stop them and run again."
        )
    if report.interrupted:
        found.append("The run was interrupted: rounds, tasks or both are missing.")
    for what in ("dtype", "threads"):
        # An engine that computes in a format of its own says so in the table of engines.
        values = {
            engine.name: getattr(engine, what)
            for engine in report.engines
            if what != "dtype" or engine.format is None
        }
        if len({value for value in values.values() if value is not None}) > 1:
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            found.append(f"The engines differ in {what}: {shown}.")
    found += _busy_warnings(report)
    for result in report.results:
        for measurement in result.measurements:
            found += _cache_warnings(result.task, measurement)
    return found


def _busy_warnings(report: SpeedReport) -> Iterator[str]:
    """Say in one line where others took time away."""
    peaks: dict[str, float] = {}
    for result in report.results:
        for measurement in result.measurements:
            busy = [s.other_cores for s in measurement.samples if s.other_cores is not None]
            if busy and max(busy) > BUSY_CORES:
                peaks[f"{result.task.title} on {measurement.engine}"] = max(busy)
    if peaks:
        yield (
            f"Other processes kept up to {max(peaks.values()):.1f} cores busy during "
            f"{len(peaks)} measurements: {', '.join(peaks)}."
        )


def _cache_warnings(task: Task, measurement: Measurement) -> Iterator[str]:
    """Say where KV was reused that should have been computed, or the other way round."""
    where = f"{task.title} on {measurement.engine}"
    for sample in measurement.samples:
        if sample.cached_tokens is None:
            continue
        if task.edited_tokens:  # how much else of an edited text is reused is what it is about
            computed = sample.prompt_tokens - sample.cached_tokens
            if computed < task.edited_tokens // 2:
                yield f"{where} computed {computed} tokens; {task.edited_tokens} were new."
                return
            continue
        tolerated = _TOLERATED_SHARE * sample.prompt_tokens
        tolerated += _TOLERATED_TOKENS * len(task.prompt_tokens)
        if abs(sample.cached_tokens - task.shared_tokens) > tolerated:
            yield (
                f"{where} reused {sample.cached_tokens} of {sample.prompt_tokens} tokens; "
                f"{task.shared_tokens} were expected."
            )
            return
