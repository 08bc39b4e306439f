"""The repairer: documents that users hold become exact while nobody waits, a piece at a time.

Knows: which documents are to become exact, how large a piece is, and whose room it may take.
Does not know: when nobody waits, or why a document is not exact.

What is exact of a document grows from its beginning: a piece is computed behind it, in a document
of its own, and then shown in place of what stood there. There is no other state. So a document may
be changed, forgotten or let go of between any two pieces, and whoever shows its old KV keeps that.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from kvloom.engine.memory import EngineMemory
from kvloom.kv.doc import KVDoc
from kvloom.kv.pool import PAGE_SLOTS, blocks_for
from kvloom.types import Forward, Rows, Taint

logger = logging.getLogger(__name__)
PIECE_ROWS = 64
"""A request that arrives waits for so many rows at most; more at once are no faster per row."""


@dataclass(frozen=True, slots=True)
class _Wish:
    """A document's wish to become exact.

    Attributes:
        tenant: whose it is.
        moment: prefixes that were not used since make room for it.
    """

    tenant: str
    moment: int


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
        self._wanted: dict[KVDoc, _Wish] = {}
        self._has_room = True
        self.num_rows = 0
        self.num_failures = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return (self._has_room or self._memory.pool.free_blocks > 0) and self._next is not None

    def add(self, doc: KVDoc, tenant: str) -> None:
        """Make a document exact, for whoever `hash_tenant` names, if it is not."""
        if doc.exact_length() < doc.length:
            self._wanted[doc] = _Wish(tenant, self._memory.moment)
        self._has_room = True

    def remove(self, doc: KVDoc) -> None:
        """Leave a document as it is."""
        self._wanted.pop(doc, None)
        self._has_room = True

    def note_work(self) -> None:
        """Take note that somebody was served, which may have left room."""
        self._has_room = True

    def step(self) -> tuple[list[int], str] | None:
        """Run the next piece; return tokens and tenant of a document that is exact now."""
        doc = self._next
        assert doc is not None, "a step without work"
        try:
            self._has_room = self._advance(doc)
        except Exception:  # nobody waits for it: what is there serves on
            logger.exception("a document stays as it is: it could not be made exact")
            self.num_failures += 1
            self.remove(doc)
            return None
        if doc.exact_length() < doc.length:
            return None
        tokens, wish = doc.tokens, self._wanted.pop(doc)
        self._memory.publish(doc, wish.tenant)
        return (tokens, wish.tenant) if tokens else None

    @property
    def _next(self) -> KVDoc | None:
        """The document that was added last, of those that nobody works on."""
        return next((doc for doc in reversed(self._wanted) if doc in self._memory.idle), None)

    def _advance(self, doc: KVDoc) -> bool:
        """Let the exact beginning of a document grow; say whether there was room for that."""
        tokens, exact = doc.tokens, doc.exact_length()
        known = self._memory.known_spans(tokens, self._wanted[doc].tenant)
        if sum(span.length for span in known) > exact:
            doc.replace_beginning(known)
        elif exact < len(tokens):
            stop = self._end_of_piece(doc, exact)
            if stop == exact:
                return False
            self._compute(doc, np.array(tokens, dtype=np.int64), exact, stop)
        assert doc.exact_length() > exact or exact == doc.length, "a piece that is not exact"
        return True

    def _end_of_piece(self, doc: KVDoc, start: int) -> int:
        """Return where the next piece ends, as far as there is room for it."""
        stop = min(start + self._piece_rows, _end_of_stale(doc))
        self._memory.make_spare_room(blocks_for(stop - start), self._wanted[doc].moment)
        return min(stop, start + self._memory.pool.free_blocks * PAGE_SLOTS)

    def _compute(self, doc: KVDoc, tokens: np.ndarray, start: int, stop: int) -> None:
        """Run rows behind the exact beginning, and show them."""
        exact = doc.fork()
        try:
            exact.truncate(start)
            exact.expected_length = doc.length  # the next pieces find room right behind this one
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
