"""`kvloom bench peers` says what an installation takes before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from kvloom.bench.peers import environments, recipes
from kvloom.bench.peers.commands import CommandError
from kvloom.bench.peers.environments import Home, home_of
from tests.bench.peers.fake_homes import RECIPE, FakeRun, silent

from .conftest import Invoke, assert_error

ALLOWED = ("bench", "peers", "install", "toy", "--yes")


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Home:
    """The only peer there is; its home is below a cache folder of the test's own."""
    known: Mapping[str, recipes.Recipe] = {"toy": RECIPE}
    monkeypatch.setattr(recipes, "RECIPES", known)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return home_of(RECIPE)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    run = FakeRun()
    make = environments.install
    monkeypatch.setattr(
        environments,
        "install",
        lambda home, progress, again: make(home, progress, run=run, again=again),
    )
    return run


def test_the_plan_is_told_before_the_limit_is_looked_at(invoke: Invoke, run: FakeRun) -> None:
    done = invoke("bench", "peers", "install", "toy")
    assert done.exit_code == 2
    text = " ".join(done.output.split())
    assert (
        "toy: package toy-engine 1.2 (MIT), about 10.0 MB to download, 3.0 GB on disk, "
        "2 min on two cores. A toy." in text
    )
    assert "the limit is 2.0 GB" in text
    assert "--yes" in text
    assert not run.commands


@pytest.mark.parametrize("consent", [("--yes",), ("--limit", "4GB")], ids=str)
def test_consent_or_a_higher_limit_installs(
    invoke: Invoke, run: FakeRun, toy: Home, consent: tuple[str, ...]
) -> None:
    done = invoke("bench", "peers", "install", "toy", *consent)
    assert done.exit_code == 0, done.output
    assert "Installed toy 1.2 in 0 s" in done.output
    assert toy.installed() is not None
    assert len(run.commands) == 4


def test_what_stands_is_left_unless_asked(invoke: Invoke, run: FakeRun) -> None:
    invoke(*ALLOWED)
    assert "installed already" in invoke("bench", "peers", "install", "toy").output
    assert len(run.commands) == 4
    assert invoke(*ALLOWED, "--again").exit_code == 0
    assert len(run.commands) == 8


def test_a_failure_is_one_line_with_its_reason(invoke: Invoke, run: FakeRun, toy: Home) -> None:
    run.fault, run.at = CommandError("no matching distribution"), "toy-engine==1.2"
    done = invoke(*ALLOWED)
    assert done.exit_code == 1
    assert "Error: toy cannot be installed: no matching distribution" in done.output
    assert not toy.folder.exists()


def test_the_list_tells_what_is_there(invoke: Invoke, run: FakeRun) -> None:
    before = invoke("bench", "peers", "list").stdout
    assert "3.0 GB if installed" in before
    assert "with kvloom" in before
    invoke(*ALLOWED)
    after = invoke("bench", "peers", "list").stdout
    (line,) = (line for line in after.splitlines() if line.startswith("toy"))
    assert "int3" in line
    assert "if installed" not in line


def test_removing_frees_and_says_so(invoke: Invoke, toy: Home) -> None:
    environments.install(toy, silent, run=FakeRun())
    assert "Removed toy" in invoke("bench", "peers", "remove", "toy").output
    assert not toy.folder.exists()
    assert_error(invoke("bench", "peers", "remove", "toy"), 1, "not installed")


@pytest.mark.parametrize(
    ("name", "reason"), [("other", "known are: toy"), ("transformers", "comes with kvloom")]
)
def test_other_names_are_wrong_usage(invoke: Invoke, name: str, reason: str) -> None:
    for command in ("install", "remove"):
        done = invoke("bench", "peers", command, name)
        assert done.exit_code == 2
        assert reason in " ".join(done.output.split())
