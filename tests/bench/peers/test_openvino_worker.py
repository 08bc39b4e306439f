"""OpenVINO's worker adds all requests and steps to their end."""

from __future__ import annotations

import sys

import pytest

from kvloom.bench.peers.openvino_worker import OpenVinoWorker, operations

from .fake_engines import openvino_modules
from .laws import check_worker, load_fields


def test_its_tokens_are_those_of_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in openvino_modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    worker = OpenVinoWorker()
    loaded = worker.load(load_fields())
    assert loaded.threads == 3
    assert loaded.versions == {"openvino": "1.2", "openvino-genai": "1.2.3"}
    folder, scheduler, device, properties = worker._pipeline.settings
    assert (folder, device) == ("folder", "CPU")
    assert scheduler.enable_prefix_caching
    assert properties == {"INFERENCE_NUM_THREADS": 3}
    check_worker(worker)


def test_the_worker_answers_these_requests() -> None:
    assert set(operations(lambda *_: None)) == {"load", "remember", "complete"}
