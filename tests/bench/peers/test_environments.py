"""An environment is made whole or not at all, and its marker is written last."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest

from kvloom.bench.peers.commands import CommandError
from kvloom.bench.peers.environments import (
    MARKER,
    PeerError,
    home_of,
    install,
    pip_steps,
    remove,
)

from .fake_homes import RECIPE, FakeRun, fake_home, silent

TORCH = f"torch=={metadata.version('torch')}"


def test_pip_is_asked_for_this_torch_first_and_then_for_the_engine(tmp_path: Path) -> None:
    home, run = fake_home(tmp_path), FakeRun()
    told: list[str] = []
    done = install(home, lambda text, *_: told.append(text), run=run)
    venv, torch, engine, unwanted = run.commands
    assert venv[1:] == ("-m", "venv", str(home.folder / "environment"))
    assert all(command[0] == str(home.python) for command in (torch, engine, unwanted))
    assert (torch[-2:], engine[-3:]) == (("install", TORCH), ("install", TORCH, "toy-engine==1.2"))
    assert unwanted[-3:] == ("uninstall", "--yes", "ballast")
    assert told == ["toy: working"] * 4
    assert home.installed() == done
    assert (done.version, done.nbytes) == ("1.2", len("python"))
    assert home.nbytes() > done.nbytes


def test_an_environment_that_stands_is_not_made_again_unless_asked(tmp_path: Path) -> None:
    home, run = fake_home(tmp_path), FakeRun()
    assert install(home, silent, run=run) == install(home, silent, run=run)
    assert len(run.commands) == 4
    install(home, silent, run=run, again=True)
    assert len(run.commands) == 8


@pytest.mark.parametrize("at", ["venv", TORCH, "toy-engine==1.2", "uninstall"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), CommandError("no such package")], ids=repr)
def test_what_does_not_end_well_leaves_nothing(
    tmp_path: Path, at: str, fault: BaseException
) -> None:
    home = fake_home(tmp_path)
    expected = PeerError if isinstance(fault, CommandError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        install(home, silent, run=FakeRun(fault, at))
    if expected is PeerError:
        assert "toy cannot be installed: no such package" in str(caught.value)
    assert not home.folder.exists()
    assert home.installed() is None


def test_a_part_of_an_environment_does_not_look_installed(tmp_path: Path) -> None:
    home = fake_home(tmp_path)
    home.bin.mkdir(parents=True)
    home.python.write_text("python")  # as an installer that was killed leaves it
    assert home.installed() is None
    assert install(home, silent, run=FakeRun()).version == "1.2"


def test_another_recipe_or_a_damaged_marker_is_not_installed(tmp_path: Path) -> None:
    home = fake_home(tmp_path)
    install(home, silent, run=FakeRun())
    assert fake_home(tmp_path, steps=(("toy-engine==1.3",),)).installed() is None
    marker = home.folder / MARKER
    for text in ("", "[]", "{}", json.dumps({"steps": 1})):
        marker.write_text(text)
        assert home.installed() is None


def test_removing_frees_everything_once(tmp_path: Path) -> None:
    home = fake_home(tmp_path)
    with pytest.raises(PeerError, match="not installed"):
        remove(home)
    install(home, silent, run=FakeRun())
    nbytes = home.nbytes()
    assert remove(home) == nbytes > 0
    assert not home.folder.exists()


def test_a_home_is_in_the_cache_folder(tmp_path: Path) -> None:
    assert home_of(RECIPE, tmp_path).folder == tmp_path / "peers" / "toy"
    assert pip_steps(RECIPE)[0] == (TORCH,)
