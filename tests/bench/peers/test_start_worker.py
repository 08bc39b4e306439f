"""A worker starts in an environment that holds neither kvloom nor anything of kvloom's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from kvloom.bench.peers import start_worker

STARTER = str(start_worker.__file__)


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run the starter without site packages, as far from kvloom's environment as can be."""
    return subprocess.run(
        [sys.executable, "-I", "-S", STARTER, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_peers_worker_answers_where_its_engine_is_missing() -> None:
    for name in ("llama_cpp", "openvino", "onnxruntime", "vllm", "ctranslate2"):
        request = {"do": "load", "model": "m", "dtype": "auto", "threads": 1, "kv_memory": "1MiB"}
        done = run(f"kvloom.bench.peers.{name}_worker", text=json.dumps(request) + "\n")
        (line,) = done.stdout.splitlines()
        assert "Error" in json.loads(line)["error"], done.stderr
        assert done.returncode == 0


def test_nothing_beside_the_package_becomes_importable(tmp_path: Path) -> None:
    package = tmp_path / "parcel"
    package.mkdir()
    (package / "__init__.py").write_text("sent = True\n")
    (package / "inner.py").write_text("import parcel\nassert parcel.sent\n")
    (tmp_path / "beside.py").write_text("")
    program = (
        f"import sys; sys.path.insert(0, {str(Path(STARTER).parent)!r})\n"
        "import pathlib, start_worker, importlib.util\n"
        f"start_worker.import_package(pathlib.Path({str(package)!r}))\n"
        "import parcel.inner\n"
        "assert importlib.util.find_spec('beside') is None\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
