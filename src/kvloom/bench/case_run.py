"""A run of cases, one after the other, gone on with where an earlier one ended.

Knows: the order of things, and what has been measured already.
Does not know: what a case is, or how the report is shown.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Generic

from kvloom import KvloomError, RequestError
from kvloom.bench.case_results import CaseResult, R, gone_on_with
from kvloom.bench.case_source import C
from kvloom.bench.figures import BUSY_CORES
from kvloom.bench.lasting import require_lasting
from kvloom.bench.machine import describe_machine, other_cores, read_cpu, watch_idle
from kvloom.bench.peers.wire import Progress

if TYPE_CHECKING:
    from kvloom import LLM

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running(Generic[R]):
    """How a run goes on and tells of itself.

    Attributes:
        limit: cases in all, those of the earlier report included.
        earlier: a report whose cases are not measured again.
        keep: is given the report after every case.
        progress: is told about every case.
    """

    limit: int
    earlier: R | None = None
    keep: Callable[[R], None] = lambda report: None
    progress: Progress = lambda description, done, total: None


def run_cases(
    fresh: R, cases: Iterable[C], measure: Callable[[C], CaseResult | str], running: Running[R]
) -> R:
    """Measure cases until there are enough of them; an interrupt ends that, and keeps the rest.

    Args:
        fresh: the report before the first case.
        cases: what there is to measure.
        measure: returns a case's result, or why it has none.
        running: how.

    Raises:
        RequestError: the earlier report is about something else, or there is no case to measure.
    """
    run = _Run(fresh, measure, running)
    if (busy := watch_idle()) > BUSY_CORES:
        _log.warning("other processes keep %.1f cores busy; times will be doubtful", busy)
    try:
        for report in run.reports(cases):
            running.keep(report)
    except KeyboardInterrupt:
        run.report = replace(run.report, interrupted=True)
        running.keep(run.report)
    if not run.report.results and not run.report.interrupted:
        reasons = ", ".join(sorted(set(run.report.skipped.values()))) or "there is none"
        raise RequestError(f"{fresh.source} gives no {fresh.noun} to measure: {reasons}.")
    return run.report


def begin(report: type[R], llm: LLM, source: str, options: object, kinds: Iterable[str]) -> R:
    """Return a report without results.

    Raises:
        RequestError: exact KV would answer for approximate one, or be made of it meanwhile.
    """
    require_lasting(llm, report.noun)
    return report(
        started_at=datetime.now().astimezone().isoformat(timespec="seconds"),
        duration_s=0.0,
        source=source,
        options=options,  # type: ignore[arg-type] # each report says which it takes
        model=llm.passport.fingerprint.hex(),
        machine=describe_machine(),
        kinds=tuple(kinds),
    )


class _Run(Generic[C, R]):
    """One run, and the report so far."""

    def __init__(
        self, fresh: R, measure: Callable[[C], CaseResult | str], running: Running[R]
    ) -> None:
        self._measure, self._running = measure, running
        earlier = running.earlier
        self.report = fresh if earlier is None else gone_on_with(earlier, fresh)
        self._before_s, self._begun = self.report.duration_s, time.perf_counter()

    def reports(self, cases: Iterable[C]) -> Iterator[R]:
        """Measure what is left, and yield the report after every case."""
        known = {result.name for result in self.report.results} | self.report.skipped.keys()
        limit, noun = self._running.limit, self.report.noun
        for case in cases:
            done = len(self.report.results)
            if done >= limit:
                break
            if case.name in known:
                continue
            self._running.progress(f"{done + 1} of at most {limit} {noun}", done, limit)
            self._take(case)
            yield self.report

    def _take(self, case: C) -> None:
        """Measure a case and put what comes of it into the report."""
        before = read_cpu()
        try:
            outcome = self._measure(case)
        except KvloomError as error:
            outcome = str(error)
        if isinstance(outcome, str):
            skipped = {**self.report.skipped, case.name: outcome}
            self.report = replace(self.report, skipped=skipped)
        else:
            result = replace(outcome, other_cores=other_cores(before, read_cpu()))
            self.report = replace(self.report, results=(*self.report.results, result))
        seconds = self._before_s + time.perf_counter() - self._begun
        self.report = replace(self.report, duration_s=seconds)
