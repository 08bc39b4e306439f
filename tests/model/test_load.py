"""Loading: exact, complete and silent, or a clear error."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from kvloom.errors import KvloomError, ModelLoadError
from kvloom.model.load import LoadedModel, load_model, prepare_folder
from kvloom.model.source import resolve_source
from tests.model.tiny_models import tiny_llama, write_folder, write_gguf

TOKENS = torch.arange(60)[None]
CANARY = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
OWN_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({canary!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny")


def load(path: Path, **options: Any) -> LoadedModel:
    options.setdefault("cache_dir", path.parent / "cache")
    return load_model(resolve_source(str(path)), **options)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace weights by name, with `__` for a dot; None removes one."""
    path = folder / "model.safetensors"
    weights = dict(load_file(path))
    for name, tensor in changes.items():
        if tensor is None:
            del weights[name.replace("__", ".")]
        else:
            weights[name.replace("__", ".")] = tensor
    save_file(weights, path, metadata={"format": "pt"})


def test_a_loaded_model_computes_what_was_saved(folder: Path) -> None:
    loaded = load(folder)
    with torch.inference_mode():
        torch.testing.assert_close(
            loaded.model(TOKENS).logits, tiny_llama()(TOKENS).logits, rtol=0, atol=0
        )
    assert loaded.path == folder
    assert loaded.max_positions == 128


