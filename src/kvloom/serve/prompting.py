"""From what clients send to the tokens of prompts, part by part.

Knows: which text stands where, and where the tokenizer's own tokens go.
Does not know: HTTP, or what KV there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvloom.serve.backend import Tokenizer
from kvloom.serve.completions import Prompt
from kvloom.serve.content import DocumentPart, Reusable
from kvloom.serve.documents import Snapshot
from kvloom.serve.marks import cut_at_parts
from kvloom.serve.parts import PromptPart
from kvloom.serve.schemas import ChatMessage, CompletionBody

Known = Mapping[str, Snapshot]
ODD_TEMPLATE = (
    "The model's chat template does more with the parts of a message than to show them, so that "
    "they have no place of their own in the prompt; they were read as text."
)


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation in tokens.

    Attributes:
        parts: in order.
        read_as_text: why documents and chunks are not among the parts; None where they are, or
            are not wanted.
    """

    parts: list[PromptPart]
    read_as_text: str | None = None


def document_ids(parts: Sequence[str | Reusable]) -> list[str]:
    """Return the documents among parts."""
    return [part.document_id for part in parts if isinstance(part, DocumentPart)]


def contents(messages: Sequence[ChatMessage]) -> list[str | Reusable]:
    """Return the parts of all messages."""
    return [part for message in messages for part in message.content]


def for_template(
    messages: Sequence[ChatMessage], spelled: Callable[[Reusable], str]
) -> list[dict[str, Any]]:
    """Return messages as chat templates know them, with a spelling for each document and chunk."""
    return [message.for_template(spelled) for message in messages]


def text_of(part: Reusable, known: Known) -> str:
    """Return what a document or a chunk says."""
    return known[part.document_id].text if isinstance(part, DocumentPart) else part.text


def chat_prompt(
    tokenizer: Tokenizer, messages: Sequence[ChatMessage], known: Known, *, by_parts: bool
) -> ChatPrompt:
    """Return a conversation in tokens.

    Args:
        tokenizer: of the model.
        messages: the conversation.
        known: the documents in it.
        by_parts: keep documents and chunks apart from the text around them, each with its own
            tokens; otherwise all is tokenised as one text.

    Raises:
        RequestError: the model's template refuses the messages.
    """
    reusable = [part for part in contents(messages) if not isinstance(part, str)]
    reason = None
    if by_parts and reusable:

        def render(spellings: Sequence[str]) -> str:
            following = iter(spellings)
            return tokenizer.render_chat(for_template(messages, lambda _: next(following)))

        marked = cut_at_parts(render, [text_of(part, known) for part in reusable])
        if marked.faithful:
            parts = [
                _reusable_part(tokenizer, reusable[piece], known)
                if isinstance(piece, int)
                else PromptPart(tuple(tokenizer.encode(piece, add_special_tokens=False)))
                for piece in marked.pieces
            ]
            return ChatPrompt([part for part in parts if part.tokens])
        reason = ODD_TEMPLATE
    whole = for_template(messages, lambda part: text_of(part, known))
    return ChatPrompt([PromptPart(tuple(tokenizer.chat_tokens(whole)))], reason)


def completion_prompts(
    tokenizer: Tokenizer, body: CompletionBody, known: Known
) -> tuple[list[PromptPart], list[Prompt]]:
    """Return the documents and chunks before prompts, and the prompts with these before them."""
    beginning = _beginning(tokenizer, body, known)
    return beginning, _prompts(tokenizer, body, beginning, known)


def lead_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens that the tokenizer puts before a text."""
    plain = tokenizer.encode(text, add_special_tokens=False)
    tokens = tokenizer.encode(text)
    count = len(tokens) - len(plain)
    # What does not stand before the text is none of it.
    return tokens[:count] if tokens[count:] == plain else []


def _reusable_part(tokenizer: Tokenizer, part: Reusable, known: Known) -> PromptPart:
    """Return a part that may stand anywhere, without what the tokenizer puts before a text."""
    if isinstance(part, DocumentPart):
        document = known[part.document_id]
        return PromptPart(tuple(document.tokens[document.num_lead :]), document)
    return PromptPart(tuple(tokenizer.encode(part.text, add_special_tokens=False)), part)


def _beginning(tokenizer: Tokenizer, body: CompletionBody, known: Known) -> list[PromptPart]:
    """Return what stands before prompts; the tokenizer's own tokens come first of all."""
    parts: list[PromptPart] = []
    for number, part in enumerate(body.beginning):
        if number > 0:
            parts.append(_reusable_part(tokenizer, part, known))
        elif isinstance(part, DocumentPart):
            parts.append(PromptPart(tuple(known[part.document_id].tokens), known[part.document_id]))
        else:
            lead = [] if body.add_special_tokens is False else lead_of(tokenizer, part.text)
            parts += [PromptPart(tuple(lead)), _reusable_part(tokenizer, part, known)]
    return [part for part in parts if part.tokens]


def _prompts(
    tokenizer: Tokenizer, body: CompletionBody, beginning: Sequence[PromptPart], known: Known
) -> list[Prompt]:
    """Return prompts as they were written and as the engine reads them."""
    special = body.add_special_tokens is not False and not body.beginning
    skip = body.skip_special_tokens is not False
    text_before = "".join(text_of(part, known) for part in body.beginning)
    before = [token for part in beginning for token in part.tokens]
    prompts = []
    for prompt in body.prompts:
        if isinstance(prompt, str):
            text, token_ids = prompt, tokenizer.encode(prompt, add_special_tokens=special)
        else:
            text = tokenizer.decode(prompt, skip_special_tokens=skip) if body.echo else ""
            token_ids = prompt
        prompts.append(Prompt(text_before + text, [*before, *token_ids], len(before)))
    return prompts
