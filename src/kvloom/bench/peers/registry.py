"""The engines that can be measured, by name.

Knows: the command that starts each worker.
Does not know: what a worker is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from kvloom import RequestError

OURS = "kvloom"


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine and how its worker is started.

    Attributes:
        name: what the user calls it.
        command: program and arguments; another environment is another program.
    """

    name: str
    command: tuple[str, ...]


def known_engines() -> dict[str, Engine]:
    """Return all engines that can be measured, kvloom among them."""
    modules = {
        OURS: "kvloom.bench.peers.kvloom_worker",
        "transformers": "kvloom.bench.peers.transformers_worker",
    }
    # -P: a file beside the user's prompt must not shadow a module.
    return {
        name: Engine(name, (sys.executable, "-P", "-m", module)) for name, module in modules.items()
    }


def choose_engines(peers: tuple[str, ...], known: Mapping[str, Engine]) -> list[Engine]:
    """Return kvloom and the named peers, in this order.

    Raises:
        RequestError: a name is unknown, repeated or kvloom itself.
    """
    names = [name for name in known if name != OURS]
    for name in peers:
        if name not in names:
            raise RequestError(
                f"{name!r} is no peer of this bench; known are: {', '.join(names)}.", param="peer"
            )
    if len(set(peers)) < len(peers):
        raise RequestError("a peer is named twice; name each once.", param="peer")
    return [known[OURS], *(known[name] for name in peers)]
