"""Joined prompts: what is asked of the engine, what came of it, and how the client is told.

Knows: parts, the engine's receipt of joining them, and the `kvloom` fields that say so.
Does not know: HTTP, or how parts are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvloom.engine.fidelity import REPAIRED_SHARE
from kvloom.engine.joining import TokenPart
from kvloom.errors import RequestError
from kvloom.outputs import EditReceipt, Fidelity
from kvloom.serve.backend import BackendDocument
from kvloom.serve.documents import Snapshot
from kvloom.serve.parts import Ask, PromptPart

MAX_JOINED = 256
"""Documents and chunks of one prompt that are joined."""


@dataclass(frozen=True, slots=True)
class JoinOptions:
    """How parts are to be joined.

    Attributes:
        fidelity: `repaired` or `shifted`.
        planner: says what is done with each part.
        share: of a part's rows that is computed again where `repaired`.
    """

    fidelity: Fidelity
    planner: str = "blend"
    share: float = REPAIRED_SHARE


@dataclass(frozen=True, slots=True)
class Joined:
    """The beginning of prompts, whose KV is there.

    Attributes:
        parts: of which it is made.
        document: the engine's; its receipt says what was done.
    """

    parts: tuple[PromptPart, ...]
    document: BackendDocument

    @property
    def receipt(self) -> EditReceipt:
        """What was done."""
        assert self.document.receipt is not None
        return self.document.receipt

    @property
    def ask(self) -> Ask:
        """The prompt that these parts come to."""
        tokens = [token for part in self.parts for token in part.tokens]
        return Ask(tokens, self.document.tenant, self.document.kv)

    def receipt_fields(self) -> dict[str, Any]:
        """Return what is added to the receipt of a reply."""
        receipt = self.receipt
        return {
            "recomputed": receipt.recomputed,
            "repaired": receipt.repaired,
            "deviation": receipt.deviation,
            "deviation_left": receipt.deviation_left,
            "loaded_bytes": receipt.loaded_bytes,
        }

    def part_fields(self) -> list[dict[str, Any]]:
        """Return what was done with each part."""
        fields = []
        for number, part in enumerate(self.parts):
            done = [asdict(each) for each in self.receipt.actions if each.part == number]
            actions = [{"action": x["action"], "rows": x["rows"], "tier": x["tier"]} for x in done]
            fields.append(_name(part) | {"tokens": len(part.tokens), "actions": actions})
        return fields


def token_part(part: PromptPart) -> TokenPart:
    """Return a part as the engine takes it."""
    kv = part.source.kv if isinstance(part.source, Snapshot) else None
    return TokenPart(part.tokens, part.source is not None, kv)


def check_parts(parts: Sequence[PromptPart], num_behind: int, max_model_len: int) -> None:
    """Make sure that parts can be joined at all, before anything is computed for them.

    Args:
        parts: to be joined.
        num_behind: tokens of the longest prompt behind them.
        max_model_len: tokens that prompt and completion may come to.

    Raises:
        RequestError: there are too many parts or tokens.
    """
    count = sum(part.source is not None for part in parts)
    if count > MAX_JOINED:
        raise RequestError(
            f"The prompt has {count} documents and chunks, and at most {MAX_JOINED} are joined; "
            "send fewer, or ask for the fidelity `exact`.",
            param="kvloom",
        )
    num_tokens = sum(len(part.tokens) for part in parts) + num_behind
    if num_tokens >= max_model_len:
        raise RequestError(
            f"The prompt has {num_tokens} tokens with its documents and chunks, and at most "
            f"{max_model_len - 1} fit; shorten it or raise max_model_len.",
            param="prompt",
        )


def _name(part: PromptPart) -> dict[str, Any]:
    if part.source is None:
        return {"type": "text"}
    if isinstance(part.source, Snapshot):
        return {"type": "document", "document_id": part.source.id}
    return {"type": "chunk"}
