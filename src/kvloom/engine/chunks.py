"""Chunks: stretches of text whose KV was computed alone, to be joined in any order.

Knows: which chunks are in memory, and that room may be made at their expense.
Does not know: prompts, or how chunks are repaired.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvloom.engine.memory import EngineMemory
from kvloom.kv.doc import KVDoc
from kvloom.kv.span import Span, cut
from kvloom.store.key import hash_tokens


class Chunks:
    """The chunks of one engine.

    Each was computed behind a short sink, which is no part of it: the first tokens of any text
    draw attention that has nothing to do with what they say.

    Args:
        memory: holds the documents, and forgets them when room is needed.
    """

    def __init__(self, memory: EngineMemory) -> None:
        self._memory = memory
        self._docs: dict[tuple[bytes, bytes, str], KVDoc] = {}

    def __len__(self) -> int:
        return len(self._docs)

    def find(self, sink: Sequence[int], tokens: Sequence[int], tenant: str) -> KVDoc | None:
        """Return the document of a sink and a chunk, as the one used last; None if there is none.

        It is protected from being forgotten until `EngineMemory.unprotect`.
        """
        key = (hash_tokens(sink), hash_tokens(tokens), tenant)
        doc = self._docs.get(key)
        if doc is None:
            return None
        if doc.length < len(sink) + len(tokens):  # it was forgotten
            del self._docs[key]
            self._memory.forget(doc)
            return None
        self._memory.protect(doc)
        return doc

    def add(self, sink: Sequence[int], tokens: Sequence[int], tenant: str, doc: KVDoc) -> None:
        """Take a document of a sink and a chunk that the memory holds; protect it likewise."""
        key = (hash_tokens(sink), hash_tokens(tokens), tenant)
        old = self._docs.pop(key, None)
        if old is not None:
            self._memory.forget(old)
        self._docs[key] = doc
        self._memory.protect(doc)

    def clear(self) -> None:
        """Let go of all chunks."""
        for doc in self._docs.values():
            self._memory.forget(doc)
        self._docs.clear()


def chunk_spans(doc: KVDoc, sink: Sequence[int]) -> tuple[Span, ...]:
    """Return what a document shows behind its sink, with closed segments."""
    doc.close_tail()
    return tuple(cut(doc.order, len(sink), doc.length))
