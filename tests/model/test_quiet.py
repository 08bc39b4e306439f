"""Bars and warnings of transformers, while kvloom loads and afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, modeling_gguf_pytorch_utils
from transformers.utils import logging

from kvloom.model.gguf_reader import read_gguf
from kvloom.model.quiet import quiet_transformers
from tests.model.tiny_models import LAYERS, write_folder, write_gguf


def test_bars_become_progress(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path)
    capfd.readouterr()
    calls: list[tuple[str, int, int]] = []
    with quiet_transformers(lambda *call: calls.append(call), "Loading"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {call[0] for call in calls} == {"Loading"}
    assert calls[-1][1] == calls[-1][2] == len(dict(model.named_parameters()))
    assert capfd.readouterr() == ("", "")


def test_reading_gguf_is_silent_and_counts_tensors(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    calls: list[tuple[str, int, int]] = []
    read_gguf(path, tmp_path, lambda *call: calls.append(call))
    assert ("Dequantising weights", 2 + 9 * LAYERS, 2 + 9 * LAYERS) in calls
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before_afterwards(fails: bool) -> None:
    verbosity = logging.get_verbosity()
    bar = modeling_gguf_pytorch_utils.tqdm
    try:
        with quiet_transformers(None, "Loading"):
            assert logging.get_verbosity() == logging.ERROR
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert logging.get_verbosity() == verbosity
    assert modeling_gguf_pytorch_utils.tqdm is bar
    assert logging.set_tqdm_hook(None) is None
