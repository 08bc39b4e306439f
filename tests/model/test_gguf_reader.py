"""What is read from a GGUF file, and what is refused because it would be read wrongly."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kvloom.errors import ModelLoadError, UnsupportedModelError
from kvloom.model.gguf_reader import read_gguf
from tests.model.tiny_models import (
    CHAT_TEMPLATE,
    HEAD_DIM,
    byte_level_tokenizer,
    gguf_tensors,
    llama_cpp_order,
    tiny_llama,
    write_gguf,
)

TOKENS = torch.arange(60)[None]


def read(tmp_path: Path, **gguf_options: Any) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir()
    read_gguf(write_gguf(tmp_path / "tiny.gguf", **gguf_options), folder)
    return folder


def test_fp32_weights_give_the_very_logits_they_were_written_from(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(read(tmp_path))
    with torch.inference_mode():
        torch.testing.assert_close(
            model(TOKENS).logits, tiny_llama()(TOKENS).logits, rtol=0, atol=0
        )
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    folder = read(tmp_path)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_quantised_weights_are_what_the_gguf_package_unpacks(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    weights = load_file(read(tmp_path, quantised=kind) / "model.safetensors")
    stored = gguf_tensors(tiny_llama())["blk.1.ffn_up.weight"].detach().numpy()
    unpacked = gguf.dequantize(gguf.quantize(stored, kind), kind)
    assert np.array_equal(weights["model.layers.1.mlp.up_proj.weight"].numpy(), unpacked)


def test_the_embedded_models_weights_are_what_the_gguf_package_unpacks(
    default_model_path: Path,
) -> None:
    weights = load_file(default_model_path / "model.safetensors")
    (path,) = default_model_path.glob("*.gguf")
    reader = gguf.GGUFReader(path)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for number, heads in ((0, 9), (29, 9)):
        tensor = stored[f"blk.{number}.attn_q.weight"]
        unpacked = gguf.dequantize(tensor.data, tensor.tensor_type)
        ours = weights[f"model.layers.{number}.self_attn.q_proj.weight"]
        assert np.array_equal(llama_cpp_order(ours, heads).numpy(), unpacked)
    tensor = stored["token_embd.weight"]
    unpacked = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert np.array_equal(weights["model.embed_tokens.weight"].numpy(), unpacked)
    assert len(weights) == len(stored)


def test_tokenizer_chat_template_and_end_are_kept(tmp_path: Path) -> None:
    folder = read(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def add(left): return 'Straße' + 🙂 123  456"
    assert tokenizer.encode(text) == byte_level_tokenizer().encode(text)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 0)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 0


def test_a_turns_end_becomes_an_end(tmp_path: Path) -> None:
    folder = read(tmp_path, numbers={"tokenizer.ggml.eot_token_id": 5})
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [0, 5]


@pytest.fixture(scope="module")
def digits_apart(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(read(tmp_path_factory.mktemp("smollm"), pre="smollm"))


@given(text=st.text(alphabet="a '1²½\n\t90é", max_size=30))
@example(text="  2024  x=12")
def test_digits_stand_alone_where_the_file_says_smollm(digits_apart: Any, text: str) -> None:
    oracle = byte_level_tokenizer()
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    assert digits_apart.encode(text) == oracle.encode(text)


def test_an_unknown_pre_tokenizer_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(tmp_path, pre="invented-2027")
    assert "invented-2027" in caplog.text


def llama3_factors(factor: float, theta: float) -> torch.Tensor:
    """Return the divisors that llama.cpp's converter writes for Llama 3.1 and later."""
    divisors = []
    for pair in range(HEAD_DIM // 2):
        wavelength = 2 * math.pi * theta ** (2 * pair / HEAD_DIM)
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192 / 1:
            divisors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(divisors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies_are_restored(tmp_path: Path, factor: float) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 50000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    original = tiny_llama(rope_parameters=rope)
    factors = llama3_factors(factor, 50000.0)
    assert factors.unique().numel() > 1
    folder = read(tmp_path, model=original, rope_factors=factors)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(
        model.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq, rtol=1e-6, atol=0
    )


def test_other_frequency_factors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="rotary frequencies"):
        read(tmp_path, rope_factors=torch.tensor([1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize(
    ("numbers", "texts"),
    [
        ({"llama.attention.sliding_window": 4096}, {}),
        ({"llama.attn_logit_softcapping": 50.0}, {}),
        ({"llama.logit_scale": 0.0625}, {}),
        ({"llama.rope.scaling.factor": 4.0}, {"llama.rope.scaling.type": "yarn"}),
        ({}, {"llama.rope.scaling.type": "linear"}),
    ],
)
def test_facts_that_transformers_leaves_out_are_refused(
    tmp_path: Path, numbers: dict[str, float], texts: dict[str, str]
) -> None:
    with pytest.raises(UnsupportedModelError, match="transformers does not read"):
        read(tmp_path, numbers=numbers, texts=texts)


def test_facts_without_effect_are_accepted(tmp_path: Path) -> None:
    numbers = {"llama.logit_scale": 1.0, "llama.attention.sliding_window": 0}
    folder = read(tmp_path, numbers=numbers, texts={"llama.rope.scaling.type": "none"})
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["blk.1.ffn_up.weight", "token_embd.weight", "output_norm.weight"])
def test_a_missing_weight_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelLoadError, match=r"lacks \d of"):
        read(tmp_path, without=(name,))


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "feed_forward_length"])
def test_sizes_beyond_the_files_tensors_are_refused(tmp_path: Path, key: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    place = content.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
    path.write_bytes(content[:place] + b"\xff\xff\xff\x7f" + content[place + 4 :])
    with pytest.raises(ModelLoadError, match=f"{key} = 2147483647"):
        read_gguf(path, tmp_path)


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"clipx"))
    with pytest.raises(ModelLoadError, match="clipx"):
        read_gguf(path, tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("whole") / "tiny.gguf").read_bytes()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(whole: bytes, tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: data.draw(st.integers(4, len(whole) - 1))])
    with pytest.raises(ModelLoadError):
        read_gguf(path, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_broken_byte_never_shows_the_readers_own_error(
    whole: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    header = len(whole) - sum(t.nbytes for t in gguf_tensors(tiny_llama()).values())
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(4, header - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "broken.gguf"
    path.write_bytes(bytes(broken))
    for leftover in tmp_path.glob("*.safetensors"):
        leftover.unlink()
    with suppress(ModelLoadError, UnsupportedModelError):
        read_gguf(path, tmp_path)
        assert (tmp_path / "model.safetensors").exists()


def test_no_room_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(ModelLoadError, match="make room"):
        read(tmp_path)
    assert not list((tmp_path / "folder").iterdir())
