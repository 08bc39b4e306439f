"""Progress: bars on a terminal, few plain lines elsewhere, nothing for short work."""

from __future__ import annotations

import io
import threading
import time

import pytest
from rich.console import Console

from kvloom.cli import progress as module
from kvloom.cli.progress import PlainLines, long_work, prefill_progress
from kvloom.errors import KvloomError
from kvloom.outputs import EngineStats


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80)


def text_of(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def test_plain_lines_are_few() -> None:
    now = [0.0]
    lines: list[str] = []
    report = PlainLines(lines.append, lambda: now[0])
    for done in range(101):
        now[0] = done / 10
        report("Reading", done, 100)
    assert lines == ["Reading: 10%", "Reading: 60%"]


def test_plain_lines_without_a_total_show_no_share() -> None:
    lines: list[str] = []
    clock = iter([0.0, 2.0])
    PlainLines(lines.append, lambda: next(clock))("Waiting", 3, 0)
    assert lines == ["Waiting ..."]


def test_outside_of_a_terminal_there_are_no_control_codes() -> None:
    shown = console(terminal=False)
    with long_work(shown, "Starting") as report:
        report("Reading", 1, 2)
    assert text_of(shown) == ""


def test_a_terminal_gets_a_bar_that_disappears() -> None:
    shown = console(terminal=True)
    with long_work(shown, "Starting [not] markup", "Probing") as report:
        report("Reading [x]", 1, 2)
        time.sleep(0.2)
        report("Reading [x]", 2, 2)
        time.sleep(0.2)
        report("Counting", 5, 0)
    text = text_of(shown)
    assert "Reading [x]" in text
    assert "50%" in text
    assert "Probing" in text
    assert text.endswith("\x1b[2K")


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_LINE_S", 0.0)
    monkeypatch.setattr(module, "POLL_S", 0.01)


@pytest.mark.usefixtures("hurry")
def test_prefill_shows_what_the_engine_has_computed_since() -> None:
    lines = threading.Event()
    computed = iter([1000, *range(1100, 100_000, 100)])

    def stats() -> EngineStats:
        value = next(computed)
        if value >= 1500:
            lines.set()
        return EngineStats(computed_tokens=value)

    shown = console(terminal=False)
    with prefill_progress(shown, stats, 4000):
        assert lines.wait(30)
    assert "Reading 4,000 tokens: 2%" in text_of(shown)
    assert not [t for t in threading.enumerate() if t.name == "kvloom-progress"]


@pytest.mark.usefixtures("hurry")
def test_an_engine_that_ends_meanwhile_ends_the_progress_only() -> None:
    asked = threading.Event()
    answers = iter([EngineStats()])

    def stats() -> EngineStats:
        try:
            return next(answers)
        except StopIteration:
            asked.set()
            raise KvloomError("closed") from None

    shown = console(terminal=False)
    with prefill_progress(shown, stats, 10):
        assert asked.wait(30)
    assert text_of(shown) == ""


def test_short_work_asks_the_engine_once() -> None:
    calls: list[int] = []

    def stats() -> EngineStats:
        calls.append(1)
        return EngineStats()

    with prefill_progress(console(terminal=True), stats, 10):
        pass
    assert len(calls) == 1
