"""The bench of edits: every edit in all ways, one after the other, resumed where it ended.

Knows: the order of things, and what has been measured already.
Does not know: how an edit is carried out, or how the report is shown.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from kvloom import KvloomError, RequestError
from kvloom.bench.edit_kinds import Case, make_kinds, measure
from kvloom.bench.edit_places import PlaceRule, choose_places
from kvloom.bench.edit_results import EditOptions, EditReport, EditResult
from kvloom.bench.edit_source import CutEdit, FileEdit, Source
from kvloom.bench.figures import BUSY_CORES
from kvloom.bench.machine import describe_machine, other_cores, read_cpu, watch_idle
from kvloom.bench.peers.wire import Progress

if TYPE_CHECKING:
    from kvloom import LLM

_log = logging.getLogger(__name__)
FILE_GROUP = "edits"


def run_edits(
    llm: LLM,
    options: EditOptions,
    source: Source,
    *,
    limit: int,
    earlier: EditReport | None = None,
    keep: Callable[[EditReport], None] = lambda report: None,
    progress: Progress = lambda description, done, total: None,
) -> EditReport:
    """Measure edits until there are enough of them.

    Args:
        llm: without prefix caching, else equal texts would answer for approximate ones, and
            without repairs, else these would become exact.
        options: what is measured.
        source: the edits.
        limit: edits in all, those of the earlier report included.
        earlier: a report whose edits are not measured again.
        keep: is given the report after every edit.
        progress: is told about every edit.

    Raises:
        RequestError: the earlier report is about something else, or there is no edit to measure.
    """
    if llm.config.enable_prefix_caching or llm.config.repair_when_idle:
        raise RequestError(
            "the bench of edits needs a model without prefix caching and without idle repairs; set "
            "enable_prefix_caching and repair_when_idle to False."
        )
    longest, most = options.places.context + options.places.scored, llm.spec.max_positions
    if longest > most:
        raise RequestError(
            f"The model takes {most} tokens, and context and scored come to {longest}; lower the "
            "context.",
            param="context",
        )
    run = _Run(llm, options, source, limit, earlier)
    if (busy := watch_idle()) > BUSY_CORES:
        _log.warning("other processes keep %.1f cores busy; times will be doubtful", busy)
    try:
        for report in run.reports(progress):
            keep(report)
    except KeyboardInterrupt:
        run.report = replace(run.report, interrupted=True)
        keep(run.report)
    if not run.report.results and not run.report.interrupted:
        reasons = ", ".join(sorted(set(run.report.skipped.values()))) or "there is none"
        raise RequestError(f"{source.title} gives no edit to measure: {reasons}.")
    return run.report


@dataclass(slots=True)
class _Clock:
    """Seconds of all runs."""

    before_s: float
    begun: float

    @property
    def total_s(self) -> float:
        return self.before_s + time.perf_counter() - self.begun


class _Run:
    """One run, and the report so far."""

    def __init__(
        self,
        llm: LLM,
        options: EditOptions,
        source: Source,
        limit: int,
        earlier: EditReport | None,
    ) -> None:
        self._llm, self._source, self._limit = llm, source, limit
        self._kinds = make_kinds(options.shares)
        fresh = EditReport(
            started_at=datetime.now().astimezone().isoformat(timespec="seconds"),
            duration_s=0.0,
            source=source.title,
            options=options,
            model=llm.passport.fingerprint.hex(),
            machine=describe_machine(),
            kinds=tuple(kind.name for kind in self._kinds),
        )
        self.report = fresh if earlier is None else _gone_on_with(earlier, fresh)
        self._clock = _Clock(self.report.duration_s, time.perf_counter())

    def reports(self, progress: Progress) -> Iterator[EditReport]:
        """Measure what is left, and yield the report after every edit."""
        known = {result.name for result in self.report.results} | self.report.skipped.keys()
        for edit in self._source.edits:
            done = len(self.report.results)
            if done >= self._limit:
                break
            if edit.name in known:
                continue
            progress(f"Edit {done + 1} of at most {self._limit}", done, self._limit)
            outcome = self._measure(edit)
            if isinstance(outcome, str):
                skipped = {**self.report.skipped, edit.name: outcome}
                self.report = replace(self.report, skipped=skipped)
            else:
                self.report = replace(self.report, results=(*self.report.results, outcome))
            self.report = replace(self.report, duration_s=self._clock.total_s)
            yield self.report

    def _measure(self, edit: FileEdit | CutEdit) -> EditResult | str:
        """Return an edit's result, or why it has none."""
        rule = self.report.options.places
        case = file_case(self._llm, edit, rule) if isinstance(edit, FileEdit) else None
        if isinstance(edit, CutEdit):
            case = cut_case(self._llm, edit, rule)
        if isinstance(case, str):
            return case
        assert case is not None
        before = read_cpu()
        try:
            outcomes = measure(self._llm, case, self._kinds)
        except KvloomError as error:
            return str(error)
        return EditResult(
            name=case.name,
            group=case.group,
            tokens=len(case.new_tokens),
            first_change=case.change[0],
            hunks=case.hunks,
            cut=case.cut,
            scored=len(self._llm.tokenizer.encode(case.continuation, add_special_tokens=False)),
            outcomes=outcomes,
            other_cores=other_cores(before, read_cpu()),
        )


