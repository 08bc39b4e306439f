"""Texts, chunks and kept documents, put together to one prompt.

Knows: which parts a prompt has, and what KV the engine may start it with.
Does not know: HTTP, or how the engine uses KV.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvloom.outputs import Fidelity
from kvloom.serve.content import ChunkPart
from kvloom.serve.documents import Snapshot, is_at_least


@dataclass(frozen=True, slots=True)
class PromptPart:
    """A stretch of a prompt.

    Attributes:
        tokens: token ids; of a document, those of the client's own text at least.
        source: the document or the chunk that they are; None for text that is computed wherever
            it stands.
    """

    tokens: tuple[int, ...]
    source: Snapshot | ChunkPart | None = None

    @property
    def first_row(self) -> int:
        """Tokens of the document before the first one that is used here."""
        whole = self.source.tokens if isinstance(self.source, Snapshot) else self.tokens
        return len(whole) - len(self.tokens)


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

    def followed_by(self, tokens: Sequence[int]) -> Ask:
        """Return the prompt that goes on with more tokens."""
        return replace(self, tokens=[*self.tokens, *tokens])


def joined(parts: Sequence[PromptPart], tenant: str, fidelity: Fidelity | None = None) -> Ask:
    """Return the prompt that parts come to, one behind the other, where nothing is joined.

    Of the parts' KV, that of a document at the beginning is used. All else is read as tokens.

    Args:
        parts: of the prompt.
        tenant: digest of whose KV may answer; that of the documents.
        fidelity: the least that the KV must be; None takes a document as it is.
    """
    tokens = [token for part in parts for token in part.tokens]
    first = parts[0] if parts else None
    if first is None or not isinstance(first.source, Snapshot) or first.first_row:
        return Ask(tokens, tenant)
    document = first.source
    exact_only = not is_at_least(document.fidelity, fidelity)
    return Ask(tokens, tenant, document.kv, exact_only)


def is_joined(parts: Sequence[PromptPart], fidelity: Fidelity | None) -> bool:
    """Whether KV of parts is to be shown at other places than it was computed at.

    One document at the beginning whose KV is good enough stands where it was computed.
    """
    num_reusable = sum(part.source is not None for part in parts)
    if fidelity in (None, "exact") or num_reusable == 0:
        return False
    document = parts[0].source
    if num_reusable == 1 and isinstance(document, Snapshot) and parts[0].first_row == 0:
        return not is_at_least(document.fidelity, fidelity)
    return True


def cut_end(parts: Sequence[PromptPart]) -> tuple[list[PromptPart], list[int]]:
    """Return the parts up to the last one that has KV, and the tokens behind it."""
    beginning = list(parts)
    end: list[int] = []
    while beginning and beginning[-1].source is None:
        end = [*beginning.pop().tokens, *end]
    return beginning, end
