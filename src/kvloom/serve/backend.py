"""What the server asks of an engine, as protocols.

Knows: the calls of `AsyncLLM` that the server uses.
Does not know: how they are answered; tests stand in with an engine of their own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from kvloom.config import EngineConfig
from kvloom.outputs import EngineStats, StreamChunk
from kvloom.params import SamplingParams
from kvloom.types import ModelSpec


class Tokenizer(Protocol):
    """Turns text into token ids and back."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the text's token ids."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        ...

    def chat_tokens(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the token ids of a conversation, generation prompt added.

        Raises:
            RequestError: the model's chat template does not take the messages.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for; empty for special tokens."""
        ...


class Backend(Protocol):
    """An engine that answers many requests at once on one event loop."""

    @property
    def model_path(self) -> Path:
        """Folder of the model."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model."""
        ...

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""
        ...

    @property
    def config(self) -> EngineConfig:
        """Settings of the engine."""
        ...

    def stream(
        self, prompt: str | list[int], params: SamplingParams | None = None
    ) -> AsyncIterator[StreamChunk]:
        """Generate; closing the async generator cancels the request and frees its pages."""
        ...

    async def stats(self) -> EngineStats:
        """Return the engine's counters."""
        ...

    async def close(self) -> None:
        """End the engine."""
        ...
