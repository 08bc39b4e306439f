"""CTranslate2's worker speaks in words, and reuses a start whole or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from kvloom.bench.peers.ctranslate2_worker import CTranslate2Worker, operations

from .fake_engines import VOCABULARY, ctranslate2_module
from .laws import EDITED, PROMPTS, ask, check_worker, load_fields


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CTranslate2Worker:
    monkeypatch.setitem(sys.modules, "ctranslate2", ctranslate2_module())
    words = [f"w{token}" for token in range(VOCABULARY)]
    (tmp_path / "vocabulary.json").write_text(json.dumps(words))
    worker = CTranslate2Worker()
    loaded = worker.load(load_fields(str(tmp_path)))
    assert (loaded.dtype, loaded.threads) == ("int8_float32", 3)
    assert worker._generator.settings["intra_threads"] == 3
    return worker


def test_its_tokens_are_those_of_the_rule(worker: CTranslate2Worker) -> None:
    check_worker(worker)


def test_a_start_is_reused_whole_or_not_at_all(worker: CTranslate2Worker) -> None:
    worker.remember({"tokens": PROMPTS[2][:4]})
    assert worker.complete(ask([PROMPTS[2]], shared_tokens=4)).cached_tokens == 3
    worker.remember({"tokens": PROMPTS[2]})
    assert worker.complete(ask([EDITED], shared_tokens=3)).cached_tokens == 0
    assert [len(static or ()) for static in worker._generator.static] == [3, 3, 6, 0]


def test_the_worker_answers_these_requests() -> None:
    assert set(operations(lambda *_: None)) == {"load", "remember", "complete"}
