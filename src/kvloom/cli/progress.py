"""Shows how far long work has come: bars on a terminal, a line now and then elsewhere.

Knows: rich's bars, and when a line is worth printing.
Does not know: what is being done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING

from rich.console import Console

from kvloom.errors import KvloomError

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

    from kvloom.model.digest import Progress
    from kvloom.outputs import EngineStats

FIRST_LINE_S = 1.0
"""Work that is over sooner is not mentioned."""
LINE_EVERY_S = 5.0
POLL_S = 0.25


@contextmanager
def long_work(console: Console, description: str, then: str = "") -> Iterator[Progress]:
    """Show progress until the block ends; the value is what takes note of it.

    Args:
        console: standard error.
        description: shown until the work speaks for itself.
        then: shown when a part is complete and the next one has not begun.
    """
    if not console.is_interactive:
        yield PlainLines(console.print)
        return
    from rich import progress

    with progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as shown:
        bar = OneBar(shown, then)
        bar(description, 0, 0)
        yield bar


class OneBar:
    """Shows one bar at a time; a new description begins a new one."""

    def __init__(self, shown: Bars, then: str = "") -> None:
        self._shown = shown
        self._then = then
        self._task: TaskID | None = None
        self._described = ("", False)

    def __call__(self, description: str, done: int, total: int) -> None:
        """Take note of `done` out of `total`."""
        if self._then and done >= total > 0:
            description, done, total = self._then, 0, 0
        if self._described != (description, total > 0):
            if self._task is not None:
                self._shown.remove_task(self._task)
            # A bar cannot go back to an unknown total, so it is a new one.
            self._task = self._shown.add_task(description, total=total or None)
            self._described = (description, total > 0)
        assert self._task is not None
        self._shown.update(self._task, completed=done, total=total or None)


class PlainLines:
    """Prints a line without control codes when work has taken a while, and then now and then."""

    def __init__(
        self, print_line: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._print_line = print_line
        self._clock = clock
        self._next_line = clock() + FIRST_LINE_S

    def __call__(self, description: str, done: int, total: int) -> None:
        """Take note of `done` out of `total`."""
        if (now := self._clock()) < self._next_line:
            return
        self._next_line = now + LINE_EVERY_S
        self._print_line(f"{description}: {done / total:.0%}" if total else f"{description} ...")


@contextmanager
def prefill_progress(
    console: Console, stats: Callable[[], EngineStats], num_tokens: int
) -> Iterator[None]:
    """Show how much of a prompt has been computed, if it takes longer than a moment.

    Args:
        console: standard error.
        stats: asks the engine; may be called from another thread.
        num_tokens: tokens of the prompt.
    """
    done = Event()
    before = stats().computed_tokens

    def show() -> None:
        if done.wait(FIRST_LINE_S):
            return
        description = f"Reading {num_tokens:,} tokens"
        with long_work(console, description) as report:
            while not done.wait(POLL_S):
                try:
                    computed = stats().computed_tokens - before
                except KvloomError:
                    return  # the one who waits for the answer is told
                report(description, min(computed, num_tokens), num_tokens)

    watcher = Thread(target=show, name="kvloom-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
