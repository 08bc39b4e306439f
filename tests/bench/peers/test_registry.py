"""Every engine has a worker that starts; transformers stays in its own process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from kvloom.bench.peers.environments import install
from kvloom.bench.peers.recipes import RECIPES
from kvloom.bench.peers.registry import OURS, choose_engines, known_engines

from .fake_homes import FakeRun, silent


def test_every_known_engine_names_a_module_that_exists(tmp_path: Path) -> None:
    known = known_engines(tmp_path)
    assert set(known) == {OURS, "transformers", *RECIPES}
    for name, engine in known.items():
        assert engine.name == name
        assert (engine.command[0] == sys.executable) == (name not in RECIPES)
        assert importlib.util.find_spec(engine.command[-1]) is not None


def test_a_peer_that_is_not_installed_says_how_to_install_it(tmp_path: Path) -> None:
    engine = known_engines(tmp_path)["llama.cpp"]
    assert "`kvloom bench peers install llama.cpp`" in (engine.missing or "")
    assert engine.home is not None
    install(engine.home, silent, run=FakeRun())
    assert known_engines(tmp_path)["llama.cpp"].missing is None


def test_a_peer_with_a_recipe_has_a_format_of_its_own() -> None:
    known = known_engines()
    assert known["openvino"].format == "int8"
    assert known[OURS].format is known["transformers"].format is None


def test_kvloom_comes_first() -> None:
    chosen = choose_engines(("transformers",), known_engines())
    assert [engine.name for engine in chosen] == ["kvloom", "transformers"]


def test_the_bench_itself_loads_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, kvloom.bench.speed, kvloom.bench.show\n"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0
