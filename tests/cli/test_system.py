"""The machine as plain data."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import psutil
import torch

from kvloom.cli.system import cpu_name, describe_system


def test_system_says_what_python_and_torch_say() -> None:
    system = json.loads(json.dumps(describe_system()))
    assert system["kvloom"] == metadata.version("kvloom")
    assert system["threads"] == torch.get_num_threads()
    assert system["memory_bytes"] == psutil.virtual_memory().total


def test_the_processor_is_read_from_the_system(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Fast: 9000\nmodel name\t: Other\n")
    assert cpu_name(file) == "Fast: 9000"


def test_without_a_name_there_is_still_an_answer(tmp_path: Path) -> None:
    assert cpu_name(tmp_path / "none")
    (tmp_path / "arm").write_text("model name\t:\nBogoMIPS : 5")
    assert cpu_name(tmp_path / "arm")
