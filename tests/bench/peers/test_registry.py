"""Every engine has a worker that starts; transformers stays in its own process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from kvloom.bench.peers.registry import OURS, choose_engines, known_engines


def test_every_known_engine_names_a_module_that_exists() -> None:
    known = known_engines()
    assert OURS in known
    for name, engine in known.items():
        assert engine.name == name
        assert engine.command[0] == sys.executable
        assert importlib.util.find_spec(engine.command[-1]) is not None


def test_kvloom_comes_first() -> None:
    chosen = choose_engines(("transformers",), known_engines())
    assert [engine.name for engine in chosen] == ["kvloom", "transformers"]


def test_the_bench_itself_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, kvloom.bench.speed, kvloom.bench.show\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
