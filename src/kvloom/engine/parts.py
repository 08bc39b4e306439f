"""Parts of a prompt, as a user gives them, made into a document.

Knows: texts and chunks of text, and how a user asks for them to be joined.
Does not know: how parts are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.engine.document import Document
from kvloom.engine.fidelity import REPAIRED_SHARE, check_edit
from kvloom.engine.host import Host
from kvloom.engine.joining import Joining, TokenPart
from kvloom.engine.tenants import tenant_of
from kvloom.errors import RequestError
from kvloom.model.tokenizer import TextTokenizer
from kvloom.outputs import Fidelity


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a prompt whose KV may be computed alone, and used at any place of any prompt."""

    text: str


def join_parts(
    llm: Host,
    parts: Sequence[str | Chunk],
    *,
    fidelity: Fidelity = "exact",
    share: float = REPAIRED_SHARE,
    selector: str = "blend",
    cache_salt: str | None = None,
) -> Document:
    """Return a document of parts, whose chunks' KV is computed once and used at any place.

    Args:
        llm: whose document it is.
        parts: texts, and chunks of text, in order.
        fidelity: `exact` computes all parts in order; `shifted` shows chunks as they were
            computed alone; `repaired` computes a share of their tokens again.
        share: of the chunks' tokens that is computed again where `repaired`.
        selector: how these are chosen: `blend`, `first` or `random`.
        cache_salt: keeps the KV from all who do not give the same.

    Raises:
        RequestError: the parts hold no text, or a setting is out of range.
        UnsupportedModelError: the model's positions cannot be moved; `exact` still works.
        CapacityError: the KV memory cannot hold the parts.
    """
    rule = check_edit(fidelity, share, selector).rule
    sink, tenant = sink_of(llm.tokenizer), tenant_of(cache_salt)
    joining = Joining(llm.loop, llm.spec, sink, fidelity, share, rule, tenant)
    joined = joining.join(tokenize_parts(llm.tokenizer, parts))
    return Document(llm, joined.tokens, joined.doc, joined.receipt, tenant)


def tokenize_parts(tokenizer: TextTokenizer, parts: Sequence[str | Chunk]) -> list[TokenPart]:
    """Return parts in tokens, each tokenised by itself, so that equal chunks are equal tokens.

    Raises:
        RequestError: a part is neither text nor a chunk.
    """
    if isinstance(parts, str) or not isinstance(parts, Sequence):
        raise RequestError("parts are a list of texts and chunks.", param="parts")
    found = []
    for number, part in enumerate(parts):
        text = part.text if isinstance(part, Chunk) else part
        if not isinstance(text, str):
            raise RequestError(
                f"Part {number} is {type(part).__name__}; give text, or a Chunk of text.",
                param="parts",
            )
        tokens = tokenizer.encode(text, add_special_tokens=number == 0)
        found.append(TokenPart(tuple(tokens), isinstance(part, Chunk)))
    return found


def sink_of(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Return the tokens that chunks are computed behind: a beginning, and a line's end."""
    line_end = tokenizer.encode("\n", add_special_tokens=False)
    ends = sorted(tokenizer.eos_token_ids)
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else ends[:1]
    return (*begin, *line_end)
