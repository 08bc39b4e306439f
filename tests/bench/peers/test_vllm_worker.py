"""vLLM's worker sets what vLLM reads, adds all requests and steps to their end."""

from __future__ import annotations

import os
import sys

import pytest

from kvloom.bench.peers.vllm_worker import VllmWorker, operations

from .fake_engines import FakeVllm
from .laws import PROMPTS, ask, check_worker, load_fields


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    fake = FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", fake.module())
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {7, 3, 5})
    return fake


def test_its_tokens_are_those_of_the_rule(fake: FakeVllm) -> None:
    worker = VllmWorker()
    loaded = worker.load(load_fields(threads=2))
    assert loaded.dtype == fake.settings["dtype"] == "bfloat16"
    assert fake.settings["kv_cache_memory_bytes"] == 2**20
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "3,5"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    check_worker(worker)


def test_reused_tokens_are_counted(fake: FakeVllm) -> None:
    worker = VllmWorker()
    worker.load(load_fields())
    assert worker.complete(ask(PROMPTS)).cached_tokens == 8


def test_the_worker_answers_these_requests() -> None:
    assert set(operations(lambda *_: None)) == {"load", "remember", "complete"}
