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
from kvloom.reuse.planner import planner as planner_of
from kvloom.store.key import ANYBODY


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
    planner: str = "blend",
    sink: str | None = None,
    cache_salt: str | None = None,
) -> Document:
    """Return a document of parts, whose chunks' KV is computed once and used at any place.

    Args:
        llm: whose document it is.
        parts: texts, and chunks of text, in order.
        fidelity: `exact` computes all parts in order; `shifted` shows chunks as they were
            computed before; `repaired` computes a share of their tokens again.
        share: of every chunk's tokens that is computed again where `repaired`, about.
        planner: says which tokens, and what is done with each part: `blend`, `craft`, `first`,
            `random` or `none`. `craft` also takes note of what chunks attend to, where it has one
            computed, and keeps it for the next time.
        sink: text that chunks are computed behind, and which is then left out; an empty one lets
            them begin with themselves, as most systems do. None takes the tokens of `sink_of`.
        cache_salt: keeps the KV from all who do not give the same.

    Raises:
        RequestError: the parts hold no text, or a setting is out of range.
        UnsupportedModelError: the model's positions cannot be moved (`exact` still works), or it
            does not show what `craft` must know.
        CapacityError: the KV memory cannot hold the parts.
    """
    found = tokenize_parts(llm.tokenizer, parts)
    if sink is not None and not isinstance(sink, str):
        raise RequestError(f"sink is {type(sink).__name__}; give text, or None.", param="sink")
    return join_tokens(
        llm,
        found,
        fidelity=fidelity,
        share=share,
        planner=planner,
        sink=None if sink is None else llm.tokenizer.encode(sink) if sink else (),
        tenant=tenant_of(cache_salt),
    )


def join_tokens(
    llm: Host,
    parts: Sequence[TokenPart],
    *,
    fidelity: Fidelity = "exact",
    share: float = REPAIRED_SHARE,
    planner: str = "blend",
    tenant: str = ANYBODY,
    sink: Sequence[int] | None = None,
) -> Document:
    """Return a document of parts in tokens; the settings are those of `join_parts`.

    Args:
        llm: whose document it is.
        parts: in order.
        fidelity: of the chunks.
        share: of their tokens that is computed again.
        planner: what is done with each part.
        tenant: whose document it is, as `hash_tenant` gives it.
        sink: tokens that chunks are computed behind; None takes those of `sink_of`.

    Raises:
        RequestError: the parts hold no tokens, or a setting is out of range.
        UnsupportedModelError: as `join_parts` has it.
        CapacityError: the KV memory cannot hold the parts.
    """
    check_edit(fidelity, share, "blend")
    asked = planner_of(planner, share)
    behind = sink_of(llm.tokenizer) if sink is None else tuple(sink)
    joined = Joining(llm.loop, llm.spec, behind, fidelity, asked, tenant).join(parts)
    return Document(llm, joined.tokens, joined.doc, joined.receipt, tenant=tenant)


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
