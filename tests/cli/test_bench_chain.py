"""`kvloom bench chain` edits, compares and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvloom.bench import chain as chain_module

from .conftest import Invoke


def test_a_chain_is_measured_shown_and_written(
    invoke: Invoke, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_module, "watch_idle", lambda: 0.0)
    file = tmp_path / "chain.json"
    command = ("bench", "chain", "--model", tiny_model, "--threads", "1", "--kv-memory", "16MiB")
    sizes = ("--edits", "5", "--context", "300", "--dtype", "float32")
    done = invoke(*command, *sizes, "--json", str(file))
    assert done.exit_code == 0, done.output
    assert "after 5 edits" in done.stdout
    content = json.loads(file.read_text())
    assert len(content["edit_s"]) == 5
    assert content["options"]["settings"]["dtype"] == "float32"


@pytest.mark.parametrize("arguments", [("--edits", "0"), ("--json", "no-such-folder/a.json")])
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    invoke: Invoke, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain_module, "run_chain", None)
    assert invoke("bench", "chain", *arguments).exit_code == 2