def file_case(llm: LLM, edit: FileEdit, rule: PlaceRule) -> Case | str:
    """Return what is measured of a changed file, or why nothing is."""
    encode, spell = llm.tokenizer.encode, llm.retokenizer.text
    old = encode(edit.before, add_special_tokens=False)
    new = encode(edit.after, add_special_tokens=False)

    def is_stable(start: int, stop: int) -> bool:
        return encode(spell(new[start:stop]), add_special_tokens=False) == new[start:stop]

    replaced = llm.retokenizer.replace_text(old, edit.after).replaced
    places = choose_places(replaced, len(new), rule, is_stable)
    if isinstance(places, str):
        return places
    leading = tuple(encode(""))
    return Case(
        name=edit.name,
        group=FILE_GROUP,
        old_tokens=leading + tuple(old[places.old_start : places.old_stop]),
        new_tokens=leading + tuple(new[places.new_start : places.new_stop]),
        change=(len(leading) + places.first_change, len(leading) + places.first_stop),
        continuation=spell(new[places.new_stop : places.new_stop + rule.scored]),
        hunks=places.hunks,
        cut=places.new_start,
    )


def cut_case(llm: LLM, edit: CutEdit, rule: PlaceRule) -> Case | str:
    """Return what is measured of a document that was cut already, or why nothing is."""
    old, new = llm.tokenizer.encode(edit.before), llm.tokenizer.encode(edit.after)
    if max(len(old), len(new)) > rule.context:
        return f"the document is longer than the context of {rule.context} tokens"
    replaced = llm.retokenizer.replace_text(old, llm.retokenizer.text(new)).replaced
    if not replaced:
        return "nothing changes"
    first = replaced[0]
    return Case(
        name=edit.name,
        group=edit.group,
        old_tokens=tuple(old),
        new_tokens=tuple(new),
        change=(first.start, first.start + len(first.tokens)),
        continuation=edit.continuation,
        other=edit.other,
        hunks=len(replaced),
    )


def _gone_on_with(earlier: EditReport, fresh: EditReport) -> EditReport:
    """Return an earlier report to be gone on with.

    Raises:
        RequestError: it is about something else.
    """
    for what in ("source", "options", "kinds", "model"):
        then, now = getattr(earlier, what), getattr(fresh, what)
        if then != now:
            raise RequestError(
                f"The report there is of another run: its {what} is {then}, and now it is {now}. "
                "Name another file, or remove it."
            )
    return replace(earlier, machine=fresh.machine, interrupted=False)
