"""The engines that can be measured, by name.

Knows: the command that starts each worker, in which environment.
Does not know: what a worker is asked, or how an environment is made.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvloom import RequestError
from kvloom.bench.peers.environments import Home, home_of
from kvloom.bench.peers.recipes import RECIPES

OURS = "kvloom"


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine and how its worker is started.

    Attributes:
        name: what the user calls it.
        command: program and arguments; another environment is another program.
        home: of a peer with an environment of its own.
        missing: why it cannot be started.
    """

    name: str
    command: tuple[str, ...]
    home: Home | None = None
    missing: str | None = None

    @property
    def format(self) -> str | None:
        """What it computes in whatever the others do; None if it does what it is told."""
        return None if self.home is None else self.home.recipe.format


def known_engines(cache_dir: Path | None = None) -> dict[str, Engine]:
    """Return all engines that can be measured, kvloom among them, installed or not."""
    modules = {
        OURS: "kvloom.bench.peers.kvloom_worker",
        "transformers": "kvloom.bench.peers.transformers_worker",
    }
    # -P: a file beside the user's prompt must not shadow a module.
    known = {
        name: Engine(name, (sys.executable, "-P", "-m", module)) for name, module in modules.items()
    }
    starter = str(Path(__file__).with_name("start_worker.py"))
    for name, recipe in RECIPES.items():
        home = home_of(recipe, cache_dir)
        missing = None
        if home.installed() is None:
            missing = f"{name} is not installed; run `kvloom bench peers install {name}`."
        # -I: nothing of this environment's variables reaches another one.
        command = (str(home.python), "-I", starter, recipe.module)
        known[name] = Engine(name, command, home, missing)
    return known


def choose_engines(peers: tuple[str, ...], known: Mapping[str, Engine]) -> list[Engine]:
    """Return kvloom and the named peers, in this order.

    Raises:
        RequestError: a name is unknown, repeated or kvloom itself.
    """
    names = [name for name in known if name != OURS]
    for name in peers:
        if name not in names:
            raise RequestError(
                f"{name!r} is no peer of this bench; known are: {', '.join(names)}.", param="peers"
            )
    if len(set(peers)) < len(peers):
        raise RequestError("a peer is named twice; name each once.", param="peers")
    return [known[OURS], *(known[name] for name in peers)]
