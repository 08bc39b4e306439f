"""Calls that may hang or fail: they end in bounded time, and are left out while they would fail.

Knows: time limits, failures in a row, and pauses.
Does not know: what is called.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from threading import Lock
from typing import TypeVar

from kvloom.store.tier import Tally
from kvloom.store.worker import Worker

T = TypeVar("T")
MAX_FAILURES = 3
"""Failures in a row after which calls pause; a call that runs out of time pauses them at once."""


class Breaker:
    """Runs calls on a thread of its own.

    Args:
        name: of what is called, in messages.
        tally: counts `errors` and `skipped` calls.
        timeout_s: seconds that a call may take.
        pause_s: seconds for which calls are left out after failures.
    """

    def __init__(self, name: str, tally: Tally, timeout_s: float, pause_s: float) -> None:
        self._name = name
        self._tally = tally
        self._timeout_s = timeout_s
        self._pause_s = pause_s
        self._failures = 0
        self._resume_at = 0.0
        self._lock = Lock()
        self._worker = Worker(f"kvloom-{name}", max_waiting=16)

    def call(self, work: Callable[[], T], otherwise: T) -> T:
        """Return what the call returns, or `otherwise` if it fails or is not tried."""
        if time.monotonic() < self._resume_at:
            self._tally.add("skipped")
            return otherwise
        future = self._worker.submit(work)
        if future is None:  # the thread hangs in an earlier call
            self._fail("it does not answer", at_once=True)
            return otherwise
        try:
            result = future.result(self._timeout_s)
        except FutureTimeoutError:
            future.cancel()
            self._fail(f"no answer in {self._timeout_s} s", at_once=True)
            return otherwise
        except Exception as error:  # each file system has errors of its own
            self._fail(f"{type(error).__name__}: {error}", at_once=False)
            return otherwise
        with self._lock:
            self._failures = 0
        return result

    def close(self) -> None:
        """Take no more calls."""
        self._worker.close(0.0)

    def _fail(self, reason: str, *, at_once: bool) -> None:
        self._tally.add("errors")
        self._tally.say_once("call", "the store %s fails (%s)", self._name, reason)
        with self._lock:
            self._failures += 1
            if at_once or self._failures >= MAX_FAILURES:
                self._resume_at = time.monotonic() + self._pause_s
