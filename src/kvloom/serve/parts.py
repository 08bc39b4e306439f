"""Texts and kept documents, put together to one prompt.

Knows: which parts a prompt has, and what KV the engine may start it with.
Does not know: HTTP, or how the engine uses KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvloom.outputs import Fidelity
from kvloom.serve.documents import Snapshot, is_at_least


@dataclass(frozen=True, slots=True)
class DocumentPart:
    """A place in a message where a document's text stands.

    Attributes:
        document_id: the document.
    """

    document_id: str


Content = tuple[str | DocumentPart, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt as it goes to the engine.

    Attributes:
        tokens: the whole prompt.
        tenant: digest of whose KV may answer, and whose this becomes.
        base: KV of a document that it may start with; None for none.
        exact_only: take of it what equals a fresh prefill, and no more.
    """

    tokens: list[int]
    tenant: str
    base: Any = None
    exact_only: bool = False


def joined(
    parts: Sequence[Snapshot | list[int]], tenant: str, fidelity: Fidelity | None = None
) -> Ask:
    """Return the prompt that parts come to, one behind the other.

    This is the one place that decides what of the parts' KV is used: that of a document at the
    beginning. Others behind it are read as tokens.

    Args:
        parts: documents and token ids.
        tenant: digest of whose KV may answer; that of the documents.
        fidelity: the least that the KV must be; None takes a document as it is.
    """
    tokens: list[int] = []
    for part in parts:
        tokens += part.tokens if isinstance(part, Snapshot) else part
    first = parts[0] if parts else None
    if not isinstance(first, Snapshot):
        return Ask(tokens, tenant)
    return Ask(tokens, tenant, first.kv, exact_only=not is_at_least(first.fidelity, fidelity))
