"""A tiny model on disk, and two ways to run a command: in this process and in one of its own."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pytest
from typer.testing import CliRunner, Result

from kvloom.bench import case_run
from kvloom.cli import make_app
from tests.model.tiny_models import byte_level_tokenizer, tiny_llama, write_folder

KVLOOM = (sys.executable, "-m", "kvloom")
SMALL = ("--kv-memory", "16MiB", "--threads", "1")


class Invoke(Protocol):
    def __call__(self, *arguments: str, text: str | bytes | None = None) -> Result: ...


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random model that has a chat template and takes 4,096 tokens."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return str(write_folder(folder, tiny_llama(max_position_embeddings=4096)))


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a model without a chat template that takes 128 tokens."""
    folder = tmp_path_factory.mktemp("models") / "plain"
    return str(write_folder(folder, tiny_llama(), byte_level_tokenizer(chat_template=None)))


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KVLOOM_MODEL", "KVLOOM_API_KEY", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KVLOOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KVLOOM_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def invoke() -> Iterator[Invoke]:
    """Run a command in this process; its logging is undone afterwards."""
    loggers = [logging.getLogger(), logging.getLogger("kvloom")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]

    def run(*arguments: str, text: str | bytes | None = None) -> Result:
        restore()
        return CliRunner().invoke(make_app(), list(arguments), input=text)

    def restore() -> None:
        for logger, level, handlers in before:
            logger.setLevel(level)
            logger.handlers[:] = handlers

    yield run
    restore()


def run_kvloom(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    return subprocess.run(
        [*KVLOOM, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def assert_error(result: Result, code: int, *parts: str) -> None:
    """The command failed with one line on standard error that holds all parts, and no more."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]
    assert "Traceback" not in result.stderr
    if code == 1:
        assert result.stderr.strip() == lines[0]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not look for load before a bench."""
    monkeypatch.setattr(case_run, "watch_idle", lambda: 0.0)


def killed_and_gone_on_with(command: Sequence[str], report: Path) -> tuple[list[Any], list[Any]]:
    """Kill a bench once it has kept something, run it again, and return both lists of results."""
    with subprocess.Popen(
        [*KVLOOM, *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        while not report.exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    before = json.loads(report.read_text())["results"]
    done = run_kvloom(*command)
    assert done.returncode == 0, done.stderr
    return before, json.loads(report.read_text())["results"]
