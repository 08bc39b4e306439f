"""Conversions: once, whole or not at all, and one process at a time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvloom.errors import ModelLoadError
from kvloom.model.convert import (
    MANIFEST,
    convert_gguf,
    damage_of,
    known_digests,
    list_converted,
    read_manifest,
    remove_converted,
)
from kvloom.model.source import ModelSource, resolve_source
from tests.model.tiny_models import tiny_llama, write_gguf

# Converts, says every stage, and holds at the one that is asked for until a file appears.
SCRIPT = """
import sys, time
from pathlib import Path
from kvloom.model.convert import convert_gguf
from kvloom.model.source import resolve_source
gguf, cache, stage, go = sys.argv[1:]
def progress(description, done, total):
    if description == stage and not Path(go).exists():
        print("holding", flush=True)
        while not Path(go).exists():
            time.sleep(0.01)
print(convert_gguf(resolve_source(gguf), cache_dir=Path(cache), progress=progress), flush=True)
"""
STAGES = [
    "Reading the tokenizer",
    "Dequantising weights",
    "Writing weights",
    "Checking config.json",
]


class Recorder:
    def __init__(self) -> None:
        self.stages: list[str] = []

    def __call__(self, description: str, done: int, total: int) -> None:
        self.stages.append(description)

    @property
    def converted(self) -> bool:
        return "Dequantising weights" in self.stages


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return resolve_source(str(write_gguf(tmp_path / "tiny.gguf")))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def hold(source: ModelSource, cache: Path, stage: str, go: Path) -> subprocess.Popen[str]:
    """Start a process that converts and return once it holds at a stage."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(source.path), str(cache), stage, str(go)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    return process


def test_the_folder_is_named_after_source_and_digest(source: ModelSource, cache: Path) -> None:
    assert source.path is not None
    digest = hashlib.sha256(source.path.read_bytes()).hexdigest()
    folder = convert_gguf(source, cache_dir=cache)
    assert folder == cache / "models" / f"tiny-{digest[:12]}"
    assert damage_of(folder) is None


