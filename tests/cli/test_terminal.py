"""The two streams: what reaches them, and what must not."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from kvloom.cli.terminal import Terminal, set_up_logging
from tests.cli.conftest import Invoke

ESCAPES = "a\x1b[31mb\x9b2J\x07c\r\td\n🙂é"


class FakeStdout(io.TextIOWrapper):
    def __init__(self, *, terminal: bool, encoding: str = "utf-8") -> None:
        self.bytes = io.BytesIO()
        self.terminal = terminal
        super().__init__(self.bytes, encoding=encoding, newline="")

    def isatty(self) -> bool:
        return self.terminal


def written(monkeypatch: pytest.MonkeyPatch, stdout: FakeStdout, text: str) -> bytes:
    monkeypatch.setattr(sys, "stdout", stdout)
    Terminal().write(text)
    return stdout.bytes.getvalue()


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    out = written(monkeypatch, FakeStdout(terminal=True), ESCAPES).decode()
    assert out == "a\ufffd[31mb\ufffd2J\ufffdc\ufffd\td\n🙂é"


def test_a_pipe_gets_the_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert written(monkeypatch, FakeStdout(terminal=False), ESCAPES).decode() == ESCAPES


def test_an_encoding_without_the_character_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = FakeStdout(terminal=False, encoding="ascii")
    assert written(monkeypatch, stdout, "naïve 🙂") == b"na?ve ?"


def test_an_error_is_one_line_whatever_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().error("no such [bold]thing[/bold]\n  at 'x'" + " long" * 60)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("Error: no such [bold]thing[/bold] at 'x' long long")


@pytest.mark.usefixtures("invoke")
def test_log_records_go_to_the_standard_error_of_the_moment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_up_logging("info")
    logging.getLogger("kvloom.engine").info("one")
    logging.getLogger("kvloom.engine").debug("two")
    logging.getLogger("other").info("three")
    other = io.StringIO()
    monkeypatch.setattr(sys, "stderr", other)
    logging.getLogger("other").warning("four")
    assert "INFO kvloom.engine: one" in (shown := capsys.readouterr().err)
    assert "two" not in shown
    assert "three" not in shown
    assert "WARNING other: four" in other.getvalue()


def test_the_level_is_an_option(invoke: Invoke) -> None:
    result = invoke("--log-level", "debug", "models", "list")
    assert result.exit_code == 0, result.output
    assert logging.getLogger("kvloom").getEffectiveLevel() == logging.DEBUG
    assert invoke("--log-level", "loud", "models", "list").exit_code == 2
