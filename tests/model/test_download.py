"""Models from the hub: its cache when offline, and its errors in words of use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from kvloom.errors import ModelLoadError
from kvloom.model.download import download
from kvloom.model.source import ModelSource
from tests.model.tiny_models import write_folder

SOURCE = ModelSource("someone/tiny", "hub", None)
SCRIPT = """
from kvloom.errors import KvloomError
from kvloom.model.load import prepare_folder
from kvloom.model.source import resolve_source
try:
    print(prepare_folder(resolve_source("someone/tiny")))
except KvloomError as error:
    print(type(error).__name__, error)
"""


def run_offline(home: Path) -> str:
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_offline_a_missing_model_is_a_clear_error(tmp_path: Path) -> None:
    output = run_offline(tmp_path)
    assert output.startswith("ModelLoadError someone/tiny is no path here")
    assert "name a local folder" in output


def test_offline_a_model_in_the_hubs_cache_is_found(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    commit = "0" * 40
    snapshot = repository / "snapshots" / commit
    write_folder(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert Path(run_offline(tmp_path)) == snapshot


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "http://localhost"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.RepositoryNotFoundError("no", response=answer(404)), "check the name"),
        (errors.GatedRepoError("no", response=answer(403)), "accept its terms"),
        (errors.HFValidationError("no"), "neither a path here nor a hub id"),
        (ConnectionError("no route"), "the hub did not answer"),
        (TimeoutError(), "the hub did not answer"),
    ],
)
def test_the_hubs_errors(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelLoadError, match=words) as caught:
        download(SOURCE)
    assert "someone/tiny" in str(caught.value)


class FakeHub:
    """Copies what the patterns let through, as the hub would."""

    def __init__(self, repository: Path, target: Path) -> None:
        self.repository, self.target = repository, target

    def snapshot_download(
        self, name: str, allow_patterns: list[str], ignore_patterns: list[str], tqdm_class: Any
    ) -> str:
        paths = [str(path.relative_to(self.repository)) for path in self.repository.rglob("*.*")]
        kept = huggingface_hub.utils.filter_repo_objects(
            paths, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        bar = tqdm_class(total=0, unit="B", name="huggingface_hub.snapshot_download")
        self.target.mkdir()
        for path in kept:
            (self.target / path).parent.mkdir(exist_ok=True)
            shutil.copy(self.repository / path, self.target / path)
            bar.total += 100
            bar.update(100)
        return str(self.target)


def test_only_wanted_files_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    repository = write_folder(tmp_path / "repository")
    wanted = {path.name for path in repository.iterdir()}
    unwanted = ["pytorch_model.bin", "x.pt", "model.py", "README.md", "consolidated.safetensors"]
    (repository / "onnx").mkdir()
    for name in [*unwanted, "onnx/model.safetensors", "tokenizer.pkl"]:
        (repository / name).touch()
    capfd.readouterr()
    calls: list[tuple[str, int, int]] = []
    hub = FakeHub(repository, tmp_path / "fetched")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    folder = download(SOURCE, progress=lambda *call: calls.append(call))
    assert {path.name for path in folder.rglob("*")} == wanted
    total = 100 * len(wanted)
    assert calls[-1] == ("Downloading someone/tiny", total, total)
    assert capfd.readouterr() == ("", "")


def test_code_is_fetched_only_if_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = write_folder(tmp_path / "repository")
    (repository / "model.py").touch()
    hub = FakeHub(repository, tmp_path / "fetched")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    assert (download(SOURCE, with_code=True) / "model.py").exists()


def test_a_repository_of_pickles_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "config.json").write_text("{}")
    (repository / "pytorch_model.bin").touch()
    hub = FakeHub(repository, tmp_path / "fetched")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    with pytest.raises(ModelLoadError, match="no weights"):
        download(SOURCE)
