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


def _check_sequence(prompt: object) -> None:
    # Bytes are integers to Python, but nobody means them as token ids.
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise RequestError(
            f"A prompt is text or a list of token ids, not {type(prompt).__name__}.",
            param="prompt",
        )
