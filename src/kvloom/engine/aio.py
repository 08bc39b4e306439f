"""`AsyncLLM`: the engine for asyncio; one thread runs it, any number of tasks wait for it.

Knows: event loops, and how a cancelled task ends its request.
Does not know: how requests are run.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TypeVar, Unpack

from kvloom.engine.assembly import Settings, assemble, launch
from kvloom.engine.async_document import AsyncDocument
from kvloom.engine.batch import Batch, chunk_or_raise
from kvloom.engine.document import make_document
from kvloom.engine.engine import Engine
from kvloom.engine.fidelity import REPAIRED_SHARE
from kvloom.engine.joining import TokenPart
from kvloom.engine.loop import EngineLoop, Mailbox, Submission
from kvloom.engine.parts import Chunk, join_parts, join_tokens
from kvloom.engine.prompts import Messages, Prompt, as_chats, as_params, as_prompts, tokenize
from kvloom.engine.request import Event
from kvloom.engine.stored import AsyncStore, store_of
from kvloom.engine.tenants import tenant_of
from kvloom.errors import CapacityError
from kvloom.kv.doc import KVDoc
from kvloom.outputs import EngineStats, Fidelity, RequestOutput, StreamChunk
from kvloom.params import SamplingParams
from kvloom.reuse.retokenize import Retokenizer

T = TypeVar("T")


class AsyncLLM:
    """A model that answers prompts, for asyncio; takes and offers what `LLM` does.

    Attributes:
        model_path: folder with the weights; plain transformers loads it as well.
        tokenizer: the model's own.
        retokenizer: turns edits of text into edits of tokens.
        spec: what the probe found out about the model.
        passport: digests and formats that every cached token depends on.
        config: settings of the engine.
        store: what is kept beyond the process; None if nothing is.
    """

    def __init__(self, model: str = "default", **settings: Unpack[Settings]) -> None:
        self._post = _PostOffice()
        assembly, self._loop = launch(lambda: assemble(model, settings), self._post.flush)
        self.model_path = assembly.model_path
        self.tokenizer = assembly.tokenizer
        self.retokenizer = Retokenizer(assembly.tokenizer)
        self.spec = assembly.spec
        self.passport = assembly.passport
        self.config = assembly.config
        store = store_of(assembly.engine, self._loop)
        self.store = None if store is None else AsyncStore(store)
        self._stop = weakref.finalize(self, self._loop.stop)

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Complete one or many prompts; the results keep their order.

        Raises:
            RequestError: a prompt or its parameters are wrong.
            CapacityError: the queue is full of others' requests, or a prompt cannot be held.
        """
        asked = [tokenize(self.tokenizer, prompt) for prompt in as_prompts(prompts)]
        return await self._run(asked, params, cache_salt)

    async def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str | None = None,
    ) -> list[RequestOutput]:
        """Answer one or many chats."""
        chats = [self.tokenizer.render_chat(chat) for chat in as_chats(messages)]
        encode = self.tokenizer.encode
        asked = [(text, encode(text, add_special_tokens=False)) for text in chats]
        return await self._run(asked, params, cache_salt)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, cache_salt: str | None = None
    ) -> AsyncIterator[StreamChunk]:
        """Yield what every step adds; closing the iterator or cancelling its task cancels it.

        Raises:
            RequestError: the prompt or its parameters are wrong; raised at the first chunk.
            CapacityError: too many requests wait, or the prompt cannot be held.
        """
        tokens, tenant = tokenize(self.tokenizer, prompt)[1], tenant_of(cache_salt)
        return self.stream_tokens(tokens, params or SamplingParams(), tenant=tenant)

    def stream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        cache_salt: str | None = None,
    ) -> AsyncIterator[StreamChunk]:
        """Yield what every step adds to the answer to a chat."""
        tokens, tenant = self.tokenizer.chat_tokens(messages), tenant_of(cache_salt)
        return self.stream_tokens(tokens, params or SamplingParams(), tenant=tenant)

    async def document(self, text: Prompt, *, cache_salt: str | None = None) -> AsyncDocument:
        """Return a document of this text whose KV is computed and kept.

        Raises:
            RequestError: the text is longer than the model's context or the KV memory.
        """
        return AsyncDocument(self, await asyncio.to_thread(make_document, self, text, cache_salt))

    async def join(
        self,
        parts: Sequence[str | Chunk],
        *,
        fidelity: Fidelity = "exact",
        share: float = REPAIRED_SHARE,
        planner: str = "blend",
        sink: str | None = None,
        cache_salt: str | None = None,
    ) -> AsyncDocument:
        """Return a document of parts, whose chunks' KV is computed once and used at any place.

        See `kvloom.engine.parts.join_parts`.

        Raises:
            RequestError: the parts hold no text, or a setting is out of range.
            UnsupportedModelError: the model's positions cannot be moved (`exact` still works), or
                it does not show what the planner must know.
            CapacityError: the KV memory cannot hold the parts.
        """
        join = partial(join_parts, self, parts, fidelity=fidelity, share=share, planner=planner)
        join = partial(join, sink=sink, cache_salt=cache_salt)
        return AsyncDocument(self, await asyncio.to_thread(join))

    async def join_tokens(
        self,
        parts: Sequence[TokenPart],
        *,
        fidelity: Fidelity = "exact",
        share: float = REPAIRED_SHARE,
        planner: str = "blend",
        tenant: str,
    ) -> AsyncDocument:
        """Return a document of parts in tokens, which may bring KV along.

        See `kvloom.engine.parts.join_tokens`.

        Raises:
            RequestError: the parts hold no tokens, or a setting is out of range.
            UnsupportedModelError: as `join` has it.
            CapacityError: the KV memory cannot hold the parts.
        """
        join = partial(join_tokens, self, parts, fidelity=fidelity, share=share, planner=planner)
        return AsyncDocument(self, await asyncio.to_thread(join, tenant=tenant))

    async def stats(self) -> EngineStats:
        """Return counters and gauges since the start."""
        return await self._call(lambda engine: engine.stats())

    async def close(self) -> None:
        """End everything; unfinished requests fail."""
        await asyncio.to_thread(self._stop)

    @property
    def loop(self) -> EngineLoop:
        """The thread that owns the engine."""
        return self._loop

    async def stream_tokens(
        self,
        tokens: list[int],
        params: SamplingParams,
        base: KVDoc | None = None,
        *,
        exact_only: bool = False,
        tenant: str,
    ) -> AsyncIterator[StreamChunk]:
        """Yield what every step adds behind these tokens, which may start with a document's KV."""
        inbox: asyncio.Queue[Event] = asyncio.Queue()

        def submit(engine: Engine) -> str:
            return engine.submit(tokens, params, base=base, exact_only=exact_only, tenant=tenant)

        (request_id,) = await self._submit([submit], inbox)
        try:
            while True:
                chunk = chunk_or_raise(await inbox.get())
                yield chunk
                if chunk.usage is not None:
                    return
        finally:
            self._loop.cancel(request_id)

    async def _submit(
        self, submissions: Sequence[Submission], inbox: asyncio.Queue[Event]
    ) -> list[str]:
        submitted = self._loop.submit(submissions, self._post.mailbox(inbox))
        try:
            return await asyncio.wrap_future(submitted)
        except asyncio.CancelledError:
            self._loop.cancel_submitted(submitted)
            raise

    async def _run(
        self,
        asked: Sequence[tuple[str | None, list[int]]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        cache_salt: str | None,
    ) -> list[RequestOutput]:
        """Run prompts together; more than may wait are submitted as others end."""
        inbox: asyncio.Queue[Event] = asyncio.Queue()
        batch = Batch(asked, as_params(params, len(asked)), tenant_of(cache_salt))
        try:
            while not batch.done:
                await self._submit_more(batch, inbox)
                while not batch.take(await inbox.get()):
                    pass
        finally:
            for request_id in batch.open_ids:
                self._loop.cancel(request_id)
        return batch.results()

    async def _submit_more(self, batch: Batch, inbox: asyncio.Queue[Event]) -> None:
        if batch.submissions:
            try:
                batch.opened(await self._submit(batch.submissions, inbox))
            except CapacityError as error:
                batch.refused(error)

    async def _call(self, task: Callable[[Engine], T]) -> T:
        return await asyncio.wrap_future(self._loop.call(task))


class _PostOffice:
    """Carries a step's events to their event loops with one wake-up per loop."""

    def __init__(self) -> None:
        self._bags: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Event], Event]]] = {}
        self._lock = threading.Lock()

    def mailbox(self, inbox: asyncio.Queue[Event]) -> Mailbox:
        """Return where the engine's thread leaves events for an inbox of the running loop."""
        loop = asyncio.get_running_loop()

        def leave(event: Event) -> None:
            with self._lock:
                self._bags.setdefault(loop, []).append((inbox, event))

        return leave

    def flush(self) -> list[str]:
        """Hand every loop what was left for it; return the requests whose loop is closed."""
        with self._lock:
            bags, self._bags = self._bags, {}
        orphans: list[str] = []
        for loop, bag in bags.items():
            try:
                loop.call_soon_threadsafe(_deliver, bag)
            except RuntimeError:  # the loop is closed, and with it everybody who waited
                orphans += [event.request_id for _, event in bag]
        return orphans


def _deliver(bag: list[tuple[asyncio.Queue[Event], Event]]) -> None:
    for inbox, event in bag:
        inbox.put_nowait(event)
