"""The background thread: in order, bounded, and it never holds up an end."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from threading import Event

import pytest

from kvloom.store.worker import Worker


def test_tasks_run_in_order_and_errors_end_in_their_futures():
    worker = Worker("test", 100)
    done: list[int] = []
    futures = [worker.submit(lambda index=index: done.append(index)) for index in range(20)]
    failing = worker.submit(lambda: 1 // 0)
    assert worker.drain(5)
    assert done == list(range(20))
    assert all(future is not None and future.done() for future in futures)
    with pytest.raises(ZeroDivisionError):
        failing.result(5)
    assert worker.submit(lambda: 7).result(5) == 7
    assert worker.close(5)


def test_what_waits_is_bounded_by_size():
    worker, gate, started = Worker("test", 10), Event(), Event()
    first = worker.submit(lambda: (started.set(), gate.wait(10)), size=50)
    assert first is not None, "one task is always taken"
    started.wait(10)
    assert worker.submit(int, size=1) is None
    assert worker.submit(int, size=1, must=True) is not None
    assert worker.num_tasks == 2
    assert not worker.drain(0.01)
    gate.set()
    assert worker.drain(5)
    assert worker.submit(int, size=4) is not None
    assert worker.close(5)


def test_closing_takes_bounded_time_and_no_more_tasks():
    worker, gate = Worker("test", 10), Event()
    worker.submit(lambda: gate.wait(10))
    assert not worker.close(0.05)
    assert worker.submit(int, must=True) is None
    gate.set()
    assert worker.drain(5)


def test_tasks_are_let_go():
    class Held:
        pass

    worker, held = Worker("test", 10), Held()
    seen = weakref.ref(held)
    worker.submit(lambda held=held: None)
    del held
    assert worker.drain(5)
    gc.collect()
    assert seen() is None
    worker.close(5)


def test_a_task_that_hangs_does_not_keep_a_program_from_ending():
    code = """
from threading import Event
from kvloom.store.worker import Worker
worker = Worker("test", 10)
worker.submit(Event().wait)
assert not worker.close(0.01)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
