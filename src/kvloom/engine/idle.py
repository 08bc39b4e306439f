"""Idle work: what is done while nobody waits, a little at a time.

Knows: what came up and may be stored, and how long an end may take.
Does not know: how they are stored.

Nothing is kept in memory for it: a prefix that is forgotten before its turn is not stored.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from kvloom.engine.memory import EngineMemory
from kvloom.engine.shelf import Shelf
from kvloom.kv.doc import KVDoc

logger = logging.getLogger(__name__)
MAX_WAITING = 256
"""Texts that may wait to be stored; the oldest is dropped for one more, and counted."""
CLOSE_S = 10.0


class IdleWork:
    """The idle work of one engine.

    Args:
        memory: knows the prefixes, and the shelf if there is one.
    """

    def __init__(self, memory: EngineMemory) -> None:
        self._memory = memory
        self._waiting: deque[Callable[[Shelf], None]] = deque(maxlen=MAX_WAITING)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting)

    def put_by(self, tokens: Sequence[int], tenant: str) -> None:
        """Store a known prefix when there is time, for whoever `hash_tenant` names."""
        if self._memory.tree is not None:
            self.later(partial(self._keep_prefix, tokens, tenant))

    def later(self, task: Callable[[Shelf], None]) -> None:
        """Store something else when there is time; without a shelf there is nothing to do."""
        shelf = self._memory.shelf
        if shelf is None:
            return
        if len(self._waiting) == MAX_WAITING:
            shelf.counts["dropped"] += 1
        self._waiting.append(task)

    def step(self) -> None:
        """Store what has waited longest, as far as it is still known."""
        shelf, task = self._memory.shelf, self._waiting.popleft()
        if shelf is None:
            return
        try:
            task(shelf)
        except Exception:  # the store is a convenience: nothing depends on it
            logger.exception("KV was not stored")
            shelf.counts["dropped"] += 1

    def _keep_prefix(self, tokens: Sequence[int], tenant: str, shelf: Shelf) -> None:
        tree = self._memory.tree
        if tree is None:
            return
        doc = KVDoc(self._memory.pool, self._memory.root, tree.match(tokens))
        try:
            shelf.keep(doc, tenant)
        finally:
            doc.close()

    def close(self) -> None:
        """Store what waits, as far as time allows, and let go of the store."""
        end_s = time.monotonic() + CLOSE_S
        while self.has_work and time.monotonic() < end_s:
            self.step()
        self._waiting.clear()
        if self._memory.shelf is not None:
            self._memory.shelf.close()
