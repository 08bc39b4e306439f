"""Both engines on a tiny model, through the command line: the whole bench as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.model.tiny_models import tiny_llama, write_folder


def test_kvloom_and_transformers_generate_the_same_tokens_in_one_run(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", tiny_llama(max_position_embeddings=256))
    output = tmp_path / "report.json"
    command = [sys.executable, "-m", "kvloom", "bench", "speed", "--quick", "--rounds", "1"]
    command += ["--model", str(folder), "--threads", "1", "--kv-memory", "2MiB"]
    done = subprocess.run(
        [*command, "--json", str(output)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    assert "x as fast" in done.stdout
    report = json.loads(output.read_text())
    assert [engine["name"] for engine in report["engines"]] == ["kvloom", "transformers"]
    for engine in report["engines"]:
        assert engine["failure"] is None
        assert engine["peak_rss_bytes"] > engine["ready_rss_bytes"] > 2**26
    assert len(report["figures"]) == 20
    lacking = []
    for row in report["figures"]:
        assert row["failure"] is None
        if row["summary"] is None:
            lacking.append((row["engine"], row["name"]))
            continue
        assert row["summary"]["median"] > 0
        if row["engine"] == "transformers":
            assert row["equal_tokens"] == row["compared_tokens"] > 0
    names = ("edit-72-repaired", "edit-72-shifted", "restart-warm")
    assert lacking == [("transformers", name) for name in names]
    shares = {(share["engine"], share["name"]) for share in report["shares"]}
    assert shares == {
        *(("kvloom", name) for name in (*names, "shared-warm")),
        ("transformers", "shared-warm"),
    }
    restarted = next(r for r in report["results"] if r["task"]["name"] == "restart-warm")
    assert restarted["measurements"][0]["samples"][0]["cached_tokens"] == 63
    warm = next(r for r in report["results"] if r["task"]["name"] == "shared-warm")
    ours, peers = (m["samples"][0]["cached_tokens"] for m in warm["measurements"])
    assert peers == 64
    assert 64 <= ours < 72  # questions may begin alike by chance
    assert not [text for text in report["warnings"] if "reused" in text or "differ" in text]
