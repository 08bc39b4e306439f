"""A command's lines are passed on; its failure is told by its last words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvloom.bench.peers.commands import CommandError, run_command


def python(program: str) -> tuple[str, ...]:
    return (sys.executable, "-c", program)


def test_lines_of_both_streams_are_passed_on() -> None:
    told: list[str] = []
    run_command(python("import sys; print('one\\n'); print('two', file=sys.stderr)"), told.append)
    assert sorted(told) == ["one", "two"]


def test_variables_are_added_and_those_of_this_environment_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", "somewhere")
    told: list[str] = []
    program = "import os; print(os.environ.get('PYTHONPATH'), os.environ['COLOUR'])"
    run_command(python(program), told.append, {"COLOUR": "blue"})
    assert told == ["None blue"]


def test_a_failure_holds_its_errors_and_not_the_warnings() -> None:
    program = (
        "import sys; print('Collecting it'); print('ERROR: no such package');"
        "print('[notice] a new release of pip'); print('bye'); sys.exit(3)"
    )
    with pytest.raises(CommandError, match=r"^ERROR: no such package \(status 3\)$"):
        run_command(python(program), lambda line: None)


@pytest.mark.parametrize(
    ("program", "reason"),
    [("print('the last word'); exit(1)", "the last word"), ("exit(1)", "it wrote nothing")],
)
def test_without_an_error_line_the_last_line_is_the_reason(program: str, reason: str) -> None:
    with pytest.raises(CommandError, match=reason):
        run_command(python(program), lambda line: None)


def test_a_long_reason_is_cut() -> None:
    with pytest.raises(CommandError) as caught:
        run_command(python("print('error ' * 1000); exit(1)"), lambda line: None)
    assert len(str(caught.value)) < 700


def test_a_program_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="cannot be started"):
        run_command((str(tmp_path / "nothing"),), lambda line: None)


def test_an_interrupt_ends_the_program() -> None:
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    # It would sleep for ten minutes; the test's own timeout is far shorter.
    with pytest.raises(KeyboardInterrupt):
        run_command(python("import time; print('on', flush=True); time.sleep(600)"), interrupt)