def test_the_manifest_tells_the_truth_about_every_file(source: ModelSource, cache: Path) -> None:
    folder = convert_gguf(source, cache_dir=cache)
    manifest = read_manifest(folder)
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {MANIFEST}
    for name, record in manifest.files.items():
        content = (folder / name).read_bytes()
        assert (record.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert manifest.source_sha256 == manifest.files[manifest.source].sha256
    assert known_digests(folder) == {n: record.sha256 for n, record in manifest.files.items()}


def test_the_source_is_kept_and_outlives_the_original(source: ModelSource, cache: Path) -> None:
    assert source.path is not None
    content = source.path.read_bytes()
    folder = convert_gguf(source, cache_dir=cache)
    source.path.unlink()
    assert (folder / "tiny.gguf").read_bytes() == content
    assert damage_of(folder) is None


def test_the_source_is_copied_where_links_fail(
    source: ModelSource, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_args: Any) -> None:
        raise OSError("links across file systems")

    monkeypatch.setattr(os, "link", no_link)
    folder = convert_gguf(source, cache_dir=cache)
    assert source.path is not None
    assert (folder / "tiny.gguf").read_bytes() == source.path.read_bytes()
    assert (folder / "tiny.gguf").stat().st_ino != source.path.stat().st_ino


def test_the_second_time_nothing_is_done(source: ModelSource, cache: Path) -> None:
    first, second = Recorder(), Recorder()
    folder = convert_gguf(source, cache_dir=cache, progress=first)
    assert convert_gguf(source, cache_dir=cache, progress=second) == folder
    assert first.converted
    assert second.stages == []


def test_stages_are_reported_in_order(source: ModelSource, cache: Path) -> None:
    recorder = Recorder()
    convert_gguf(source, cache_dir=cache, progress=recorder)
    firsts = [recorder.stages.index(stage) for stage in STAGES]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", MANIFEST, "tiny.gguf"])
@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_a_damaged_folder_is_converted_again_and_said_so(
    source: ModelSource, cache: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    folder = convert_gguf(source, cache_dir=cache)
    file = folder / name
    content = file.read_bytes()
    file.unlink()  # a hard link: the original must stay as it is
    if damage == "cut":
        file.write_bytes(content[:-7])
    elif damage == "changed":
        file.write_bytes(b"~" + content[1:])
    recorder = Recorder()
    assert convert_gguf(source, cache_dir=cache, progress=recorder) == folder
    assert recorder.converted
    assert "is damaged" in caplog.text
    assert damage_of(folder) is None
    if name != MANIFEST:
        assert file.read_bytes() == content


@pytest.mark.parametrize("content", ["", "null", "[]", '{"files": 3}', '{"files": {"a": 1}}'])
def test_no_manifest_is_believed_that_cannot_be_read(
    source: ModelSource, cache: Path, content: str
) -> None:
    folder = convert_gguf(source, cache_dir=cache)
    (folder / MANIFEST).write_text(content)
    assert damage_of(folder) is not None
    assert known_digests(folder) == {}


def test_another_format_is_converted_again(source: ModelSource, cache: Path) -> None:
    folder = convert_gguf(source, cache_dir=cache)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format_version": 0}))
    recorder = Recorder()
    convert_gguf(source, cache_dir=cache, progress=recorder)
    assert recorder.converted


def test_a_copied_folder_is_still_whole(source: ModelSource, cache: Path, tmp_path: Path) -> None:
    folder = convert_gguf(source, cache_dir=cache)
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert damage_of(copy) is None
    assert "model.safetensors" not in known_digests(copy)


def test_a_source_with_another_digest_is_refused(source: ModelSource, cache: Path) -> None:
    wanted = ModelSource(source.name, "gguf", source.path, sha256="0" * 64)
    with pytest.raises(ModelLoadError, match="damaged or another version"):
        convert_gguf(wanted, cache_dir=cache)
    assert list_converted(cache) == []


def test_another_file_of_the_same_name_has_its_own_folder(
    source: ModelSource, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    other = write_gguf(tmp_path / "other" / "tiny.gguf", tiny_llama(seed=1))
    folders = {convert_gguf(each, cache_dir=cache) for each in (source, resolve_source(str(other)))}
    assert len(folders) == 2


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    (tmp_path / "tiny.gguf").write_bytes(whole[:-1000])
    with pytest.raises(ModelLoadError):
        convert_gguf(resolve_source(str(tmp_path / "tiny.gguf")), cache_dir=cache)
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []


def test_an_interrupted_conversion_leaves_nothing(source: ModelSource, cache: Path) -> None:
    def interrupt(description: str, _done: int, _total: int) -> None:
        if description == "Writing weights":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_gguf(source, cache_dir=cache, progress=interrupt)
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []


def test_an_unusable_cache_folder_is_told(source: ModelSource, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file where the folder should be")
    with pytest.raises(ModelLoadError, match="another cache folder"):
        convert_gguf(source, cache_dir=tmp_path / "blocked")


@pytest.mark.parametrize(
    "stage",
    [
        "Writing weights",
        pytest.param("Dequantising weights", marks=pytest.mark.long),
        pytest.param("Checking config.json", marks=pytest.mark.long),
        pytest.param("Reading the tokenizer", marks=pytest.mark.long),
        pytest.param("Checking tokenizer.json", marks=pytest.mark.long),
    ],
)
def test_a_killed_conversion_is_never_used(
    source: ModelSource, cache: Path, tmp_path: Path, stage: str
) -> None:
    process = hold(source, cache, stage, tmp_path / "go")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (leftover,) = [path for path in (cache / "models").iterdir() if path.is_dir()]
    assert list_converted(cache) == []
    recorder = Recorder()
    folder = convert_gguf(source, cache_dir=cache, progress=recorder)
    assert recorder.converted
    assert damage_of(folder) is None
    assert not leftover.exists()


@pytest.mark.long
def test_a_conversion_killed_while_it_writes_is_never_used(cache: Path, tmp_path: Path) -> None:
    wide = tiny_llama(intermediate_size=2**18)  # 200 MB, so that writing takes a while
    source = resolve_source(str(write_gguf(tmp_path / "wide.gguf", wide)))
    for seconds in (0.02, 0.1, 0.3, 0.8):
        process = hold(source, cache, "Writing weights", tmp_path / "go")
        (tmp_path / "go").touch()
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        (tmp_path / "go").unlink()
        assert list_converted(cache) == [] or list_converted(cache)[0].damage is None
    folder = convert_gguf(source, cache_dir=cache)
    recorded = read_manifest(folder).files["model.safetensors"].sha256
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == recorded
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]


def test_of_two_processes_one_converts_and_the_other_waits(
    source: ModelSource, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    go = tmp_path / "go"
    process = hold(source, cache, "Dequantising weights", go)
    waiting = Recorder()

    def progress(description: str, done: int, total: int) -> None:
        waiting(description, done, total)
        if description.startswith("Waiting for another process"):
            go.touch()

    folder = convert_gguf(source, cache_dir=cache, progress=progress)
    output, _ = process.communicate()
    assert output.strip() == str(folder)
    assert not waiting.converted
    assert "Waiting for another process" in caplog.text
    assert damage_of(folder) is None


def test_list_and_remove(source: ModelSource, cache: Path) -> None:
    assert list_converted(cache) == []
    folder = convert_gguf(source, cache_dir=cache)
    (entry,) = list_converted(cache)
    assert (entry.name, entry.path, entry.damage) == (folder.name, folder, None)
    assert entry.manifest == read_manifest(folder)
    assert entry.nbytes == sum(path.stat().st_size for path in folder.iterdir())
    assert remove_converted(entry.name, cache) == entry.nbytes
    assert list_converted(cache) == []
    assert not folder.exists()
    assert source.path is not None
    assert source.path.exists()


def test_a_damaged_folder_is_listed_as_such_and_can_be_removed(
    source: ModelSource, cache: Path
) -> None:
    folder = convert_gguf(source, cache_dir=cache)
    (folder / "config.json").unlink()
    (entry,) = list_converted(cache)
    assert entry.damage == "config.json is missing"
    remove_converted(entry.name, cache)
    assert list_converted(cache) == []


@pytest.mark.parametrize("name", ["", "..", "../models", "missing", "/"])
def test_only_a_converted_model_can_be_removed(source: ModelSource, cache: Path, name: str) -> None:
    folder = convert_gguf(source, cache_dir=cache)
    with pytest.raises(ModelLoadError, match=folder.name):
        remove_converted(name, cache)
    assert folder.exists()


def test_odd_names_become_safe_folders(cache: Path, tmp_path: Path) -> None:
    for name in (".. hidden", "näme mit / Leerzeichen".replace("/", "∕"), "x" * 200):
        path = write_gguf(tmp_path / f"{name}.gguf")
        folder = convert_gguf(resolve_source(str(path)), cache_dir=cache)
        assert folder.parent == cache / "models"
        assert folder.name in {entry.name for entry in list_converted(cache)}


def test_the_embedded_model_is_whole(default_model_path: Path) -> None:
    assert damage_of(default_model_path) is None
    assert read_manifest(default_model_path).source_sha256 == resolve_source("default").sha256
