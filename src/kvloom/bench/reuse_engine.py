"""An engine that may begin anew between two requests.

Knows: how it is opened.
Does not know: what is asked of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvloom import LLM


class Engines:
    """One engine after the other.

    Args:
        opened: opens one, with a store if it restarts.
        restarts: whether `restart` does so.

    Attributes:
        llm: the engine of now.
    """

    def __init__(self, opened: Callable[[], LLM], *, restarts: bool = False) -> None:
        self._opened, self._restarts = opened, restarts
        self.llm = opened()

    def restart(self) -> None:
        """Where that is wanted, close the engine and open the next; KV lies on disk then."""
        if self._restarts:
            self.llm.close()
            self.llm = self._opened()

    def close(self) -> None:
        """Close the engine of now."""
        self.llm.close()
