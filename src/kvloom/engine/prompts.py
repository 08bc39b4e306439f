"""Prompts: the forms in which callers give them, turned into token ids.

Knows: text, token ids, chats, and one prompt or many.
Does not know: engines or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvloom.engine.joining import TokenPart
from kvloom.errors import RequestError
from kvloom.model.tokenizer import TextTokenizer
from kvloom.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a prompt whose KV may be computed alone, and used at any place of any prompt."""

    text: str


Prompt = str | Sequence[int]
Messages = list[dict[str, Any]]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return one or many prompts as a list.

    Raises:
        RequestError: it is neither text, nor token ids, nor a list of these.
    """
    if isinstance(prompts, str):
        return [prompts]
    _check_sequence(prompts)
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def as_chats(messages: Messages | Sequence[Messages]) -> list[Messages]:
    """Return one or many chats as a list."""
    if (
        isinstance(messages, Sequence)
        and messages
        and all(isinstance(item, list) for item in messages)
    ):
        return list(messages)  # type: ignore[arg-type]
    return [messages]  # type: ignore[list-item]


def as_params(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """Return one set of parameters per prompt.

    Raises:
        RequestError: there are not as many as prompts.
    """
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    given = list(params) if isinstance(params, Sequence) else [params]
    if wrong := [item for item in given if not isinstance(item, SamplingParams)]:
        raise RequestError(
            f"params are SamplingParams or a list of them, not {type(wrong[0]).__name__}.",
            param="params",
        )
    if len(given) != count:
        raise RequestError(
            f"{len(given)} sets of parameters were given for {count} prompts; give one for all "
            "or one for each.",
            param="params",
        )
    return given


def tokenize(tokenizer: TextTokenizer, prompt: Prompt) -> tuple[str | None, list[int]]:
    """Return a prompt's text, if it is one, and its token ids.

    Raises:
        RequestError: it is neither text nor a list.
    """
    if isinstance(prompt, str):
        return prompt, tokenizer.encode(prompt)
    _check_sequence(prompt)
    return None, list(prompt)


def tokenize_parts(tokenizer: TextTokenizer, parts: Sequence[str | Chunk]) -> list[TokenPart]:
    """Return parts in tokens, each tokenised by itself, so that equal chunks are equal tokens.

    Raises:
        RequestError: a part is neither text nor a chunk.
    """
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


def _check_sequence(prompt: object) -> None:
    # Bytes are integers to Python, but nobody means them as token ids.
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise RequestError(
            f"A prompt is text or a list of token ids, not {type(prompt).__name__}.",
            param="prompt",
        )
