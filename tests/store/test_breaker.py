"""The breaker: what fails or hangs is left out for a while, and tried again."""

from __future__ import annotations

import logging
import time
from threading import Event

import pytest

from kvloom.store.breaker import MAX_FAILURES, Breaker
from kvloom.store.tier import Tally


@pytest.fixture
def tally():
    return Tally(logging.getLogger("test"))


def fail() -> int:
    raise ConnectionError("gone")


def test_failures_in_a_row_pause_calls(tally, caplog):
    breaker = Breaker("remote", tally, 5.0, 1000.0)
    for _ in range(MAX_FAILURES - 1):
        assert breaker.call(fail, -1) == -1
    assert breaker.call(lambda: 1, -1) == 1  # a success starts the count anew
    for _ in range(MAX_FAILURES):
        assert breaker.call(fail, -1) == -1
    assert breaker.call(lambda: 1, -1) == -1
    assert tally.statistics().errors == 2 * MAX_FAILURES - 1
    assert tally.statistics().skipped == 1
    assert caplog.text.count("gone") == 1
    breaker.close()


def test_after_a_pause_one_failure_is_enough(tally):
    breaker = Breaker("remote", tally, 5.0, 0.05)
    for _ in range(MAX_FAILURES):
        breaker.call(fail, -1)
    time.sleep(0.06)
    assert breaker.call(fail, -1) == -1
    assert breaker.call(lambda: 1, -1) == -1
    assert tally.statistics().skipped == 1
    time.sleep(0.06)
    assert breaker.call(lambda: 1, -1) == 1
    breaker.close()


def test_a_call_that_hangs_costs_its_time_once(tally):
    breaker, gate = Breaker("remote", tally, 0.05, 0.2), Event()
    assert breaker.call(lambda: gate.wait(20), None) is None
    for _ in range(100):
        assert breaker.call(lambda: 1, None) is None
    assert tally.statistics().errors == 1
    assert tally.statistics().skipped == 100
    gate.set()
    time.sleep(0.25)
    assert breaker.call(lambda: 1, None) == 1
    breaker.close()
    assert breaker.call(lambda: 1, None) is None
