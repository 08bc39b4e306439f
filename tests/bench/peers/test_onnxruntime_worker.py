"""ONNX Runtime's worker pads on the right, and rewinds what it keeps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvloom.bench.peers.onnxruntime_worker import OnnxRuntimeWorker, operations

from .fake_engines import VOCABULARY, FakeGenerator, onnxruntime_module
from .laws import EDITED, PROMPTS, ask, check_worker, load_fields


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OnnxRuntimeWorker:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", onnxruntime_module())
    # One more than the rule's, so that no generated token is the padding.
    settings = {"model": {"vocab_size": VOCABULARY + 1, "pad_token_id": 2}}
    (tmp_path / "genai_config.json").write_text(json.dumps(settings))
    worker = OnnxRuntimeWorker()
    loaded = worker.load(load_fields(str(tmp_path)))
    assert loaded.threads == 3
    changes = worker._model.changes
    assert changes["eos_token_id"] == changes["pad_token_id"] == VOCABULARY
    assert changes["decoder"]["session_options"]["intra_op_num_threads"] == 3
    return worker


def test_its_tokens_are_those_of_the_rule(worker: OnnxRuntimeWorker) -> None:
    check_worker(worker)


def test_only_what_is_new_is_computed(worker: OnnxRuntimeWorker) -> None:
    worker.remember({"tokens": PROMPTS[2]})
    before = FakeGenerator.computed
    assert worker.complete(ask([EDITED], shared_tokens=3)).cached_tokens == 3
    assert FakeGenerator.computed - before == len(EDITED) - 3


def test_the_worker_answers_these_requests() -> None:
    assert set(operations(lambda *_: None)) == {"load", "remember", "complete"}
