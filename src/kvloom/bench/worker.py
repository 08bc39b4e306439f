"""A worker process seen from the bench: start, ask, give up, end.

Knows: processes, lines and timeouts.
Does not know: tasks, or what the engine behind the process is.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from queue import Empty, SimpleQueue
from typing import IO, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from kvloom import KvloomError
from kvloom.bench.peers.wire import (
    CompleteRequest,
    Completion,
    Loaded,
    LoadRequest,
    Progress,
    Remembered,
    RememberRequest,
    Tokenized,
    TokenizeRequest,
)

Answer = TypeVar("Answer")

_END_S = 10.0
_SHOWN_CHARACTERS = 300


class WorkerError(KvloomError):
    """An engine could not be started, failed, or did not answer in time."""


class WorkerProcess:
    """One engine in a process of its own.

    Attributes:
        started_at: when the process was started, on `time.perf_counter`.
        peak_rss_bytes: most memory the process had up to its last answer; None before the first.

    Raises:
        WorkerError: the program cannot be started.
    """

    def __init__(self, name: str, command: tuple[str, ...], timeout_s: float) -> None:
        self.peak_rss_bytes: int | None = None
        self._name = name
        self._timeout_s = timeout_s
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed by close()
        self.started_at = time.perf_counter()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
                errors="replace",
                # An interrupt from the keyboard is for the bench, which then ends its workers.
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise WorkerError(f"{name} cannot be started: {error}.") from error
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"read {name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def load(self, request: LoadRequest, progress: Progress | None = None) -> Loaded:
        """Make the engine ready.

        Raises:
            WorkerError: it failed.
        """
        return self._ask("load", request, Loaded, progress)

    def tokenize(self, request: TokenizeRequest) -> Tokenized:
        """Return the tokens of a text.

        Raises:
            WorkerError: it failed.
        """
        return self._ask("tokenize", request, Tokenized)

    def remember(self, request: RememberRequest) -> Remembered:
        """Have the KV of tokens computed and kept.

        Raises:
            WorkerError: it failed.
        """
        return self._ask("remember", request, Remembered)

    def complete(self, request: CompleteRequest) -> Completion:
        """Have prompts completed, and check that the whole work was done.

        Raises:
            WorkerError: it failed, or did less or claims other times than can be.
        """
        done = self._ask("complete", request, Completion)
        counts = [len(tokens) for tokens in done.token_ids]
        if counts != [request.new_tokens] * len(request.prompts):
            raise WorkerError(
                f"{self._name} generated {counts} tokens; "
                f"{request.new_tokens} for each of {len(request.prompts)} prompts were asked for."
            )
        in_order = 0 < done.first_token_s <= done.total_s < float("inf")
        if not in_order or (request.new_tokens > 1 and done.first_token_s == done.total_s):
            raise WorkerError(
                f"{self._name} says that its first token took {done.first_token_s} s "
                f"and the last {done.total_s} s, which cannot be."
            )
        return done

    def close(self) -> None:
        """End the process: it is asked, then told, then killed."""
        if self._process.stdin is not None:
            with suppress(OSError):  # it has ended before it read the last request
                self._process.stdin.close()
        for harder in (self._process.terminate, self._process.kill):
            try:
                self._process.wait(_END_S)
                break
            except subprocess.TimeoutExpired:
                harder()
        self._process.wait()
        self._reader.join(_END_S)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()
        self._errors.close()

    def _ask(
        self, name: str, request: Any, kind: type[Answer], progress: Progress | None = None
    ) -> Answer:
        self._send({"do": name, **asdict(request)})
        deadline = time.perf_counter() + self._timeout_s
        while True:
            reply = self._next_reply(name, deadline)
            if "progress" not in reply:
                break
            if progress is not None:
                progress(*reply["progress"])
        self.peak_rss_bytes = reply.get("peak_rss_bytes", self.peak_rss_bytes)
        if "error" in reply:
            raise WorkerError(_shorten(str(reply["error"])))
        try:
            return TypeAdapter(kind).validate_python(reply.get("answer"))
        except ValidationError as error:
            raise WorkerError(
                f"{self._name} answered {name!r} with something else: {_shorten(str(error))}"
            ) from error

    def _send(self, message: dict[str, Any]) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
        except (OSError, ValueError):
            raise self._ended() from None

    def _next_reply(self, name: str, deadline: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(0.0, deadline - time.perf_counter()))
        except KeyboardInterrupt:
            self._process.kill()  # it may compute for long before it listens again
            raise
        except Empty:
            self._process.kill()
            raise WorkerError(
                f"{self._name} did not answer {name!r} within {self._timeout_s:g} s "
                "and was ended; raise the timeout if this machine is slow."
            ) from None
        if line is None:
            raise self._ended()
        try:
            reply = json.loads(line)
        except json.JSONDecodeError:
            reply = None
        if not isinstance(reply, dict):
            self._process.kill()  # where its next answer starts can no longer be known
            raise WorkerError(f"{self._name} wrote something that is no answer: {_shorten(line)}")
        return reply

    def _ended(self) -> WorkerError:
        try:
            status = f"status {self._process.wait(_END_S)}"
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = "its output closed"
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace").strip()
        last = text.splitlines()[-1] if text else "it wrote no error"
        return WorkerError(f"the process of {self._name} ended with {status}: {_shorten(last)}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"
