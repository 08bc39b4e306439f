"""Prompts: the forms in which callers give them, turned into token ids.

Knows: text, token ids, chats, and one prompt or many.
Does not know: engines or requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvloom.errors import RequestError
from kvloom.model.tokenizer import TextTokenizer
from kvloom.params import SamplingParams

Prompt = str | Sequence[int]
Messages = list[dict[str, Any]]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return one or many prompts as a list.

    Raises:
        RequestError: it is neither text, nor token ids, nor a list of these.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(
            f"A prompt is text or a list of token ids, not {type(prompts).__name__}.",
            param="prompt",
        )
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def as_chats(messages: Messages | Sequence[Messages]) -> list[Messages]:
    """Return one or many chats as a list."""
    if messages and all(isinstance(item, list) for item in messages):
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
    if len(params) != count:
        raise RequestError(
            f"{len(params)} sets of parameters were given for {count} prompts; give one for all "
            "or one for each.",
            param="params",
        )
    return list(params)


def tokenize(tokenizer: TextTokenizer, prompt: Prompt) -> tuple[str | None, list[int]]:
    """Return a prompt's text, if it is one, and its token ids."""
    if isinstance(prompt, str):
        return prompt, tokenizer.encode(prompt)
    return None, list(prompt)
