"""A contender: one engine over the whole run, which may fail without ending it.

Knows: how a task becomes requests to a worker, and what is noted around them.
Does not know: the other contenders.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from kvloom import KvloomError
from kvloom.bench.machine import other_cores, read_cpu, resident_bytes
from kvloom.bench.peers.conversion import prepare_model
from kvloom.bench.peers.registry import Engine
from kvloom.bench.peers.wire import (
    CompleteRequest,
    Loaded,
    LoadRequest,
    Progress,
    RememberRequest,
)
from kvloom.bench.prompts import RoundPrompts
from kvloom.bench.results import EngineReport, Sample
from kvloom.bench.tasks import Task
from kvloom.bench.worker import WorkerError, WorkerProcess


class Contender:
    """An engine that is started once and then measured round by round.

    Attributes:
        name: of the engine.
    """

    def __init__(self, engine: Engine, timeout_s: float) -> None:
        self.name = engine.name
        self._engine = engine
        self._timeout_s = timeout_s
        self._worker: WorkerProcess | None = None
        self._load_request: LoadRequest | None = None
        self._loaded: Loaded | None = None
        self._ready_s: float | None = None
        self._ready_rss_bytes: int | None = None
        self._failure: str | None = None

    def start(self, request: LoadRequest, progress: Progress | None = None) -> None:
        """Start the process and wait until it is ready; a failure is kept for the report.

        Before that the model is converted, if the engine needs that; this is not timed.
        """
        try:
            request = self._prepared(request, _silent if progress is None else progress)
            self._load_request = request
            self._worker = self._new_worker()
            self._loaded = self._worker.load(request)
        except KvloomError as error:
            self._failure = str(error)
            return
        self._ready_s = time.perf_counter() - self._worker.started_at
        self._ready_rss_bytes = resident_bytes(self._worker.pid)

    def offers(self, task: Task) -> bool:
        """Whether the engine can do such a thing; of one that is not there nothing is known."""
        return self._loaded is None or task.way in self._loaded.ways

    def run(
        self, task: Task, prompts: RoundPrompts, *, warm_up: bool
    ) -> tuple[Sample, list[list[int]]]:
        """Run a task once; return its times and the generated tokens.

        Raises:
            WorkerError: the engine failed, now or before.
        """
        worker = self._worker
        if worker is None or self._failure is not None:
            raise WorkerError(self._failure or f"{self.name} was not started")
        remembered = RememberRequest(tokens=list(prompts.remembered))
        if task.way == "restarted":
            return self._run_restarted(remembered, _completion_request(task, prompts))
        try:
            # A text that is edited is remembered as it was before each edit.
            if prompts.remembered and (warm_up or task.edited_tokens):
                worker.remember(remembered)
            return _complete(worker, _completion_request(task, prompts))
        except WorkerError as error:
            if not worker.alive:
                self._failure = str(error)
            raise

    def _run_restarted(
        self, remembered: RememberRequest, request: CompleteRequest
    ) -> tuple[Sample, list[list[int]]]:
        """Complete what another process of the engine has computed and kept, that is over."""
        assert self._load_request is not None
        with TemporaryDirectory(prefix="kvloom-bench-") as folder:
            load = replace(self._load_request, store=folder)
            with closing(self._new_worker()) as before:
                before.load(load)
                before.remember(remembered)
            with closing(self._new_worker()) as worker:
                worker.load(load)
                return _complete(worker, request)

    def report(self) -> EngineReport:
        """Return what is known about the engine by now."""
        loaded = self._loaded
        return EngineReport(
            name=self.name,
            versions={} if loaded is None else loaded.versions,
            dtype=None if loaded is None else loaded.dtype,
            format=self._engine.format,
            threads=None if loaded is None else loaded.threads,
            ready_s=self._ready_s,
            ready_rss_bytes=self._ready_rss_bytes,
            peak_rss_bytes=None if self._worker is None else self._worker.peak_rss_bytes,
            failure=self._failure,
        )

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()

    def _new_worker(self) -> WorkerProcess:
        return WorkerProcess(self.name, self._engine.command, self._timeout_s)

    def _prepared(self, request: LoadRequest, progress: Progress) -> LoadRequest:
        """Return the request with the model as this engine reads it."""
        if self._engine.missing is not None:
            raise WorkerError(self._engine.missing)
        if self._engine.home is None:
            return request
        model = prepare_model(self._engine.home, Path(request.model), progress)
        return replace(request, model=str(model))


def _completion_request(task: Task, prompts: RoundPrompts) -> CompleteRequest:
    return CompleteRequest(
        prompts=[list(prompt) for prompt in prompts.prompts],
        new_tokens=task.new_tokens,
        shared_tokens=prompts.shared_tokens,
        way=task.way,
    )


def _complete(worker: WorkerProcess, request: CompleteRequest) -> tuple[Sample, list[list[int]]]:
    """Have prompts completed, and note what the machine did meanwhile."""
    before = read_cpu(worker.pid)
    done = worker.complete(request)
    after = read_cpu(worker.pid)
    sample = Sample(
        prompt_tokens=sum(map(len, request.prompts)),
        new_tokens=sum(map(len, done.token_ids)),
        first_token_s=done.first_token_s,
        total_s=done.total_s,
        cached_tokens=done.cached_tokens,
        other_cores=other_cores(before, after),
    )
    return sample, done.token_ids


def _silent(description: str, done: int, total: int) -> None:
    return None
