"""Engines begin anew only where that is wanted, and one is open at a time."""

from __future__ import annotations

from typing import Any

import pytest

from kvloom.bench.reuse_engine import Engines


class Engine:
    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("restarts", [False, True])
def test_one_engine_is_open_at_a_time(restarts: bool) -> None:
    made: list[Any] = []

    def opened() -> Any:
        assert all(engine.closed for engine in made)
        made.append(Engine())
        return made[-1]

    engines = Engines(opened, restarts=restarts)
    for _ in range(3):
        engines.restart()
        assert engines.llm is made[-1]
        assert not made[-1].closed
    assert len(made) == (4 if restarts else 1)
    engines.close()
    assert all(engine.closed for engine in made)
