"""Both engines on a tiny model, through the command line: the bench as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.model.tiny_models import tiny_llama, write_folder

APPROXIMATE = ("edit-72-repaired", "edit-72-shifted")


def run_bench(folder: Path, *more: str) -> tuple[str, dict[str, Any]]:
    """Return what the bench printed and wrote."""
    model = write_folder(folder / "model", tiny_llama(max_position_embeddings=256))
    output = folder / "report.json"
    command = [sys.executable, "-m", "kvloom", "bench", "speed", "--quick", "--rounds", "1"]
    command += ["--model", str(model), "--threads", "1", "--kv-memory", "2MiB", *more]
    done = subprocess.run(
        [*command, "--json", str(output)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(output.read_text())


def cached_tokens(report: dict[str, Any], task: str) -> list[int]:
    """Return what each engine that can do it said it had of the prompt."""
    (result,) = [r for r in report["results"] if r["task"]["name"] == task]
    return [m["samples"][0]["cached_tokens"] for m in result["measurements"] if m["samples"]]


def test_kvloom_and_transformers_generate_the_same_tokens_in_one_run(tmp_path: Path) -> None:
    printed, report = run_bench(tmp_path, "--tasks", "prefill,decode,batch,shared,edit")
    assert "x as fast" in printed
    assert [engine["name"] for engine in report["engines"]] == ["kvloom", "transformers"]
    for engine in report["engines"]:
        assert engine["failure"] is None
        assert engine["peak_rss_bytes"] > engine["ready_rss_bytes"] > 2**26
    assert len(report["figures"]) == 2 * 8
    lacking = []
    for row in report["figures"]:
        assert row["failure"] is None
        if row["summary"] is None:
            lacking.append((row["engine"], row["name"]))
            continue
        assert row["summary"]["median"] > 0
        if row["engine"] == "transformers":
            assert row["equal_tokens"] == row["compared_tokens"] > 0
    assert lacking == [("transformers", name) for name in APPROXIMATE]
    shares = {(share["engine"], share["name"]) for share in report["shares"]}
    ours = {("kvloom", name) for name in (*APPROXIMATE, "shared-warm")}
    assert shares == {*ours, ("transformers", "shared-warm")}
    known, peers = cached_tokens(report, "shared-warm")
    assert peers == 64
    assert 64 <= known < 72  # questions may begin alike by chance
    assert not [text for text in report["warnings"] if "reused" in text or "differ" in text]


@pytest.mark.long
def test_a_prompt_is_known_after_a_restart(tmp_path: Path) -> None:
    _, report = run_bench(tmp_path)
    assert len(report["figures"]) == 2 * 10
    assert cached_tokens(report, "restart-warm") == [63]
    shares = [share for share in report["shares"] if share["name"] == "restart-warm"]
    assert [share["engine"] for share in shares] == ["kvloom"]
