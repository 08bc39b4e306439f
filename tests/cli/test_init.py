"""The command line as a whole: what it imports, and what becomes of errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from kvloom import __version__
from kvloom.cli import make_app
from kvloom.errors import KvloomError
from tests.cli.conftest import KVLOOM, Invoke, assert_error, run_kvloom

COMMANDS = [
    (),
    ("ask",),
    ("chat",),
    ("serve",),
    ("doctor",),
    ("demo",),
    ("models",),
    ("models", "list"),
    ("models", "convert"),
    ("models", "remove"),
    ("store",),
    *(("store", name) for name in ("ls", "verify", "gc", "export", "import", "rm")),
    ("bench",),
    ("bench", "speed"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(invoke: Invoke, command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Usage: " in result.stdout
    assert result.stderr == ""
    for line in result.stdout.splitlines():
        assert len(line) <= 80


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from kvloom.cli import make_app\n"
        "try:\n    make_app()(sys.argv[1:])\n"
        "finally:\n    print(*sys.modules, file=sys.stderr)"
    )
    # not pydantic: typer itself needs it
    heavy = {"torch", "transformers", "numpy", "fastapi", "uvicorn", "safetensors"}
    for command in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-c", program, *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.startswith("Usage: ")
        loaded = set(done.stderr.split())
        assert "kvloom.cli.ask" in loaded
        assert not loaded & heavy


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").stdout == f"kvloom {__version__}\n"


def test_unknown_commands_and_options_are_exit_code_2(invoke: Invoke) -> None:
    assert_error(invoke("sing"), 2, "sing")
    assert_error(invoke("--sing"), 2, "--sing")
    assert invoke().exit_code == 2


def failing(error: BaseException) -> typer.Typer:
    app = make_app()

    @app.command()
    def fail() -> None:
        raise error

    return app


@pytest.mark.usefixtures("invoke")
@pytest.mark.parametrize(
    ("error", "part"),
    [
        (KvloomError("two\nlines [red]"), "Error: two lines [red]"),
        (OSError(28, "No space left on device"), "No space left"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_errors_for_users_are_one_line(error: BaseException, part: str) -> None:
    assert_error(CliRunner().invoke(failing(error), ["fail"]), 1, part.removeprefix("Error: "))


@pytest.mark.usefixtures("invoke")
def test_debug_shows_where_an_error_came_from() -> None:
    error = KvloomError("deep")
    assert CliRunner().invoke(failing(error), ["--debug", "fail"]).exception is error


@pytest.mark.usefixtures("invoke")
def test_a_defect_keeps_its_traceback() -> None:
    error = RuntimeError("a defect")
    assert CliRunner().invoke(failing(error), ["fail"]).exception is error


@pytest.mark.usefixtures("invoke")
def test_ctrl_c_is_exit_code_130() -> None:
    result = CliRunner().invoke(failing(KeyboardInterrupt()), ["fail"])
    assert result.exit_code == 130


def test_a_process_shows_a_traceback_with_debug_only() -> None:
    plain = run_kvloom("ask", "no-such-file", "Q?")
    assert plain.returncode == 1
    assert plain.stderr.startswith("Error: ")
    debug = run_kvloom("--debug", "ask", "no-such-file", "Q?")
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr


@pytest.mark.parametrize("command", [("--help",), ("bench", "speed", "--help")])
def test_a_reader_that_is_gone_is_no_traceback(command: tuple[str, ...]) -> None:
    with subprocess.Popen(
        [*KVLOOM, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
