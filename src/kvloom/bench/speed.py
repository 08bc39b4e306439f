"""The speed bench: kvloom and its peers on the same tasks, in alternating rounds of one run.

Knows: the order in which everything is prepared, warmed up, measured and compared.
Does not know: how an engine is driven, or how the report is shown.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from datetime import datetime

from kvloom.bench.contender import Contender
from kvloom.bench.figures import BUSY_CORES
from kvloom.bench.machine import describe_machine, watch_idle
from kvloom.bench.peers.registry import OURS, Engine, choose_engines, known_engines
from kvloom.bench.peers.wire import (
    Loaded,
    LoadRequest,
    Progress,
    Tokenized,
    TokenizeRequest,
    equal_start,
)
from kvloom.bench.prompts import (
    PromptTable,
    cut_prompts,
    source_text,
    tokens_needed,
)
from kvloom.bench.results import DTYPES, Measurement, Sample, SpeedOptions, SpeedReport, TaskResult
from kvloom.bench.tasks import FULL, QUICK, Task, choose_tasks, make_tasks, work_units
from kvloom.bench.worker import WorkerError, WorkerProcess

_log = logging.getLogger(__name__)


def run_speed(
    options: SpeedOptions,
    progress: Progress | None = None,
    *,
    engines: Mapping[str, Engine] | None = None,
) -> SpeedReport:
    """Measure kvloom and its peers.

    A peer that fails is an empty row with the reason. An interrupt from the keyboard while tasks
    are measured ends the run, and what was measured until then is reported.

    Args:
        options: what is measured.
        progress: is told about every step.
        engines: what can be measured, by name; None takes all that kvloom knows.

    Raises:
        RequestError: a task or peer is unknown.
        WorkerError: kvloom itself cannot load the model.
    """
    known = known_engines() if engines is None else engines
    chosen = choose_engines(options.peers, known)
    tasks = choose_tasks(make_tasks(QUICK if options.quick else FULL), options.tasks)
    tell = progress if progress is not None else _silent
    started_at, started = datetime.now().astimezone(), time.perf_counter()
    loaded, text = _prepare(known[OURS], options, tokens_needed(tasks, options.rounds), tell)
    prompts = cut_prompts(tasks, options.rounds, text.tokens, text.leading)
    tell("Watching whether the machine is idle", 0, 0)
    busy = watch_idle()
    if busy > BUSY_CORES:
        _log.warning("other processes keep %.1f cores busy; the figures will be doubtful", busy)
    with ExitStack() as stack:
        contenders = []
        for engine in chosen:
            tell(f"Starting {engine.name}", 0, 0)
            contender = stack.enter_context(closing(Contender(engine, options.timeout_s)))
            contender.start(_load_request(options, loaded, engine.name), tell)
            contenders.append(contender)
        meter = _Meter(tell, sum(map(work_units, tasks)) * (options.rounds + 1) * len(contenders))
        results, interrupted = _measure_all(tasks, prompts, contenders, options.rounds, meter)
        reports = tuple(contender.report() for contender in contenders)
    return SpeedReport(
        started_at=started_at.isoformat(timespec="seconds"),
        duration_s=time.perf_counter() - started,
        options=options,
        model_path=loaded.model_path,
        machine=describe_machine(),
        other_cores=busy,
        engines=reports,
        results=tuple(results),
        interrupted=interrupted,
    )


def _prepare(
    ours: Engine, options: SpeedOptions, num_tokens: int, tell: Progress
) -> tuple[Loaded, Tokenized]:
    """Load the model once before anything is timed, in a process that is then ended.

    A first start converts or downloads; the engines that are measured all start warm, with the
    folder, format and number of threads that this one found.
    """
    tell("Preparing the model", 0, 0)
    with closing(WorkerProcess(ours.name, ours.command, options.timeout_s)) as worker:
        request = LoadRequest(
            model=options.model,
            dtype=options.dtype,
            threads=options.threads,
            kv_memory=options.kv_memory,
            settings=dict(options.settings),
        )
        loaded = worker.load(request, tell)
        tell("Tokenizing the prompts", 0, 0)
        return loaded, worker.tokenize(TokenizeRequest(text=source_text(num_tokens)))


def _load_request(options: SpeedOptions, loaded: Loaded, name: str) -> LoadRequest:
    return LoadRequest(
        model=options.model if name == OURS else loaded.model_path,
        dtype=options.dtype if name == OURS else _peer_dtype(loaded.dtype),
        threads=loaded.threads,
        kv_memory=options.kv_memory,
        settings=dict(options.settings),
    )


def _peer_dtype(ours: str) -> str:
    """Return the dtype of peers without a format of their own: kvloom's, or that of its folder.

    Where kvloom computes with a file's codes, its folder holds them dequantised to float32.
    """
    return ours if ours in DTYPES else "float32"


@dataclass(slots=True)
class _Run:
    """One task on one engine while it is measured."""

    samples: list[Sample] = field(default_factory=list)
    outputs: list[list[int]] = field(default_factory=list)
    failure: str | None = None


def _measure_all(
    tasks: Sequence[Task],
    prompts: PromptTable,
    contenders: Sequence[Contender],
    rounds: int,
    meter: _Meter,
) -> tuple[list[TaskResult], bool]:
    """Return the results of all tasks or those before an interrupt, and whether there was one."""
    results = []
    for task in tasks:
        runs = [_Run() for _ in contenders]
        exact = _Run() if task.approximate else runs[0]
        interrupted = False
        try:
            _measure(task, prompts, contenders, runs, rounds, meter)
            if task.approximate:
                _run_exactly(task, prompts, contenders[0], exact, len(runs[0].samples))
        except KeyboardInterrupt:
            interrupted = True
        # A task that an interrupt met before any round says nothing.
        if not interrupted or any(run.samples for run in runs):
            results.append(_finish(task, contenders, runs, exact))
        if interrupted:
            return results, True
    return results, False


def _measure(
    task: Task,
    prompts: PromptTable,
    contenders: Sequence[Contender],
    runs: Sequence[_Run],
    rounds: int,
    meter: _Meter,
) -> None:
    """Run a task on one engine after the other, round by round, the first round unmeasured."""
    for number in range(rounds + 1):
        phase = f"round {number} of {rounds}" if number else "warming up"
        for contender, run in zip(contenders, runs, strict=True):
            meter.tell(f"{task.title} · {contender.name} · {phase}")
            if run.failure is None and contender.offers(task):
                _run_round(task, prompts, contender, run, number)
            meter.advance(work_units(task))


def _run_round(
    task: Task, prompts: PromptTable, contender: Contender, run: _Run, number: int
) -> None:
    try:
        sample, outputs = contender.run(task, prompts[task.name, number], warm_up=number == 0)
    except WorkerError as error:
        _log.warning("%s failed at %s: %s", contender.name, task.title, error)
        run.failure = str(error)
        return
    if number:
        run.samples.append(sample)
        run.outputs += outputs


def _run_exactly(task: Task, prompts: PromptTable, ours: Contender, run: _Run, rounds: int) -> None:
    """Let kvloom do an approximate task exactly, after all rounds.

    Before them, its cache of prefixes would answer in place of the approximation.
    """
    for number in range(1, rounds + 1):
        if run.failure is None:
            _run_round(replace(task, way="exact"), prompts, ours, run, number)


def _finish(
    task: Task, contenders: Sequence[Contender], runs: Sequence[_Run], exact: _Run
) -> TaskResult:
    measurements = tuple(
        _compare(contender.name, run, exact)
        if contender.offers(task)
        else Measurement(engine=contender.name)
        for contender, run in zip(contenders, runs, strict=True)
    )
    return TaskResult(task, measurements)


def _compare(name: str, run: _Run, exact: _Run) -> Measurement:
    """Return the measurement of a run, compared with kvloom's exact output."""
    failure = run.failure
    if failure is None and not run.samples:
        failure = "interrupted before a round was measured"
    if failure is not None:
        return Measurement(engine=name, failure=failure)
    pairs: list[tuple[list[int], list[int]]] = []
    if run is not exact and exact.failure is None:
        # An interrupt leaves the later engines one round behind.
        pairs = list(zip(run.outputs, exact.outputs, strict=False))
    return Measurement(
        engine=name,
        samples=tuple(run.samples),
        equal_tokens=sum(equal_start(theirs, our) for theirs, our in pairs),
        compared_tokens=sum(len(our) for _, our in pairs),
    )


class _Meter:
    """Adds up the work that is done."""

    def __init__(self, tell: Progress, total: int) -> None:
        self._tell, self._total, self._done, self._doing = tell, total, 0, ""

    def tell(self, doing: str) -> None:
        """Say what is being done."""
        self._doing = doing
        self._tell(doing, self._done, self._total)

    def advance(self, units: int) -> None:
        """Note that so much is done."""
        self._done += units
        self._tell(self._doing, self._done, self._total)


def _silent(description: str, done: int, total: int) -> None:
    return None
