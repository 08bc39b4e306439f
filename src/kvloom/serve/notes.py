"""The `kvloom` object of a reply: what it was made of, for those who ask or name a document.

Knows: receipts, documents and how a gap was filled.
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


@dataclass(frozen=True, slots=True)
class Notes:
    """What a reply says of its own making.

    Attributes:
        wanted: whether it says anything.
        documents: those that were read.
        infill: how a gap was filled; None where there was none.
        ignored: fields that change nothing here.
    """

    wanted: bool = False
    documents: tuple[Snapshot, ...] = ()
    infill: InfillKind | None = None
    ignored: tuple[str, ...] = ()

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
            fidelity = self.documents[0].fidelity if self.documents else "shifted"
        return {
            "fidelity": fidelity,
            "tokens": dict(tokens),
            "bytes": dict(nbytes),
            "cached_tokens": sum(usage.cached_tokens for usage in usages),
            "computed_tokens": sum(usage.computed_tokens for usage in usages),
        }
