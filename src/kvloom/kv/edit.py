"""Edits: changes of a document as plain data.

Knows: what an edit keeps, moves and asks to be computed.
Does not know: how rows are run; the engine executes plans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvloom.errors import RequestError
from kvloom.types import EditPlan

if TYPE_CHECKING:
    from kvloom.kv.doc import KVDoc


@dataclass(frozen=True, slots=True)
class Truncate:
    """Keep the first `length` tokens."""

    length: int

    def plan(self, doc: KVDoc) -> EditPlan:
        """Say what stays.

        Raises:
            RequestError: the length is negative or above the document's.
        """
        if not 0 <= self.length <= doc.length:
            raise RequestError(
                f"The document has {doc.length} tokens and cannot be cut to {self.length}; "
                f"give a length from 0 to {doc.length}.",
                param="length",
            )
        return EditPlan(keep=self.length)


@dataclass(frozen=True, slots=True)
class Append:
    """Add tokens at the end."""

    tokens: tuple[int, ...]

    def plan(self, doc: KVDoc) -> EditPlan:
        """Say what has to be computed."""
        return EditPlan(keep=doc.length, recompute=self.tokens)
