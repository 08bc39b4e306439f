"""Fake environments: a recipe of no real package, and a stand-in for venv, pip and converters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvloom.bench.peers.environments import Home
from kvloom.bench.peers.recipes import TORCH, Recipe

RECIPE = Recipe(
    name="toy",
    module="toy_worker",
    package="toy-engine",
    version="1.2",
    steps=((TORCH,), (TORCH, "toy-engine==1.2")),
    unwanted=("ballast",),
    download_mb=10,
    installed_mb=3000,
    install_s=90,
    format="int3",
    convert=("{bin}/toy-convert", "{model}", "{output}"),
    licence="MIT",
    note="A toy.",
)


class FakeRun:
    """Stands in for `run_command`: makes the files that the programs would.

    Attributes:
        commands: what was run.
        fault: raised by the command that contains `at`.
    """

    def __init__(self, fault: BaseException | None = None, at: str = "") -> None:
        self.commands: list[tuple[str, ...]] = []
        self.fault, self.at = fault, at

    def __call__(
        self,
        command: Sequence[str],
        tell: Callable[[str], None],
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.commands.append(tuple(command))
        tell("working")
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.write_text("python")
        if command[0].endswith("toy-convert"):
            Path(command[-1]).mkdir()
            Path(command[-1], "weights").write_text("w")
        if self.fault is not None and any(self.at in part for part in command):
            raise self.fault


def fake_home(folder: Path, **changes: Any) -> Home:
    """Return the home of a toy engine."""
    return Home(replace(RECIPE, **changes), folder / "peers" / "toy")


def silent(description: str, done: int, total: int) -> None:
    """Take note of nothing."""
