"""Folders that are refused before anything is built from them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kvloom.errors import ModelLoadError, UnsupportedModelError
from kvloom.model.checkpoint import check_folder
from tests.model.tiny_models import tiny_llama, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_whole_folder(folder: Path) -> None:
    checkpoint = check_folder(folder)
    assert checkpoint.weights == (folder / "model.safetensors",)
    assert checkpoint.stored_dtype == "F32"
    assert checkpoint.config["model_type"] == "llama"


def test_shards_are_listed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, max_shard_size="20KB")
    names = {path.name for path in check_folder(folder).weights}
    assert names == {path.name for path in folder.glob("*.safetensors")}
    assert len(names) > 1


def test_dtype_is_that_of_most_weights(folder: Path) -> None:
    save_file(
        {"small": torch.zeros(3), "large": torch.zeros(400, dtype=torch.bfloat16)},
        folder / "model.safetensors",
    )
    assert check_folder(folder).stored_dtype == "BF16"


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ModelLoadError, match=shard.name):
        check_folder(folder)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "model.bin", "a/b.safetensors"]
)
def test_an_index_may_name_files_of_its_folder_only(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelLoadError, match="no file of the folder"):
        check_folder(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}']
)
def test_a_damaged_index_is_refused(folder: Path, content: str) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelLoadError, match="damaged"):
        check_folder(folder)


def test_weights_under_another_name_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(ModelLoadError, match=r"consolidated\.safetensors"):
        check_folder(folder)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_weights_cut_anywhere_are_refused(
    whole_weights: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    cut = data.draw(st.integers(0, len(whole_weights) - 1))
    (tmp_path / "model.safetensors").write_bytes(whole_weights[:cut])
    with pytest.raises(ModelLoadError, match="no whole safetensors file"):
        check_folder(tmp_path)


@pytest.fixture(scope="module")
def whole_weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = write_folder(tmp_path_factory.mktemp("whole"))
    return (folder / "model.safetensors").read_bytes()


def test_a_pickle_called_safetensors_is_refused_unopened(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps({"weights": list(range(100))}))
    with pytest.raises(ModelLoadError, match="no whole safetensors file"):
        check_folder(folder)


def test_a_file_without_tensors_is_refused(folder: Path) -> None:
    save_file({}, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match="without any tensor"):
        check_folder(folder)


def test_pickles_only_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin"):
        check_folder(folder)


def test_a_missing_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        check_folder(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"model_type": 3}', b"[" * 100_000],
)
def test_a_damaged_config_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        check_folder(folder)


def test_an_adapter_is_refused(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="merge"):
        check_folder(folder)


def test_unknown_and_other_types_are_refused(folder: Path) -> None:
    change_config(folder, model_type="invented")
    with pytest.raises(UnsupportedModelError, match="invented"):
        check_folder(folder)
    change_config(folder, model_type="vit")
    with pytest.raises(UnsupportedModelError, match="no causal language model"):
        check_folder(folder)


def test_a_model_that_needs_its_own_code_is_refused_unless_trusted(folder: Path) -> None:
    change_config(folder, model_type="invented", auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(ModelLoadError, match="trust_remote_code"):
        check_folder(folder)
    assert check_folder(folder, trust_remote_code=True).folder == folder


def test_code_from_elsewhere_in_attention_is_refused(folder: Path) -> None:
    change_config(folder, attn_implementation="someone/attention-kernel")
    with pytest.raises(ModelLoadError, match="someone/attention-kernel"):
        check_folder(folder)


def test_a_known_type_needs_no_code_of_its_own(folder: Path) -> None:
    change_config(folder, auto_map={"AutoModelForCausalLM": "code.Model"})
    assert check_folder(folder).config["model_type"] == tiny_llama().config.model_type


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"]
)
def test_sizes_beyond_the_weights_are_refused_unbuilt(folder: Path, key: str) -> None:
    change_config(folder, **{key: 10**9})
    with pytest.raises(ModelLoadError, match=f"{key} = 1000000000"):
        check_folder(folder)
    change_config(folder, **{key: 2}, text_config={key: 10**9})
    with pytest.raises(ModelLoadError, match=f"{key} = 1000000000"):
        check_folder(folder)
