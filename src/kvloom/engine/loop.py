"""The loop: one thread that owns an engine, and the mailboxes of those who wait for it.

Knows: threads, and who waits for which request.
Does not know: asyncio or tokens; a mailbox is any function that takes a batch of events.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from kvloom.engine.engine import Engine
from kvloom.engine.request import Event, Failed
from kvloom.errors import KvloomError

logger = logging.getLogger(__name__)

T = TypeVar("T")
Mailbox = Callable[[Event], None]


class EngineLoop:
    """Runs an engine on a thread of its own; everybody else asks it to do things in between."""

    def __init__(self, engine: Engine, flush: Callable[[], None] | None = None) -> None:
        """Start the thread.

        Args:
            engine: nobody else may touch it from now on.
            flush: called after every step, when all its events are in their mailboxes.
        """
        self._engine = engine
        self._flush = flush or (lambda: None)
        self._tasks: deque[Callable[[], None]] = deque()
        self._mailboxes: dict[str, Mailbox] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._crash: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kvloom-engine", daemon=True)
        self._thread.start()

    def call(self, task: Callable[[Engine], T]) -> Future[T]:
        """Run a function on the engine between two steps.

        Raises:
            KvloomError: the engine was closed or has crashed.
        """
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(task(self._engine))
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            if self._crash is not None:
                raise KvloomError(
                    f"The engine has crashed ({self._crash}); restart it and report the log."
                ) from self._crash
            if self._stopping:
                raise KvloomError("The engine is closed; make a new one.")
            self._tasks.append(run)
            self._wake.notify()
        return future

    def submit(self, task: Callable[[Engine], str], mailbox: Mailbox) -> Future[str]:
        """Submit a request between two steps; its events go to the mailbox from then on."""

        def register(engine: Engine) -> str:
            request_id = task(engine)
            self._mailboxes[request_id] = mailbox
            return request_id

        return self.call(register)

    def cancel(self, request_id: str) -> None:
        """End a request between two steps; nothing more arrives for it."""

        def task(engine: Engine) -> None:
            self._mailboxes.pop(request_id, None)
            engine.cancel(request_id)

        try:
            self.call(task)
        except KvloomError:
            return  # a closed engine has ended everything already

    def stop(self) -> None:
        """End all requests and the thread; waits for a running step."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                while self._tasks:
                    self._tasks.popleft()()
                if self._engine.has_work:
                    self._deliver(self._engine.step())
                self._flush()
        except BaseException as error:
            logger.exception("the engine crashed")
            self._crash = error
        finally:
            self._end_everything()

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not (self._tasks or self._engine.has_work or self._stopping):
                self._wake.wait()
            return not self._stopping

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            mailbox = self._mailboxes.get(event.request_id)
            if mailbox is not None:
                mailbox(event)

    def _end_everything(self) -> None:
        with self._wake:
            self._stopping = True
            tasks, self._tasks = list(self._tasks), deque()
        reason = "was closed" if self._crash is None else f"crashed ({self._crash})"
        for request_id, mailbox in self._mailboxes.items():
            mailbox(Failed(request_id, KvloomError(f"The engine {reason}.")))
        self._flush()
        for task in tasks:
            task()
