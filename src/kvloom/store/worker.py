"""A thread that works in the background, in order, with a bound on what may wait for it.

Knows: tasks, their sizes, and how to end in bounded time.
Does not know: what the tasks do.

Executors of the standard library are joined when a program ends; a call that hangs in a remote
store would then hang the program. This thread is a daemon.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Any, TypeVar

T = TypeVar("T")


class Worker:
    """Runs tasks one after the other.

    Args:
        name: of the thread.
        max_waiting: sum of the sizes that may wait; one task is always taken.
    """

    def __init__(self, name: str, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting = 0
        self._num_tasks = 0
        self._closed = False
        self._changed = Condition()
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any], int] | None] = SimpleQueue()
        Thread(target=self._work, name=name, daemon=True).start()

    def submit(
        self, task: Callable[[], T], *, size: int = 1, must: bool = False
    ) -> Future[T] | None:
        """Queue a task; None if too much waits already (unless it must be run), or if closed."""
        with self._changed:
            full = self._num_tasks > 0 and self._waiting + size > self._max_waiting
            if self._closed or (full and not must):
                return None
            self._waiting += size
            self._num_tasks += 1
            future: Future[T] = Future()
            self._queue.put((future, task, size))
        return future

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing is left to do; say whether that was so in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._num_tasks, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Take no more tasks and wait for those that are left; say whether all were done."""
        with self._changed:
            self._closed = True
        done = self.drain(timeout_s)
        self._queue.put(None)
        return done

    @property
    def num_tasks(self) -> int:
        """Tasks that wait or run."""
        return self._num_tasks

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            future, task, size = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(task())
                except BaseException as error:
                    future.set_exception(error)
            del future, task, item  # a task may hold a chunk
            with self._changed:
                self._waiting -= size
                self._num_tasks -= 1
                self._changed.notify_all()
