from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kvloom import LLM
from kvloom.config import EngineConfig
from kvloom.engine.assembly import assemble, engine_config, set_threads
from kvloom.errors import CapacityError, ModelLoadError, RequestError


def test_a_folder_becomes_an_engine_that_knows_its_model(tiny_folder: Path) -> None:
    parts = assemble(str(tiny_folder), {"kv_memory": "1MiB", "max_model_len": 100})
    assert parts.model_path == tiny_folder
    assert parts.spec.vocab_size == 320
    assert parts.engine.limits.max_tokens == 100
    assert parts.engine.pool.nbytes <= 2**20
    assert parts.engine.pool.dtype is torch.float32
    assert parts.config.kv_memory_bytes == 2**20
    halves = assemble(str(tiny_folder), {"kv_memory": "1MiB", "dtype": "bfloat16"})
    assert halves.engine.pool.dtype is torch.bfloat16
    assert halves.passport.fingerprint != parts.passport.fingerprint
    assert halves.engine.memory.root != parts.engine.memory.root
    again = assemble(str(tiny_folder), {"kv_memory": "1MiB", "max_model_len": 50})
    assert again.engine.memory.root == parts.engine.memory.root


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("kv_memory", "much"),
        ("kv_memory", 0),
        ("kv_memory", "9999TiB"),
        ("max_model_len", 0),
        ("max_model_len", float("nan")),
        ("step_tokens", 0),
        ("step_tokens", float("nan")),
        ("step_tokens", None),
        ("max_running", "8"),
        ("max_waiting", -1),
        ("threads", 0),
        ("threads", 100_000),
        ("threads", "2"),
        ("max_modellen", 5),
    ],
)
def test_wrong_settings_are_named_before_anything_is_loaded(setting: str, value: Any) -> None:
    with pytest.raises(RequestError) as refused:
        LLM("no such model", **{setting: value})
    assert refused.value.param in {setting, "kv_memory_bytes"}
    assert setting in str(refused.value)


def test_a_missing_model_and_too_little_memory_are_said(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises((ModelLoadError, RequestError)):
        LLM(str(tmp_path / "nothing"))
    with pytest.raises(CapacityError, match="kv_memory"):
        LLM(str(tiny_folder), kv_memory=100)


def test_settings_that_are_left_out_are_the_config_s_own() -> None:
    assert engine_config({}) == EngineConfig()


def test_threads_are_set_or_left_alone() -> None:
    before = torch.get_num_threads()
    try:
        set_threads(None)
        assert torch.get_num_threads() == before
        set_threads(1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
