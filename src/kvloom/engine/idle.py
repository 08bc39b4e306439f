"""Idle work: what is done while nobody waits, a little at a time.

Knows: what came up and may be stored, what comes first, and how long an end may take.
Does not know: how anything is stored, or how documents become exact.

Nothing is kept in memory for it: a prefix that is forgotten before its turn is not stored.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from kvloom.engine.memory import EngineMemory
from kvloom.engine.repairer import Repairer
from kvloom.engine.shelf import Shelf
from kvloom.kv.doc import KVDoc

logger = logging.getLogger(__name__)
MAX_WAITING = 256
"""Texts that may wait to be stored; the oldest is dropped for one more, and counted."""
QUIET_S = 0.5
"""Documents are made exact so long after the last request: the next one is often about to come."""
CLOSE_S = 10.0


class IdleWork:
    """The idle work of one engine.

    Args:
        memory: knows the prefixes, and the shelf if there is one.
        repairer: makes documents exact; None leaves them as they are.
    """

    def __init__(self, memory: EngineMemory, repairer: Repairer | None) -> None:
        self._memory = memory
        self._repairer = repairer
        self._waiting: deque[Callable[[Shelf], None]] = deque(maxlen=MAX_WAITING)
        self._quiet_since_s = time.monotonic()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything now."""
        return self.begins_in_s == 0.0

    @property
    def begins_in_s(self) -> float | None:
        """Seconds until a step would do anything; None if time alone does not bring that about."""
        if self._waiting:
            return 0.0
        if self._repairer is None or not self._repairer.has_work:
            return None
        return max(self._quiet_since_s + QUIET_S - time.monotonic(), 0.0)

    def note_work(self) -> None:
        """Take note that somebody was served: what follows often comes soon."""
        self._quiet_since_s = time.monotonic()
        if self._repairer is not None:
            self._repairer.note_work()

    def repair(self, doc: KVDoc, tenant: str) -> None:
        """Make a held document exact when there is time, for whoever `hash_tenant` names."""
        self.note_work()
        if self._repairer is not None:
            self._repairer.add(doc, tenant)

    def release(self, doc: KVDoc) -> None:
        """Take note that nobody holds a document any more."""
        if self._repairer is not None:
            self._repairer.remove(doc)

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

    @property
    def num_waiting(self) -> int:
        """Stretches of KV that wait to be stored."""
        return len(self._waiting)

    def store_next(self) -> bool:
        """Store what has waited longest, if anything waits; say whether more does."""
        if self._waiting:
            self._store()
        return bool(self._waiting)

    def step(self) -> None:
        """Store what has waited longest, or go on with a document."""
        if self._waiting:
            self._store()
        elif self._repairer is not None and (done := self._repairer.step()) is not None:
            self.put_by(*done)

    def close(self) -> None:
        """Store what waits, as far as time allows, and let go of the store."""
        end_s = time.monotonic() + CLOSE_S
        while self._waiting and time.monotonic() < end_s:
            self._store()
        self._waiting.clear()
        if self._memory.shelf is not None:
            self._memory.shelf.close()

    def _store(self) -> None:
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
        doc = KVDoc(self._memory.pool, self._memory.root, tree.match(tokens, tenant))
        try:
            shelf.keep(doc, tenant)
        finally:
            doc.close()
