"""The repairer: documents that users hold become exact while nobody waits, a piece at a time.

Knows: which documents are to become exact, how large a piece is, and that it may not make room.
Does not know: when nobody waits, or why a document is not exact.

What is exact of a document grows from its beginning: a piece is computed behind it, in a document
of its own, and then shown in place of what stood there. There is no other state. So a document may
be changed, forgotten or let go of between any two pieces, and whoever shows its old KV keeps that.
"""

from __future__ import annotations

import logging

import numpy as np

from kvloom.engine.memory import EngineMemory
from kvloom.kv.doc import KVDoc
from kvloom.kv.pool import PAGE_SLOTS
from kvloom.types import Forward, Rows, Taint

logger = logging.getLogger(__name__)
PIECE_ROWS = 64
"""A request that arrives waits for so many rows at most; more at once are no faster per row."""


class Repairer:
    """The documents of one engine that are to become exact.

    Args:
        memory: knows which documents users hold, and what is exact already.
        runner: runs the rows.
        step_rows: rows of one forward pass at most.

    Attributes:
        num_rows: rows that were run.
        num_failures: documents that were given up.
    """

    def __init__(self, memory: EngineMemory, runner: Forward, step_rows: int) -> None:
        self._memory = memory
        self._runner = runner
        self._piece_rows = min(step_rows, PIECE_ROWS)
        self._wanted: dict[KVDoc, str] = {}
        self.num_rows = 0
        self.num_failures = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything: for want of a free block it would not."""
        return self._memory.pool.free_blocks > 0 and self._next is not None

    def add(self, doc: KVDoc, tenant: str) -> None:
        """Make a document exact, for whoever `hash_tenant` names, if it is not."""
        if doc.exact_length() < doc.length:
            self._wanted[doc] = tenant

    def remove(self, doc: KVDoc) -> None:
        """Leave a document as it is."""
        self._wanted.pop(doc, None)

    def step(self) -> tuple[list[int], str] | None:
        """Run the next piece; return tokens and tenant of a document that is exact now."""
        doc = self._next
        assert doc is not None, "a step without work"
        try:
            self._advance(doc)
        except Exception:  # nobody waits for it: what is there serves on
            logger.exception("a document stays as it is: it could not be made exact")
            self.num_failures += 1
            self.remove(doc)
            return None
        if doc.exact_length() < doc.length:
            return None
        self._memory.publish(doc)
        tokens, tenant = doc.tokens, self._wanted.pop(doc)
        return (tokens, tenant) if tokens else None

    @property
    def _next(self) -> KVDoc | None:
        """The document that was added last, of those that nobody works on."""
        return next((doc for doc in reversed(self._wanted) if doc in self._memory.idle), None)

    def _advance(self, doc: KVDoc) -> None:
        """Let the exact beginning of a document grow, by what is known or by a piece."""
        tokens, exact = doc.tokens, doc.exact_length()
        known = self._memory.known_spans(tokens)
        if sum(span.length for span in known) > exact:
            doc.replace_beginning(known)
        elif exact < len(tokens):
            self._compute(doc, np.array(tokens, dtype=np.int64), exact)
        assert doc.exact_length() > exact or exact == doc.length, "a piece that is not exact"

    def _compute(self, doc: KVDoc, tokens: np.ndarray, start: int) -> None:
        """Run the next rows behind the exact beginning, as far as free blocks go."""
        room = min(self._piece_rows, self._memory.pool.free_blocks * PAGE_SLOTS)
        stop = min(start + room, _end_of_stale(doc))
        exact = doc.fork()
        try:
            exact.truncate(start)
            pos = np.arange(start, stop, dtype=np.int64) + doc.start_pos
            self._runner.forward([Rows(exact, tokens[start:stop], pos, "none")])
            exact.close_tail()
            doc.replace_beginning(exact.order)
        finally:
            exact.close()
        self.num_rows += stop - start


def _end_of_stale(doc: KVDoc) -> int:
    """Return where the first stretch that is not exact ends."""
    place, begun = 0, False
    for span, taint in doc.taints():
        if begun and taint is Taint.EXACT:
            break
        begun |= taint is not Taint.EXACT
        place += span.length
    return place
