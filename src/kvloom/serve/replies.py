"""Choices as they grow: what completions and chats have in common.

Knows: which choice a chunk belongs to and what to keep until the reply is whole.
Does not know: HTTP; `completions` and `chats` know the field names.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic_core import to_json

from kvloom.outputs import StreamChunk, Usage
from kvloom.serve.service import PromptChunks

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Head:
    """What every piece of a reply carries.

    Attributes:
        id: name of the reply.
        model: the model's name in the API.
        created: Unix time of the request.
    """

    id: str
    model: str
    created: int

    def fields(self, kind: str) -> dict[str, Any]:
        """Return the JSON fields of a piece of this kind."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def new_id(prefix: str) -> str:
    """Return a name for a reply."""
    return f"{prefix}-{uuid.uuid4().hex}"


def event(fields: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + to_json(fields) + b"\n\n"


@dataclass(slots=True)
class Choice:
    """One choice of a reply that is not streamed, while it grows."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    end: StreamChunk | None = None


class Writer(Protocol):
    """Turns chunks into one kind of reply."""

    def events(self, prompt: int, chunk: StreamChunk) -> bytes:
        """Return the events that a chunk comes to; may be empty."""
        ...

    def end_event(self, usages: list[Usage]) -> bytes:
        """Return what ends the stream; may be empty."""
        ...

    def add(self, prompt: int, chunk: StreamChunk) -> None:
        """Keep a chunk for `reply`."""
        ...

    def reply(self, usages: list[Usage]) -> dict[str, Any]:
        """Return the whole reply, after all chunks were added."""
        ...


async def stream_events(chunks: PromptChunks, writer: Writer) -> AsyncGenerator[bytes, None]:
    """Yield a reply as server-sent events; closing the generator closes the chunks."""
    usages = []
    async with aclosing(chunks):
        async for prompt, chunk in chunks:
            if chunk.usage is not None:
                usages.append(chunk.usage)
            if data := writer.events(prompt, chunk):
                yield data
    if data := writer.end_event(usages):
        yield data


async def whole_reply(chunks: PromptChunks, writer: Writer) -> bytes:
    """Return a reply as one JSON body."""
    usages = []
    async with aclosing(chunks):
        async for prompt, chunk in chunks:
            if chunk.usage is not None:
                usages.append(chunk.usage)
            writer.add(prompt, chunk)
    return to_json(writer.reply(usages))
