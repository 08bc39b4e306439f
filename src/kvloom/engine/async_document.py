"""`AsyncDocument`: a `Document` for asyncio.

Knows: which calls wait for the engine.
Does not know: what they do; `Document` does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TYPE_CHECKING, Literal, overload

from kvloom.engine.collect import Collector
from kvloom.engine.document import Document
from kvloom.outputs import Provenance, RequestOutput, StreamChunk
from kvloom.params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from kvloom.engine.aio import AsyncLLM


class AsyncDocument:
    """A text and its KV; made by `AsyncLLM.document`, with the names of `Document`."""

    def __init__(self, llm: AsyncLLM, document: Document) -> None:
        self._llm = llm
        self._document = document

    @property
    def tokens(self) -> list[int]:
        """Token ids of the whole text."""
        return self._document.tokens

    @property
    def text(self) -> str:
        """The whole text."""
        return self._document.text

    @property
    def nbytes(self) -> Awaitable[int]:
        """Bytes of the blocks that hold the document's KV now; to be awaited."""
        return asyncio.to_thread(lambda: self._document.nbytes)

    @property
    def provenance(self) -> Awaitable[Provenance]:
        """Tokens by state, and bytes by codec; to be awaited."""
        return asyncio.to_thread(lambda: self._document.provenance)

    async def append(self, text: str) -> None:
        """Add text at the end and compute its KV.

        Raises:
            RequestError: the document would outgrow the model's context or the KV memory.
        """
        await asyncio.to_thread(self._document.append, text)

    async def truncate(self, length: int) -> None:
        """Keep the first `length` tokens.

        Raises:
            RequestError: the document is not that long.
        """
        await asyncio.to_thread(self._document.truncate, length)

    async def fork(self) -> AsyncDocument:
        """Return a second document with the same text; both share the KV they have in common."""
        return AsyncDocument(self._llm, await asyncio.to_thread(self._document.fork))

    async def generate(
        self, question: str = "", params: SamplingParams | None = None
    ) -> RequestOutput:
        """Complete the document followed by a question; the document stays as it is."""
        params = params or SamplingParams()
        tokens = self._document.with_question(question)
        collector = Collector(None, tokens, logprobs_wanted=params.logprobs is not None)
        async for chunk in self._llm.stream_tokens(tokens, params, self._document.kv):
            collector.feed(chunk)
        return collector.output()

    def stream(
        self, question: str = "", params: SamplingParams | None = None
    ) -> AsyncIterator[StreamChunk]:
        """Yield the completion of the document followed by a question, step by step."""
        tokens = self._document.with_question(question)
        return self._llm.stream_tokens(tokens, params or SamplingParams(), self._document.kv)

    @overload
    async def score(self, text: str, *, return_logits: Literal[False] = False) -> list[float]: ...
    @overload
    async def score(
        self, text: str, *, return_logits: Literal[True]
    ) -> tuple[list[float], Tensor]: ...
    async def score(
        self, text: str, *, return_logits: bool = False
    ) -> list[float] | tuple[list[float], Tensor]:
        """Return the log-probability of each token of a text behind the document.

        Raises:
            RequestError: the document is empty, or the text does not fit behind it.
        """
        if return_logits:
            return await asyncio.to_thread(self._document.score, text, return_logits=True)
        return await asyncio.to_thread(self._document.score, text)

    async def close(self) -> None:
        """Let go of the KV; it may still answer for equal prefixes while there is room."""
        self._document.close()
