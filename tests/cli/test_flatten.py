"""Options as dataclasses: typer sees fields, the command gets objects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from kvloom.cli.flatten import flatten


@dataclass(frozen=True, kw_only=True)
class Base:
    colour: Annotated[str, typer.Option(help="A colour.")] = "red"


@dataclass(frozen=True, kw_only=True)
class Group(Base):
    width: Annotated[int, typer.Option("--wide", min=1)] = 3


@dataclass(frozen=True, kw_only=True)
class Needed:
    height: Annotated[int, typer.Option()]


def run(command: object, *arguments: str) -> object:
    app = typer.Typer()
    app.command()(flatten(command))  # type: ignore[arg-type]
    return CliRunner().invoke(app, list(arguments))


def test_a_command_gets_its_dataclasses_and_its_own_options() -> None:
    seen: list[object] = []

    def command(
        name: Annotated[str, typer.Argument()], group: Group, needed: Needed, number: int = 7
    ) -> None:
        seen.append((name, group, needed, number))

    result = run(command, "Ada", "--wide", "9", "--height", "2")
    assert result.exit_code == 0, result.output  # type: ignore[attr-defined]
    assert seen == [("Ada", Group(width=9), Needed(height=2), 7)]


def test_inherited_fields_are_options_too() -> None:
    seen: list[object] = []

    def command(group: Group) -> None:
        seen.append(group)

    run(command, "--colour", "blue")
    assert seen == [Group(colour="blue", width=3)]


@pytest.mark.parametrize("arguments", [["--wide", "0", "--height", "1"], ["--wide", "2"]])
def test_typer_checks_the_fields(arguments: list[str]) -> None:
    def command(group: Group, needed: Needed) -> None:
        raise AssertionError

    assert run(command, *arguments).exit_code == 2  # type: ignore[attr-defined]


def test_help_comes_from_the_command_and_the_fields() -> None:
    def command(group: Group) -> None:
        """Paint something."""

    output = run(command, "--help").output  # type: ignore[attr-defined]
    assert "Paint something." in output
    assert "A colour." in output
