"""The `kvloom` object of a reply: what it was made of, for those who ask or name a document.

Knows: receipts, documents, joined parts and how a gap was filled.
Does not know: the rest of the reply.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvloom.outputs import Fidelity, Usage
from kvloom.serve.documents import EXACT_STATES, Snapshot
from kvloom.serve.infill import InfillKind
from kvloom.serve.joins import Joined


@dataclass(frozen=True, slots=True)
class Notes:
    """What a reply says of its own making.

    Attributes:
        wanted: whether it says anything.
        documents: those that were read.
        infill: how a gap was filled; None where there was none.
        ignored: fields that change nothing here.
        joined: the beginning that was joined; None where nothing was.
        read_as_text: why documents and chunks were not joined as was asked for.
    """

    wanted: bool = False
    documents: tuple[Snapshot, ...] = ()
    infill: InfillKind | None = None
    ignored: tuple[str, ...] = ()
    joined: Joined | None = None
    read_as_text: str | None = None

    def fields(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """Return the `kvloom` field of a reply, or nothing.

        Args:
            usages: one receipt per prompt.
        """
        if not (self.wanted or self.documents or self.infill):
            return {}
        notes: dict[str, Any] = {"receipt": self._receipt(usages)}
        if self.documents:
            notes["documents"] = [{"id": x.id, "version": x.version} for x in self.documents]
        if self.joined is not None:
            notes["receipt"] |= self.joined.receipt_fields()
            notes["parts"] = self.joined.part_fields()
        if self.read_as_text is not None:
            notes["read_as_text"] = self.read_as_text
        if self.infill is not None:
            notes["infill"] = self.infill
        if self.ignored:
            notes["ignored"] = list(self.ignored)
        return {"kvloom": notes}

    def _receipt(self, usages: Sequence[Usage]) -> dict[str, Any]:
        tokens: Counter[str] = Counter()
        nbytes: Counter[str] = Counter()
        for usage in usages:
            tokens.update(usage.provenance.tokens)
            nbytes.update(usage.provenance.nbytes)
        fidelity: Fidelity = "exact"
        if not set(tokens) <= EXACT_STATES:
            fidelity = self._approximate
        return {
            "fidelity": fidelity,
            "tokens": dict(tokens),
            "bytes": dict(nbytes),
            "cached_tokens": sum(usage.cached_tokens for usage in usages),
            "computed_tokens": sum(usage.computed_tokens for usage in usages),
        }

    @property
    def _approximate(self) -> Fidelity:
        """How KV came about that is not all exact."""
        if self.joined is not None:
            return self.joined.receipt.fidelity
        return self.documents[0].fidelity if self.documents else "shifted"
