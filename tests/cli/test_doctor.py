"""`kvloom doctor`: says what the probe found, in tables and in JSON, and why a model is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from kvloom.cli.doctor import layer_table
from kvloom.engine.llm import LLM
from tests.cli.conftest import SMALL, Invoke
from tests.model.tiny_models import byte_level_tokenizer, write_folder


def findings(invoke: Invoke, *arguments: str, code: int = 0) -> dict[str, Any]:
    result = invoke("doctor", *arguments, "--json")
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_json_agrees_with_the_config_and_the_engine(invoke: Invoke, tiny_model: str) -> None:
    found = findings(invoke, tiny_model)
    config = AutoConfig.from_pretrained(tiny_model)
    assert found["supported"]
    assert found["positions"] == "movable"
    assert found["max_positions"] == config.max_position_embeddings
    (kind,) = found["layers"]
    assert kind["index"] == list(range(config.num_hidden_layers))
    assert (kind["heads"], kind["kv_heads"]) == (4, 2)
    assert kind["k_dim"] == kind["v_dim"] == config.head_dim
    assert found["kv_bytes_per_token"] == config.num_hidden_layers * 2 * 2 * config.head_dim * 4
    with LLM(tiny_model, kv_memory="16MiB") as llm:
        assert found["passport"]["fingerprint"] == llm.passport.fingerprint.hex()


def test_the_format_changes_the_fingerprint_and_the_bytes(invoke: Invoke, tiny_model: str) -> None:
    full = findings(invoke, tiny_model, "--dtype", "float32")
    half = findings(invoke, tiny_model, "--dtype", "bfloat16")
    assert half["passport"]["formats"]["kv"] == "bfloat16"
    assert half["passport"]["fingerprint"] != full["passport"]["fingerprint"]
    assert half["kv_bytes_per_token"] * 2 == full["kv_bytes_per_token"]


def test_tables_show_what_the_json_holds(invoke: Invoke, tiny_model: str) -> None:
    found = findings(invoke, tiny_model)
    result = invoke("doctor", tiny_model)
    assert result.exit_code == 0, result.output
    for name in ("fingerprint", "weights", "config", "tokenizer", "rope"):
        assert found["passport"][name] in result.stdout
    for part in ("0-1", "movable", "half, dims 0-7, base 10,000", torch.__version__):
        assert part in result.stdout
    assert f"{found['kv_bytes_per_token']:,} bytes" in result.stdout
    assert result.stderr == ""


def test_threads_are_obeyed(invoke: Invoke, tiny_model: str) -> None:
    before = torch.get_num_threads()
    try:
        assert findings(invoke, tiny_model, "--threads", "1")["system"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without attention."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=320, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=2
    )
    folder = tmp_path_factory.mktemp("models") / "mamba"
    return str(write_folder(folder, MambaForCausalLM(config), byte_level_tokenizer()))


def test_an_unsupported_model_is_refused_with_the_reason(invoke: Invoke, mamba: str) -> None:
    found = findings(invoke, mamba, code=1)
    assert not found["supported"]
    assert "Mamba" in found["reason"]
    result = invoke("doctor", mamba)
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert error.startswith("Error: ")
    assert found["reason"] in error
    assert torch.__version__ in result.stdout


@pytest.mark.parametrize("model", ["nobody/nothing", "./none.gguf", "weights.pt"])
def test_a_model_that_cannot_be_loaded_is_refused(invoke: Invoke, model: str) -> None:
    assert "reason" in findings(invoke, model, code=1)


def test_an_empty_folder_is_refused(invoke: Invoke, tmp_path: Path) -> None:
    assert "no weights" in findings(invoke, str(tmp_path), code=1)["reason"]


def test_the_model_may_come_from_the_environment(
    invoke: Invoke, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVLOOM_MODEL", tiny_model)
    assert findings(invoke)["model"] == tiny_model


def test_options_of_the_engine_are_none_of_doctors(invoke: Invoke, tiny_model: str) -> None:
    assert invoke("doctor", tiny_model, *SMALL).exit_code == 2


def test_the_table_shows_windows_caps_sinks_and_uneven_dims() -> None:
    kind = {
        "index": [0, 2],
        "heads": 8,
        "kv_heads": 1,
        "k_dim": 24,
        "v_dim": 16,
        "rope": None,
        "window": 1024,
        "softcap": 50.0,
        "sinks": True,
    }
    columns = [list(column.cells) for column in layer_table([kind]).columns]
    assert columns == [
        ["0, 2"],
        ["8"],
        ["1"],
        ["k 24, v 16"],
        ["none"],
        ["1,024"],
        ["50"],
        ["yes"],
    ]
