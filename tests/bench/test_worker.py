"""A worker that dies, hangs or talks nonsense is a named error, and never an orphan."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from kvloom.bench import worker as worker_module
from kvloom.bench.peers.wire import (
    CompleteRequest,
    LoadRequest,
    RememberRequest,
    TokenizeRequest,
)
from kvloom.bench.worker import WorkerError, WorkerProcess

from .fakes import fake_command

LOAD = LoadRequest(model="default", dtype="float32", threads=None, kv_memory="1MiB")
COMPLETE = CompleteRequest(prompts=[[1, 2, 3], [4]], new_tokens=2)
Start = Callable[..., WorkerProcess]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[WorkerProcess] = []

    def start_one(timeout_s: float = 30.0, **settings: Any) -> WorkerProcess:
        started.append(WorkerProcess("fake", fake_command(**settings), timeout_s))
        return started[-1]

    yield start_one
    for process in started:
        process.close()
        assert not psutil.pid_exists(process.pid)


def test_every_request_has_its_answer(start: Start) -> None:
    process = start()
    told: list[tuple[str, int, int]] = []
    assert process.peak_rss_bytes is None
    loaded = process.load(
        LOAD, lambda description, done, total: told.append((description, done, total))
    )
    assert (loaded.dtype, loaded.threads, loaded.versions) == ("float32", 2, {"fake": "1.0"})
    assert told == [("Loading", 1, 2), ("Loading", 2, 2)]
    assert process.tokenize(TokenizeRequest(text="ab")).tokens == [97, 98]
    process.remember(RememberRequest(tokens=[1]))
    assert process.complete(COMPLETE).token_ids == [[6, 7], [4, 5]]
    assert process.peak_rss_bytes == 1000
    assert process.alive


def test_an_error_is_told_and_the_worker_goes_on(start: Start) -> None:
    process = start(fault="raise", from_width=3)
    with pytest.raises(WorkerError, match="ValueError: no such thing"):
        process.complete(COMPLETE)
    assert process.complete(CompleteRequest(prompts=[[4]], new_tokens=1)).token_ids == [[4]]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("die", "ended with status 3: MemoryError: all gone"),
        ("killed", f"ended with status -{int(signal.SIGKILL)}: it wrote no error"),
        ("garbage", "no answer: Hello, I am a library"),
        ("list", r"no answer: \[1, 2\]"),
        ("hang", "did not answer 'complete' within 0.5 s"),
    ],
)
def test_a_worker_that_cannot_go_on_is_ended(start: Start, fault: str, reason: str) -> None:
    process = start(timeout_s=0.5 if fault == "hang" else 30.0, fault=fault)
    with pytest.raises(WorkerError, match=reason):
        process.complete(COMPLETE)
    with pytest.raises(WorkerError, match="the process of fake ended"):
        process.complete(COMPLETE)
    assert not process.alive


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("other", "answered 'complete' with something else"),
        ("empty", "answered 'complete' with something else"),
        ("short", r"generated \[0\] tokens; 2 for each of 2 prompts"),
        ("negative", "-1.0 s .* which cannot be"),
        ("backwards", "2.0 s .* which cannot be"),
        ("instant", "1.0 s .* which cannot be"),
    ],
)
def test_an_answer_that_cannot_be_is_an_error(start: Start, fault: str, reason: str) -> None:
    process = start(fault=fault, from_width=3)
    with pytest.raises(WorkerError, match=reason):
        process.complete(COMPLETE)
    assert process.complete(CompleteRequest(prompts=[[4]], new_tokens=1)).token_ids == [[4]]


def test_a_program_that_is_missing_is_an_error() -> None:
    with pytest.raises(WorkerError, match="gone cannot be started"):
        WorkerProcess("gone", ("there-is-no-such-program",), 1.0)


def test_a_worker_that_ignores_both_signals_to_end_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_module, "_END_S", 0.2)
    process = WorkerProcess("fake", fake_command(stubborn=True), 30.0)
    process.tokenize(TokenizeRequest(text="ab"))
    process.close()
    assert not process.alive
    process.close()  # again


def test_a_worker_ends_when_the_bench_is_killed() -> None:
    program = (
        "import sys, time\n"
        "from kvloom.bench.worker import WorkerProcess\n"
        "print(WorkerProcess('fake', tuple(sys.argv[1:]), 30.0).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, *fake_command()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        pid = int(bench.stdout.readline())
        assert psutil.pid_exists(pid)
        os.kill(bench.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def test_an_interrupt_ends_a_worker_that_computes(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start(fault="hang")

    def interrupt(timeout: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "_lines", SimpleNamespace(get=interrupt, put=lambda line: None))
    with pytest.raises(KeyboardInterrupt):
        process.complete(COMPLETE)
    process.close()
    assert not process.alive


def test_an_interrupt_from_the_keyboard_does_not_reach_a_worker(start: Start) -> None:
    assert os.getsid(start().pid) != os.getsid(0)


def test_a_large_request_and_much_noise_on_standard_error_do_not_block(start: Start) -> None:
    process = start()
    text = "x" * 2_000_000
    assert len(process.tokenize(TokenizeRequest(text=text)).tokens) == len(text)
    noise = (
        "import sys\nfor line in sys.stdin:\n  sys.stderr.write('x' * 1_000_000)\n  print('{}')\n"
    )
    with closing(WorkerProcess("noisy", (sys.executable, "-uc", noise), 30.0)) as noisy:
        with pytest.raises(WorkerError, match="something else"):
            noisy.load(LOAD)
        assert noisy.alive


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
