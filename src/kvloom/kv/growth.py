"""Growth: whether a step reads what the last one read, and one slot more per document.

Knows: what documents showed in the last step, and where tiles of slots end.
Does not know: plans; who made one for the last step may then let it grow instead of making another.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.kv.doc import KVDoc
from kvloom.kv.pool import PAGE_SLOTS
from kvloom.kv.span import Span


class Growth:
    """Remembers the documents of the last step."""

    def __init__(self) -> None:
        self._seen: list[tuple[KVDoc, tuple[Span, ...]]] = []
        self._may_grow = False

    def follows(self, docs: Sequence[KVDoc], num_rows: int, *, in_tile: bool) -> bool:
        """Whether every document is the last step's with one more row.

        Args:
            docs: they show the rows that are about to be written.
            num_rows: rows of all documents.
            in_tile: ask as well that no row begins a tile.
        """
        before, self._seen = self._seen, [(doc, doc.spans) for doc in docs]
        grew = (
            self._may_grow
            and num_rows == len(docs) == len(before)
            and all(
                now is doc and _grew_by_one(shown, spans, in_tile)
                for (doc, shown), (now, spans) in zip(before, self._seen, strict=True)
            )
        )
        if not grew:
            self._may_grow = num_rows == len(docs) and all(map(_shows_all, docs))
        return grew


def _shows_all(doc: KVDoc) -> bool:
    """Whether the last row sees all plain slots: none that it will only see further on."""
    ends = (span.segment.base + span.stop + span.shift for span in doc.spans)
    placed = (span.segment.placed for span in doc.spans)
    return all(apart or end <= doc.end_pos for end, apart in zip(ends, placed, strict=True))


def _grew_by_one(before: tuple[Span, ...], now: tuple[Span, ...], in_tile: bool) -> bool:
    if not before or len(before) != len(now) or before[:-1] != now[:-1]:
        return False
    old, new = before[-1], now[-1]
    if new.segment is not old.segment or new.hidden or new.segment.placed:
        return False
    if in_tile and (new.segment.first_slot + old.stop) % PAGE_SLOTS == 0:
        return False
    return (new.start, new.stop, new.shift) == (old.start, old.stop + 1, old.shift)
