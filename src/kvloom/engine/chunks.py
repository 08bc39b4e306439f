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
        """Return a fork of the document of a sink and a chunk; None if there is none.

        The fork is protected from being forgotten until the receiver lets go of it.
        """
        self._drop_forgotten()
        doc = self._docs.get(_key(sink, tokens, tenant))
        if doc is None:
            return None
        self._memory.hold(doc)
        return self._memory.fork_protected(doc)

    def add(
        self, sink: Sequence[int], tokens: Sequence[int], tenant: str, doc: KVDoc
    ) -> KVDoc | None:
        """Take a document of a sink and a chunk that the memory holds; return what `find` does."""
        key = _key(sink, tokens, tenant)
        old = self._docs.pop(key, None)
        if old is not None:
            self._memory.forget(old)
        self._docs[key] = doc
        return self.find(sink, tokens, tenant)

    def clear(self) -> None:
        """Let go of all chunks."""
        for doc in self._docs.values():
            self._memory.forget(doc)
        self._docs.clear()

    def _drop_forgotten(self) -> None:
        for key in [key for key, doc in self._docs.items() if doc.length == 0]:
            self._memory.forget(self._docs.pop(key))


def _key(sink: Sequence[int], tokens: Sequence[int], tenant: str) -> tuple[bytes, bytes, str]:
    return hash_tokens(sink), hash_tokens(tokens), tenant


def chunk_spans(doc: KVDoc, sink: Sequence[int]) -> tuple[Span, ...]:
    """Return what a document shows behind its sink, with closed segments."""
    doc.close_tail()
    return tuple(cut(doc.order, len(sink), doc.length))