def test_it_is_ready_for_inference(folder: Path) -> None:
    model = load(folder).model
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_the_stored_dtype(tmp_path: Path, stored: torch.dtype) -> None:
    folder = write_folder(tmp_path / "tiny", tiny_llama().to(stored))
    change_config(folder, dtype=None)  # the files decide, not the config
    assert load(folder).dtype == stored
    assert load(folder, dtype="float32").dtype == torch.float32
    assert load(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_gguf_loads_as_float32(tmp_path: Path) -> None:
    loaded = load(write_gguf(tmp_path / "tiny.gguf"))
    assert loaded.dtype == torch.float32
    reference: Any = AutoModelForCausalLM.from_pretrained(loaded.path)
    with torch.inference_mode():
        torch.testing.assert_close(
            loaded.model(TOKENS).logits, reference(TOKENS).logits, rtol=0, atol=0
        )


def test_a_damaged_conversion_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    weights = load(path).path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    loaded = load(path)
    assert "is damaged" in caplog.text
    assert loaded.model(TOKENS).logits.isfinite().all()


def test_sharded_weights(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny", max_shard_size="20KB")
    whole = write_folder(tmp_path / "whole")
    torch.testing.assert_close(load(folder).model.state_dict(), load(whole).model.state_dict())
    assert load(folder).digests.weights != load(whole).digests.weights


def test_a_missing_weight_is_an_error_not_a_random_one(folder: Path) -> None:
    change_weights(folder, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(ModelLoadError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_a_missing_output_projection_is_an_error_unless_tied(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "tiny")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load(folder)
    change_config(folder, tie_word_embeddings=False)
    with pytest.raises(ModelLoadError, match=r"lm_head\.weight"):
        load(folder)


def test_a_weight_without_a_place_is_an_error(folder: Path) -> None:
    change_weights(folder, model__layers__0__self_attn__q_proj__bias=torch.ones(32))
    with pytest.raises(ModelLoadError, match=r"no place for: .*q_proj\.bias"):
        load(folder)


def test_a_weight_of_another_shape_is_an_error(folder: Path) -> None:
    change_weights(folder, model__norm__weight=torch.ones(31))
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_an_error(folder: Path, value: float) -> None:
    weight = load_file(folder / "model.safetensors")["model.norm.weight"]
    weight[3] = value
    change_weights(folder, model__norm__weight=weight)
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight.*NaN or infinite"):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": -1},
        {"hidden_size": "wide"},
        {"hidden_size": 10**7},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"vocab_size": 10**8},
        {"hidden_act": "invented"},
        {"rope_parameters": {"rope_type": "invented"}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
)
def test_a_config_that_cannot_be_is_a_clear_error(folder: Path, changes: dict[str, Any]) -> None:
    change_config(folder, **changes)
    with pytest.raises(KvloomError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


def test_a_missing_tokenizer_is_a_clear_error(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelLoadError, match="tokenizer"):
        load(folder)


def test_code_of_a_model_runs_only_if_trusted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "own")
    canary = tmp_path / "ran"
    (folder / "own.py").write_text(OWN_CODE.format(canary=str(canary)))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change_config(folder, model_type="own", auto_map=auto_map)
    with pytest.raises(ModelLoadError, match="trust_remote_code"):
        load(folder)
    assert not canary.exists()
    trusted = load(folder, trust_remote_code=True)
    assert canary.exists()
    assert type(trusted.model).__name__ == "OwnModel"


def test_code_beside_a_known_model_does_not_run(folder: Path) -> None:
    (folder / "own.py").write_text(CANARY)
    change_config(folder, auto_map={"AutoModelForCausalLM": "own.OwnModel"})
    assert type(load(folder).model).__name__ == "LlamaForCausalLM"
    assert not (folder / "ran").exists()


def test_a_pickle_beside_the_weights_is_not_read(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04broken")
    assert load(folder).model(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize(
    ("generation", "expected"),
    [({"eos_token_id": [5, 6]}, {0, 5, 6}), ({"eos_token_id": 7}, {0, 7}), ({}, {0})],
)
def test_ends_come_from_generation_config_and_tokenizer(
    folder: Path, generation: dict[str, Any], expected: set[int]
) -> None:
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert load(folder).tokenizer.eos_token_ids == expected


def test_lengths_under_other_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = GPT2Config(
        n_layer=1,
        n_head=2,
        n_embd=16,
        vocab_size=320,
        n_positions=77,
        bos_token_id=1,
        eos_token_id=0,
    )
    assert load(write_folder(tmp_path / "gpt2", GPT2LMHeadModel(config))).max_positions == 77
    falcon = FalconConfig(
        num_hidden_layers=1,
        num_attention_heads=2,
        hidden_size=16,
        vocab_size=320,
        max_position_embeddings=99,
    )
    assert load(write_folder(tmp_path / "falcon", FalconForCausalLM(falcon))).max_positions == 99
    assert "states no length" not in caplog.text


def test_a_model_without_a_stated_length_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(n_layer=1, n_head=2, hidden_size=16, vocab_size=320)
    loaded = load(write_folder(tmp_path / "bloom", BloomForCausalLM(config)))
    assert loaded.max_positions == 2048
    assert "states no length" in caplog.text


def test_digests_follow_weights_config_and_tokenizer(tmp_path: Path) -> None:
    base = load(write_folder(tmp_path / "base")).digests
    same = load(write_folder(tmp_path / "same")).digests
    assert base == same
    other = load(write_folder(tmp_path / "other", tiny_llama(seed=1))).digests
    assert other.weights != base.weights
    assert (other.config, other.tokenizer) == (base.config, base.tokenizer)
    changed = write_folder(tmp_path / "changed")
    change_config(changed, rms_norm_eps=1e-3)
    assert load(changed).digests.config != base.config


def test_digests_of_a_conversion_are_those_of_its_files(tmp_path: Path) -> None:
    converted = load(write_gguf(tmp_path / "tiny.gguf"))
    plain = load(converted.path, cache_dir=tmp_path / "another")
    assert converted.digests == plain.digests


def test_loading_is_silent(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        load(folder)
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


def test_progress_reports_weights_and_digests(folder: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    load(folder, progress=lambda *call: calls.append(call))
    assert {call[0] for call in calls} == {"Loading weights", "Checking model.safetensors"}
    assert all(done <= total for _, done, total in calls)


def test_prepare_folder_returns_a_folder_as_it_is(folder: Path) -> None:
    assert prepare_folder(resolve_source(str(folder))) == folder


def test_the_embedded_model_answers(default_model_path: Path) -> None:
    loaded = load_model(resolve_source("default"))
    assert loaded.path == default_model_path
    assert loaded.dtype == torch.float32
    assert loaded.max_positions == 8192
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = torch.tensor([loaded.tokenizer.chat_tokens(question)])
    model: Any = loaded.model
    answer = model.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :]
    assert "Paris" in loaded.tokenizer.decode(answer.tolist())
