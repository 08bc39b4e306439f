"""The loop: one thread that owns an engine, and the mailboxes of those who wait for it.

Knows: threads, and who waits for which request.
Does not know: asyncio or tokens; a mailbox is any function that takes a batch of events.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from kvloom.engine.engine import Engine
from kvloom.engine.request import Event, Failed
from kvloom.errors import CapacityError, KvloomError
from kvloom.kv.doc import KVDoc
from kvloom.ops.native.heap import release_freed_memory
from kvloom.outputs import StreamChunk

logger = logging.getLogger(__name__)

T = TypeVar("T")
TIDY_AFTER_S = 1.0
"""So long after its last work, memory that the work needed for a while goes back to the system."""
Mailbox = Callable[[Event], None]
Submission = Callable[[Engine], str]


class EngineLoop:
    """Runs an engine on a thread of its own; everybody else asks it to do things in between."""

    def __init__(
        self, build: Callable[[], Engine], flush: Callable[[], Iterable[str]] | None = None
    ) -> None:
        """Start the thread and wait until it has built its engine.

        The thread builds the engine itself: every thread that computes gets workers of its own
        from OpenMP, and where these outnumber the cores none of them waits awake any more.

        Args:
            build: makes the engine, which nobody else may touch; what it raises is raised here.
            flush: called after every step, when all its events are in their mailboxes; returns
                the requests whose receivers are gone.
        """
        self._flush = flush or (lambda: ())
        self._process = os.getpid()
        self._tasks: deque[tuple[Future[Any], Callable[[Engine], Any]]] = deque()
        self._mailboxes: dict[str, Mailbox] = {}
        self._wake = threading.Condition()
        self._stopping = False
        self._crash: BaseException | None = None
        built: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(build, built), name="kvloom-engine", daemon=True
        )
        self._thread.start()
        self._engine = built.result()

    def call(self, task: Callable[[Engine], T]) -> Future[T]:
        """Run a function on the engine between two steps.

        Raises:
            KvloomError: the engine was closed or has crashed, or this process was forked from the
                one that it runs in.
        """
        if os.getpid() != self._process:
            raise KvloomError(
                "The engine's thread did not come along when this process was forked; make the "
                "engine after the fork, or start processes with the method 'spawn'."
            )
        future: Future[T] = Future()
        with self._wake:
            if self._crash is not None:
                raise KvloomError(
                    f"The engine has crashed ({self._crash}); restart it and report the log."
                ) from self._crash
            if self._stopping:
                raise KvloomError("The engine is closed; make a new one.")
            self._tasks.append((future, task))
            self._wake.notify()
        return future

    def submit(self, tasks: Sequence[Submission], mailbox: Mailbox) -> Future[list[str]]:
        """Submit requests between two steps, in order, as many as may wait; return their ids.

        Their events go to the mailbox from then on. If one is wrong, none is submitted. The first
        one's `CapacityError` is raised; another's leaves it and those behind it out.
        """

        def register(engine: Engine) -> list[str]:
            request_ids: list[str] = []
            try:
                for task in tasks:
                    request_ids.append(task(engine))
            except CapacityError:
                if not request_ids:
                    raise
            except BaseException:
                for request_id in request_ids:
                    engine.cancel(request_id)
                raise
            self._mailboxes.update(dict.fromkeys(request_ids, mailbox))
            return request_ids

        return self.call(register)

    def submit_and_wait(self, tasks: Sequence[Submission], mailbox: Mailbox) -> list[str]:
        """Submit requests and return their ids; an interrupted wait cancels them."""
        submitted = self.submit(tasks, mailbox)
        try:
            return submitted.result()
        except BaseException:
            self.cancel_submitted(submitted)
            raise

    def cancel_submitted(self, submitted: Future[list[str]]) -> None:
        """End requests that may not have their ids yet."""

        def cancel(done: Future[list[str]]) -> None:
            if not done.cancelled() and done.exception() is None:
                for request_id in done.result():
                    self.cancel(request_id)

        submitted.cancel()
        submitted.add_done_callback(cancel)

    def cancel(self, request_id: str) -> None:
        """End a request between two steps; nothing more arrives for it."""

        try:
            self.call(lambda engine: self._cancel_now(engine, request_id))
        except KvloomError:
            return  # a closed engine has ended everything already

    def abandon(self, doc: KVDoc) -> None:
        """Let go of a document soon, without waiting; may be called by a garbage collector."""
        self._engine.abandon(doc)

    def stop(self) -> None:
        """End all requests and the thread; waits for a running step."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self, build: Callable[[], Engine], built: Future[Engine]) -> None:
        try:
            self._engine = build()
        except BaseException as error:
            built.set_exception(error)
            return
        built.set_result(self._engine)
        try:
            while self._wait_for_work():
                while self._tasks:
                    self._do(*self._tasks.popleft())
                if self._engine.has_work:
                    self._deliver(self._engine.step())
                elif self._engine.idle.has_work:
                    self._engine.step_idle()
                for request_id in self._flush():
                    self._cancel_now(self._engine, request_id)
        except BaseException as error:
            logger.exception("the engine crashed")
            self._crash = error
        finally:
            self._end_everything()

    def _wait_for_work(self) -> bool:
        tidy = False
        with self._wake:
            while not (self._tasks or self._stopping or self._engine.is_busy):
                begins_in_s = self._engine.idle.begins_in_s
                if begins_in_s is not None:
                    self._wake.wait(begins_in_s)
                elif not self._wake.wait(None if tidy else TIDY_AFTER_S):
                    release_freed_memory()
                    tidy = True
            return not self._stopping

    def _do(self, future: Future[Any], task: Callable[[Engine], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(task(self._engine))
        except BaseException as error:
            future.set_exception(error)

    def _cancel_now(self, engine: Engine, request_id: str) -> None:
        self._mailboxes.pop(request_id, None)
        engine.cancel(request_id)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            last = not isinstance(event, StreamChunk) or event.usage is not None
            find = self._mailboxes.pop if last else self._mailboxes.get
            mailbox = find(event.request_id, None)
            if mailbox is not None:
                mailbox(event)

    def _end_everything(self) -> None:
        with self._wake:
            self._stopping = True
            tasks, self._tasks = list(self._tasks), deque()
        reason = "was closed" if self._crash is None else f"crashed ({self._crash})"
        for request_id, mailbox in self._mailboxes.items():
            mailbox(Failed(request_id, KvloomError(f"The engine {reason}.")))
        self._mailboxes.clear()
        self._flush()
        for future, _ in tasks:
            if future.set_running_or_notify_cancel():
                future.set_exception(KvloomError(f"The engine {reason}."))
        if self._crash is None:
            self._engine.close()
