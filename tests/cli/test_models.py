"""`kvloom models`: convert, list and remove, in a cache folder of the test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvloom.model.digest import sha256_file
from tests.cli.conftest import Invoke, assert_error
from tests.model.tiny_models import write_gguf


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


def test_convert_list_remove(invoke: Invoke, gguf: Path, tmp_path: Path) -> None:
    converted = invoke("models", "convert", str(gguf))
    assert converted.exit_code == 0, converted.output
    folder = Path(converted.stdout.removesuffix("\n"))
    assert folder.parent == tmp_path / "cache" / "models"
    assert (folder / "model.safetensors").is_file()

    listed = invoke("models", "list")
    assert listed.exit_code == 0
    (row,) = [line for line in listed.stdout.splitlines() if folder.name in line]
    assert "tiny.gguf" in row
    assert sha256_file(gguf)[:16] in row
    assert row.rstrip().endswith("whole")

    removed = invoke("models", "remove", folder.name)
    assert removed.exit_code == 0, removed.output
    assert not folder.exists()
    assert folder.name not in invoke("models", "list").stdout
    assert gguf.is_file()


def test_damage_is_listed(invoke: Invoke, gguf: Path) -> None:
    folder = Path(invoke("models", "convert", str(gguf)).stdout.strip())
    (folder / "config.json").unlink()
    assert "config.json is missing" in invoke("models", "list").stdout
    (folder / "kvloom.json").write_text("{")
    listed = invoke("models", "list")
    assert listed.exit_code == 0
    assert folder.name in listed.stdout


def test_a_folder_needs_no_conversion(invoke: Invoke, tiny_model: str) -> None:
    result = invoke("models", "convert", tiny_model)
    assert result.stdout == f"{tiny_model}\n"


def test_an_empty_cache_is_said_on_standard_error(invoke: Invoke) -> None:
    result = invoke("models", "list")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "no converted models" in result.stderr


def test_the_cache_folder_is_an_option(invoke: Invoke, gguf: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    invoke("models", "convert", str(gguf), "--cache-dir", str(other))
    assert invoke("models", "list").stdout == ""
    assert "tiny.gguf" in invoke("models", "list", "--cache-dir", str(other)).stdout


def test_wrong_names_are_said(invoke: Invoke, gguf: Path, tmp_path: Path) -> None:
    assert_error(invoke("models", "remove", "nothing"), 1, "nothing", "none")
    assert_error(invoke("models", "remove", "../cache"), 1, "../cache")
    assert_error(invoke("models", "remove"), 2, "NAME")
    assert_error(invoke("models", "convert", "./none.gguf"), 1, "does not exist")
    gguf.write_bytes(b"GGUF" + b"\xff" * 50)
    assert_error(invoke("models", "convert", str(gguf)), 1, "tiny.gguf")
    (tmp_path / "file").write_text("")
    assert_error(invoke("models", "list", "--cache-dir", str(tmp_path / "file")), 2, "cache-dir")


def test_a_cache_folder_that_cannot_be_made_is_one_line(
    invoke: Invoke, gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / "file" / "cache")
    result = invoke("models", "convert", str(gguf), "--cache-dir", folder)
    assert result.exit_code == 1
    warning, error = result.stderr.splitlines()
    assert "WARNING" in warning
    assert error.startswith("Error: tiny.gguf cannot be converted")
