"""`AsyncDocument`: a `Document` for asyncio.

Knows: which calls wait for the engine.
Does not know: what they do; `Document` does it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar, overload

from kvloom.engine.collect import Collector
from kvloom.engine.document import Document
from kvloom.engine.fidelity import REPAIRED_SHARE
from kvloom.kv.doc import KVDoc
from kvloom.outputs import EditReceipt, Fidelity, Provenance, RequestOutput, StreamChunk
from kvloom.params import SamplingParams
from kvloom.reuse.edit_series import TextEdit
from kvloom.reuse.text_range import LineColumn

if TYPE_CHECKING:
    from torch import Tensor

    from kvloom.engine.aio import AsyncLLM

T = TypeVar("T")


class AsyncDocument:
    """A text and its KV; made by `AsyncLLM.document`, with the names of `Document`.

    Changes wait for one another. One that has begun is carried out, even if its task is cancelled.
    """

    def __init__(self, llm: AsyncLLM, document: Document) -> None:
        self._llm = llm
        self._document = document
        self._changing = asyncio.Lock()

    @property
    def tokens(self) -> list[int]:
        """Token ids of the whole text."""
        return self._document.tokens

    @property
    def text(self) -> str:
        """The whole text."""
        return self._document.text

    @property
    def tenant(self) -> str:
        """Digest of whose KV it is; what is computed for it answers nobody else."""
        return self._document.tenant

    @property
    def receipt(self) -> EditReceipt | None:
        """What the last edit, or the joining of its parts, did to its KV; None for neither."""
        return self._document.receipt

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
        await self._change(partial(self._document.append, text))

    async def truncate(self, length: int) -> None:
        """Keep the first `length` tokens.

        Raises:
            RequestError: the document is not that long.
        """
        await self._change(partial(self._document.truncate, length))

    async def edit(
        self,
        start: int | LineColumn,
        end: int | LineColumn,
        text: str,
        *,
        fidelity: Fidelity = "exact",
        share: float = REPAIRED_SHARE,
        selector: str = "blend",
    ) -> EditReceipt:
        """Put text in the place of a range of characters; arguments and errors as `Document.edit`.

        Raises:
            RequestError: the text has no such range, or a setting is out of range.
            UnsupportedModelError: the model's positions cannot be moved; `exact` still works.
            CapacityError: the KV memory cannot hold the new document; the old one is unchanged.
        """
        edit = TextEdit(text, start, end)
        return await self.edit_all([edit], fidelity=fidelity, share=share, selector=selector)

    async def edit_all(
        self,
        edits: Sequence[TextEdit],
        *,
        fidelity: Fidelity = "exact",
        share: float = REPAIRED_SHARE,
        selector: str = "blend",
        lossless_only: bool = False,
    ) -> EditReceipt:
        """Make several edits, each in the text that those before it left; all of them or none.

        Raises:
            RequestError: as `edit` has it, or the tokenizer cannot spell a text.
            UnsupportedModelError: the model's positions cannot be moved; `exact` still works.
            CapacityError: the KV memory cannot hold the new document; the old one is unchanged.
        """
        work = partial(self._document.edit_all, edits, lossless_only=lossless_only)
        return await self._change(partial(work, fidelity=fidelity, share=share, selector=selector))

    async def replace(
        self,
        text: str,
        *,
        fidelity: Fidelity = "exact",
        share: float = REPAIRED_SHARE,
        selector: str = "blend",
    ) -> EditReceipt:
        """Become another text, and keep the KV of what both have in common.

        Raises:
            RequestError: a setting is out of range.
            UnsupportedModelError: the model's positions cannot be moved; `exact` still works.
            CapacityError: the KV memory cannot hold the new document; the old one is unchanged.
        """
        work = partial(self._document.replace, text, fidelity=fidelity)
        return await self._change(partial(work, share=share, selector=selector))

    async def repair(self) -> EditReceipt:
        """Compute everything again that is not exact, and wait for it.

        Raises:
            CapacityError: the KV memory cannot hold it.
        """
        return await self._change(self._document.repair)

    async def transplant(
        self,
        start: int,
        source: AsyncDocument,
        source_start: int,
        source_stop: int,
        *,
        keys: bool = True,
        values: bool = True,
    ) -> EditReceipt:
        """Show tokens with the KV that equal tokens have in another document; as `Document` does.

        Raises:
            RequestError: a document has no such range, or its tokens differ.
        """
        place = (start, source._document, source_start, source_stop)
        work = partial(self._document.transplant, *place, keys=keys, values=values)
        return await self._change(work)

    async def fork(self) -> AsyncDocument:
        """Return a second document with the same text; both share the KV they have in common."""
        return AsyncDocument(self._llm, await self._change(self._document.fork))

    async def generate(
        self,
        question: str = "",
        params: SamplingParams | None = None,
        *,
        exact_only: bool = False,
    ) -> RequestOutput:
        """Complete the document followed by a question; the document stays as it is."""
        params = params or SamplingParams()
        tokens = self._document.with_question(question)
        collector = Collector(None, tokens, logprobs_wanted=params.logprobs is not None)
        async for chunk in self._stream(tokens, params, exact_only):
            collector.feed(chunk)
        return collector.output()

    def stream(
        self,
        question: str = "",
        params: SamplingParams | None = None,
        *,
        exact_only: bool = False,
    ) -> AsyncIterator[StreamChunk]:
        """Yield the completion of the document followed by a question, step by step."""
        tokens = self._document.with_question(question)
        return self._stream(tokens, params or SamplingParams(), exact_only)

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

    @property
    def kv(self) -> KVDoc:
        """The document's KV; only the engine's thread may touch it."""
        return self._document.kv

    def _stream(
        self, tokens: list[int], params: SamplingParams, exact_only: bool
    ) -> AsyncIterator[StreamChunk]:
        kv, tenant = self.kv, self.tenant
        return self._llm.stream_tokens(tokens, params, kv, exact_only=exact_only, tenant=tenant)

    async def _change(self, work: Callable[[], T]) -> T:
        """Run a change on a thread when those before it are over."""
        await self._changing.acquire()
        # The thread goes on when the waiting task is cancelled, and the next change waits for it.
        thread = asyncio.ensure_future(asyncio.to_thread(work))
        thread.add_done_callback(lambda _: self._changing.release())
        return await asyncio.shield(thread)
