"""What the server asks of an engine, as protocols.

Knows: the calls of `AsyncLLM` that the server uses.
Does not know: how they are answered; tests stand in with an engine of their own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Sequence
from pathlib import Path
from typing import Any, Protocol

from kvloom.config import EngineConfig
from kvloom.engine.joining import TokenPart
from kvloom.engine.stored import StoreUse
from kvloom.outputs import EditReceipt, EngineStats, Fidelity, Provenance, StreamChunk
from kvloom.params import SamplingParams
from kvloom.reuse.edit_series import TextEdit
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

    def render_chat(self, messages: list[dict[str, Any]]) -> str:
        """Return the text of a conversation, generation prompt added.

        Raises:
            RequestError: the model's chat template does not take the messages.
        """
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for; empty for special tokens."""
        ...


class BackendDocument(Protocol):
    """A text whose KV the engine keeps; an `AsyncDocument`."""

    @property
    def tokens(self) -> list[int]:
        """Token ids of the whole text."""
        ...

    @property
    def text(self) -> str:
        """The whole text."""
        ...

    @property
    def tenant(self) -> str:
        """Digest of whose KV it is."""
        ...

    @property
    def receipt(self) -> EditReceipt | None:
        """What was done to the KV last; None for a text that was computed."""
        ...

    @property
    def kv(self) -> Any:
        """The KV as it is now, for the engine alone."""
        ...

    @property
    def nbytes(self) -> Awaitable[int]:
        """Bytes of the KV."""
        ...

    @property
    def provenance(self) -> Awaitable[Provenance]:
        """Tokens by state."""
        ...

    async def append(self, text: str) -> None:
        """Add text at the end."""
        ...

    async def edit_all(
        self,
        edits: Sequence[TextEdit],
        *,
        fidelity: Fidelity,
        share: float,
        selector: str,
        lossless_only: bool,
    ) -> EditReceipt:
        """Make several edits, each in the text that those before it left; all or none."""
        ...

    async def repair(self) -> EditReceipt:
        """Compute everything again that is not exact."""
        ...

    async def fork(self) -> BackendDocument:
        """Return a second document with the same text."""
        ...

    async def score(self, text: str) -> list[float]:
        """Return the log-probability of each token of a text behind the document."""
        ...

    async def close(self) -> None:
        """Let go of the KV."""
        ...


class BackendStore(Protocol):
    """What the engine keeps beyond its process; an `AsyncStore`."""

    async def statistics(self) -> StoreUse:
        """Return what the store did since it was opened."""
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

    @property
    def store(self) -> BackendStore | None:
        """What is kept beyond the process; None if nothing is."""
        ...

    def stream_tokens(
        self,
        tokens: list[int],
        params: SamplingParams,
        base: Any = None,
        *,
        exact_only: bool = False,
        tenant: str,
    ) -> AsyncIterator[StreamChunk]:
        """Generate; closing the async generator cancels the request and frees its pages.

        Args:
            tokens: the prompt.
            params: how to generate.
            base: KV of a document that the prompt may start with.
            exact_only: take of it what equals a fresh prefill, and no more.
            tenant: digest of whose KV may answer, and whose this becomes.
        """
        ...

    async def document(
        self, text: str | Sequence[int], *, cache_salt: str | None = None
    ) -> BackendDocument:
        """Return a document of this text whose KV is computed and kept.

        Args:
            text: its text, or token ids.
            cache_salt: keeps the KV from all who do not give the same.
        """
        ...

    async def join_tokens(
        self,
        parts: Sequence[TokenPart],
        *,
        fidelity: Fidelity,
        share: float,
        planner: str,
        tenant: str,
    ) -> BackendDocument:
        """Return a document of parts, some of which bring KV or may be computed alone.

        Args:
            parts: of the document.
            fidelity: `repaired` or `shifted`.
            share: of the rows of a part that is computed again where `repaired`.
            planner: says what is done with each part.
            tenant: digest of whose KV may answer, and whose this becomes; that of all KV which
                parts bring.
        """
        ...

    async def stats(self) -> EngineStats:
        """Return the engine's counters."""
        ...

    async def close(self) -> None:
        """End the engine."""
        ...
