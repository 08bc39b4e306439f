"""Replies of `/v1/completions`.

Knows: the shape of text completions, streamed and whole, echo included.
Does not know: HTTP or the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvloom.outputs import StreamChunk, TokenLogprobs, Usage
from kvloom.serve.backend import Tokenizer
from kvloom.serve.logprobs import CompletionLogprobs
from kvloom.serve.notes import Notes
from kvloom.serve.replies import DONE, Choice, Head, event
from kvloom.serve.schemas import CompletionBody
from kvloom.serve.usage import usage_fields


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as the client wrote it and as the engine reads it.

    Attributes:
        text: the text, that of documents included.
        token_ids: the tokens, those of documents included.
        num_known: tokens of documents at its beginning.
    """

    text: str
    token_ids: list[int]
    num_known: int = 0


class CompletionWriter:
    """Writes the choices of a completion; choice = prompt * n + index."""

    def __init__(
        self,
        head: Head,
        body: CompletionBody,
        prompts: list[Prompt],
        tokenizer: Tokenizer,
        notes: Notes,
    ) -> None:
        self._notes = notes
        self._head = head.fields("text_completion")
        self._body = body
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._n = body.n or 1
        self._started: set[int] = set()
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._prompt_logprobs: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        self._choices: dict[int, Choice] = {}

    def events(self, prompt: int, chunk: StreamChunk) -> bytes:
        """Return the events that a chunk comes to; may be empty."""
        number = prompt * self._n + chunk.index
        data = b""
        for text, logprobs in self._pieces(prompt, number, chunk):
            data += self._event(number, text, logprobs, None)
        if chunk.finish_reason is not None:
            data += self._event(number, "", None, chunk)
        return data

    def end_event(self, usages: list[Usage]) -> bytes:
        """Return the event that ends the stream, with usage and notes if asked for."""
        notes = self._notes.fields(usages)
        if self._body.include_usage:
            notes["usage"] = usage_fields(usages, only_echo=self._body.only_echo)
        return event(self._head | {"choices": []} | notes) + DONE if notes else DONE

    def add(self, prompt: int, chunk: StreamChunk) -> None:
        """Keep a chunk for `reply`."""
        number = prompt * self._n + chunk.index
        choice = self._choices.setdefault(number, Choice())
        for text, logprobs in self._pieces(prompt, number, chunk):
            choice.texts.append(text)
            if logprobs is not None:
                choice.logprobs.append(logprobs)
        if chunk.finish_reason is not None:
            choice.end = chunk

    def reply(self, usages: list[Usage]) -> dict[str, Any]:
        """Return the whole reply, after all chunks were added."""
        choices = []
        for number in range(len(self._prompts) * self._n):
            choice = self._choices[number]
            logprobs = None if self._body.logprobs is None else _joined(choice.logprobs)
            choices.append(self._choice(number, "".join(choice.texts), logprobs, choice.end))
        usage = usage_fields(usages, only_echo=self._body.only_echo)
        return self._head | {"choices": choices, "usage": usage} | self._notes.fields(usages)

    def _pieces(
        self, prompt: int, number: int, chunk: StreamChunk
    ) -> list[tuple[str, dict[str, Any] | None]]:
        """Return the texts that a chunk adds to a choice, each with its log-probabilities."""
        pieces: list[tuple[str, dict[str, Any] | None]] = []
        if chunk.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = chunk.prompt_logprobs
        if self._body.echo and number not in self._started:
            pieces.append((self._prompts[prompt].text, self._echoed_logprobs(prompt, number)))
        self._started.add(number)
        if self._body.only_echo:
            return pieces
        logprobs = None
        if chunk.logprobs is not None and chunk.token_ids:
            logprobs = self._builder(number).fields(chunk.token_ids, chunk.logprobs)
        if chunk.text or logprobs is not None:
            pieces.append((chunk.text, logprobs))
        return pieces

    def _echoed_logprobs(self, prompt: int, number: int) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        token_ids = self._prompts[prompt].token_ids
        return self._builder(number).fields(token_ids, self._prompt_logprobs[prompt])

    def _builder(self, number: int) -> CompletionLogprobs:
        if number not in self._logprobs:
            alternatives = self._body.logprobs or 0
            self._logprobs[number] = CompletionLogprobs(self._tokenizer, alternatives)
        return self._logprobs[number]

    def _event(
        self, number: int, text: str, logprobs: dict[str, Any] | None, end: StreamChunk | None
    ) -> bytes:
        fields = self._head | {"choices": [self._choice(number, text, logprobs, end)]}
        if self._body.include_usage:
            fields["usage"] = None
        return event(fields)

    def _choice(
        self, number: int, text: str, logprobs: Mapping[str, Any] | None, end: StreamChunk | None
    ) -> dict[str, Any]:
        reason = end.finish_reason if end else None
        choice = {"index": number, "text": text, "logprobs": logprobs}
        if self._body.only_echo and reason is not None:
            reason = "length"
        choice["finish_reason"] = reason
        if end is not None:
            choice["stop_reason"] = None if self._body.only_echo else end.stop_reason
        return choice


def _joined(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        lists = [piece[name] for piece in pieces]
        joined[name] = None if None in lists else [item for part in lists for item in part]
    return joined
