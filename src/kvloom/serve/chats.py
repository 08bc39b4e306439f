"""Replies of `/v1/chat/completions`.

Knows: the shape of chat completions, streamed and whole.
Does not know: HTTP or the engine.
"""

from __future__ import annotations

from typing import Any

from kvloom.outputs import StreamChunk, Usage
from kvloom.serve.backend import Tokenizer
from kvloom.serve.logprobs import chat_logprobs
from kvloom.serve.notes import Notes
from kvloom.serve.replies import DONE, Choice, Head, event
from kvloom.serve.schemas import ChatBody
from kvloom.serve.usage import usage_fields


class ChatWriter:
    """Writes the choices of a chat."""

    def __init__(self, head: Head, body: ChatBody, tokenizer: Tokenizer, notes: Notes) -> None:
        self._notes = notes
        self._head = head
        self._chunk_head = head.fields("chat.completion.chunk")
        self._body = body
        self._tokenizer = tokenizer
        self._started: set[int] = set()
        self._choices: dict[int, Choice] = {}

    def events(self, prompt: int, chunk: StreamChunk) -> bytes:
        """Return the events that a chunk comes to; may be empty."""
        data = b""
        if chunk.index not in self._started:
            self._started.add(chunk.index)
            data += self._event(chunk.index, {"role": "assistant", "content": ""}, None)
        logprobs = self._content_logprobs(chunk)
        if chunk.text or logprobs:
            data += self._event(chunk.index, {"content": chunk.text}, logprobs)
        if chunk.finish_reason is not None:
            data += self._event(chunk.index, {}, None, chunk)
        return data

    def end_event(self, usages: list[Usage]) -> bytes:
        """Return the event that ends the stream, with usage and notes if asked for."""
        notes = self._notes.fields(usages)
        if self._body.include_usage:
            notes["usage"] = usage_fields(usages)
        return event(self._chunk_head | {"choices": []} | notes) + DONE if notes else DONE

    def add(self, prompt: int, chunk: StreamChunk) -> None:
        """Keep a chunk for `reply`."""
        choice = self._choices.setdefault(chunk.index, Choice())
        choice.texts.append(chunk.text)
        choice.logprobs += self._content_logprobs(chunk)
        if chunk.finish_reason is not None:
            choice.end = chunk

    def reply(self, usages: list[Usage]) -> dict[str, Any]:
        """Return the whole reply, after all chunks were added."""
        choices = []
        for index in range(self._body.n or 1):
            choice = self._choices[index]
            text = "".join(choice.texts)
            end = choice.end
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": _content(choice.logprobs) if self._body.logprobs else None,
                    "finish_reason": end.finish_reason if end else None,
                    "stop_reason": end.stop_reason if end else None,
                }
            )
        usage = usage_fields(usages)
        reply = self._head.fields("chat.completion") | {"choices": choices, "usage": usage}
        return reply | self._notes.fields(usages)

    def _content_logprobs(self, chunk: StreamChunk) -> list[dict[str, Any]]:
        if chunk.logprobs is None:
            return []
        alternatives = self._body.top_logprobs or 0
        return chat_logprobs(self._tokenizer, chunk.token_ids, chunk.logprobs, alternatives)

    def _event(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: list[dict[str, Any]] | None,
        end: StreamChunk | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": _content(logprobs) if logprobs else None,
            "finish_reason": end.finish_reason if end else None,
        }
        if end is not None:
            choice["stop_reason"] = end.stop_reason
        fields = self._chunk_head | {"choices": [choice]}
        if self._body.include_usage:
            fields["usage"] = None
        return event(fields)


def _content(logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"content": logprobs, "refusal": None}
