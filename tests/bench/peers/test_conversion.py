"""A model is converted once per version and content, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvloom.bench.peers.commands import CommandError
from kvloom.bench.peers.conversion import prepare_model
from kvloom.bench.peers.environments import Home, PeerError

from .fake_homes import FakeRun, fake_home, silent


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = fake_home(tmp_path)
    home.folder.mkdir(parents=True)
    return home


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    return folder


def test_a_model_is_converted_once_and_again_when_it_changed(home: Home, model: Path) -> None:
    run = FakeRun()
    told: list[str] = []
    first = prepare_model(home, model, lambda text, *_: told.append(text), run=run)
    assert (first / "weights").read_text() == "w"
    assert first.parent == home.models
    assert told[-1] == "toy converts the model: working"
    assert run.commands == [(str(home.bin / "toy-convert"), str(model), run.commands[0][-1])]
    assert prepare_model(home, model, silent, run=run) == first
    assert len(run.commands) == 1
    (model / "model.safetensors").write_bytes(b"others!")
    assert prepare_model(home, model, silent, run=run) != first
    assert len(run.commands) == 2


def test_another_version_of_the_engine_converts_again(
    home: Home, model: Path, tmp_path: Path
) -> None:
    newer = fake_home(tmp_path, steps=(("toy-engine==2",),))
    assert prepare_model(home, model, silent, run=FakeRun()) != prepare_model(
        newer, model, silent, run=FakeRun()
    )


@pytest.mark.parametrize("fault", [CommandError("no such layer"), KeyboardInterrupt()], ids=repr)
def test_a_conversion_that_fails_leaves_nothing(
    home: Home, model: Path, fault: BaseException
) -> None:
    expected = PeerError if isinstance(fault, CommandError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        prepare_model(home, model, silent, run=FakeRun(fault, "toy-convert"))
    if expected is PeerError:
        assert str(caught.value) == "toy cannot convert the model: no such layer"
    assert not [path for path in home.models.iterdir() if path.is_dir()]


def test_leftovers_of_a_killed_conversion_are_removed(home: Home, model: Path) -> None:
    folder = prepare_model(home, model, silent, run=FakeRun())
    folder.rename(home.models / f".{folder.name}.partial-1")
    assert prepare_model(home, model, silent, run=FakeRun()) == folder
    assert [path for path in home.models.iterdir() if path.is_dir()] == [folder]


def test_an_engine_without_a_converter_reads_the_folder(tmp_path: Path, model: Path) -> None:
    run = FakeRun()
    assert prepare_model(fake_home(tmp_path, convert=()), model, silent, run=run) == model
    assert not run.commands


def test_an_engine_for_gguf_files_reads_the_only_one(tmp_path: Path, model: Path) -> None:
    home = fake_home(tmp_path, source="gguf")
    with pytest.raises(PeerError, match=r"holds 0; name a \.gguf file"):
        prepare_model(home, model, silent)
    only = model / "a.gguf"
    only.write_bytes(b"GGUF")
    assert prepare_model(home, model, silent) == only
    assert prepare_model(home, only, silent) == only
    (model / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(PeerError, match="holds 2"):
        prepare_model(home, model, silent)
