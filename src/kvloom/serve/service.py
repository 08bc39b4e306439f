"""The server's parts in one place, and the way from prompts to the engine's chunks.

Knows: the engine, its tokenizer, and how many prompts of one request run at once.
Does not know: the wire format.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar, cast

from starlette.requests import Request

from kvloom.engine.tenants import tenant_of
from kvloom.errors import KvloomError, RequestError
from kvloom.outputs import StreamChunk
from kvloom.params import SamplingParams
from kvloom.serve.backend import Backend, Tokenizer
from kvloom.serve.config import ServerConfig
from kvloom.serve.documents import Documents, Snapshot
from kvloom.serve.errors import EngineFailedError, GenerationAbortedError, UnknownModelError
from kvloom.serve.guard import Guard
from kvloom.serve.joins import Joined, JoinOptions, check_parts, token_part
from kvloom.serve.metrics import Metrics
from kvloom.serve.parts import Ask, PromptPart
from kvloom.serve.usage import with_joining

PROMPTS_AT_ONCE = 64

logger = logging.getLogger(__name__)
T = TypeVar("T")
PromptChunks = AsyncGenerator[tuple[int, StreamChunk], None]


@dataclass(frozen=True, slots=True)
class Service:
    """What every route needs.

    Attributes:
        llm: the engine.
        config: the server's settings.
        metrics: what is counted.
        guard: ends work that nobody waits for.
        documents: what clients keep here.
        created: Unix time the server started at.
    """

    llm: Backend
    config: ServerConfig
    metrics: Metrics
    guard: Guard = field(default_factory=Guard)
    documents: Documents = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))
    # One thread: long texts must not hold up the event loop, and a tokenizer serves one caller.
    _tokenizing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="kvloom-tokenizing")
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "documents", Documents(self.config.max_documents))
        self.metrics.documents.set_function(lambda: len(self.documents))

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        return self.config.served_model_name or self.llm.model_path.name

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and completion may come to."""
        return self.llm.config.max_model_len or self.llm.spec.max_positions

    async def close(self) -> None:
        """End the engine and the tokenizing thread, once changes of documents are over."""
        await self.documents.close()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        await self.llm.close()

    def check_model(self, name: str | None) -> None:
        """Refuse any model but the served one; no name means that one.

        Raises:
            UnknownModelError: the name is another.
        """
        if name is not None and name != self.model_name:
            raise UnknownModelError(
                f"The model {name!r} is not served here; this server has {self.model_name!r}."
            )

    async def with_tokenizer(self, work: Callable[[Tokenizer], T]) -> T:
        """Return what `work` returns, run beside the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._tokenizing, work, self.llm.tokenizer)

    def snapshots(
        self, owner: str, document_ids: Iterable[str], tenant: str | None
    ) -> dict[str, Snapshot]:
        """Return documents as they are now, each once, by id.

        Args:
            owner: whose they are.
            document_ids: their names.
            tenant: digest of whose KV is used; None where only texts are read.

        Raises:
            UnknownDocumentError: the owner has no such document.
            RequestError: a document was made with another salt.
        """
        found = {each: self.documents.get(owner, each) for each in dict.fromkeys(document_ids)}
        for each, held in found.items():
            if tenant not in (None, held.document.tenant):
                raise RequestError(
                    f"{each} was made with another cache_salt, or with none; send what it was made "
                    "with, or make it again.",
                    param="cache_salt",
                )
        return {each: held.snapshot() for each, held in found.items()}

    async def join(
        self, parts: Sequence[PromptPart], how: JoinOptions, tenant: str, *, num_behind: int
    ) -> Joined:
        """Return the beginning of prompts, whose KV is there.

        Args:
            parts: up to the last one that has KV.
            how: they are joined.
            tenant: digest of whose KV may answer; that of the documents.
            num_behind: tokens of the longest prompt behind them.

        Raises:
            RequestError: there are too many parts or tokens.
            UnsupportedModelError: the model's positions cannot be moved.
            CapacityError: the KV memory cannot hold them.
        """
        check_parts(parts, num_behind, self.max_model_len)
        asked = [token_part(part) for part in parts]
        with _failures_reported():
            document = await self.llm.join_tokens(
                asked,
                fidelity=how.fidelity,
                share=how.share,
                planner=how.planner,
                tenant=tenant,
            )
        joined = Joined(tuple(parts), document)
        self.metrics.joined(joined.receipt, len(document.tokens))
        return joined

    async def generate(
        self, prompts: Sequence[Ask], params: SamplingParams, joined: Joined | None = None
    ) -> PromptChunks:
        """Yield (which prompt, chunk); closing the generator cancels every prompt.

        Args:
            prompts: at least one.
            params: of all of them.
            joined: what they begin with; the receipt of one of them has what it took.

        Raises:
            KvloomError: the engine refuses a prompt or gives it up.
        """
        source = self._one(0, prompts[0], params) if len(prompts) == 1 else None
        receipt = None if joined is None else joined.receipt
        try:
            async with aclosing(source or self._many(prompts, params)) as chunks:
                async for prompt, chunk in chunks:
                    usage = chunk.usage
                    if usage is not None and receipt is not None:
                        usage, receipt = with_joining(usage, receipt), None
                    if usage is not None:
                        self.metrics.finished(usage)
                    yield prompt, replace(chunk, usage=usage)
        finally:
            if joined is not None:
                await joined.document.close()

    async def _one(self, index: int, prompt: Ask, params: SamplingParams) -> PromptChunks:
        ended = False
        with _failures_reported():
            chunks = self.llm.stream_tokens(
                prompt.tokens,
                params,
                prompt.base,
                exact_only=prompt.exact_only,
                tenant=prompt.tenant,
            )
            stream = cast(AsyncGenerator[StreamChunk, None], chunks)
            with self.metrics.awaiting_first_token() as first_token:
                async with aclosing(stream):
                    async for chunk in stream:
                        first_token()
                        if chunk.finish_reason == "abort":
                            break
                        ended = chunk.usage is not None
                        yield index, chunk
        if not ended:
            raise GenerationAbortedError("The engine gave the request up; ask again.")

    async def _many(self, prompts: Sequence[Ask], params: SamplingParams) -> PromptChunks:
        # A bounded queue: where the client reads slowly, its prompts wait, not the memory.
        queue: asyncio.Queue[tuple[int, StreamChunk] | Exception | None] = asyncio.Queue(1)
        waiting = iter(enumerate(prompts))

        async def work() -> None:
            try:
                for index, prompt in waiting:
                    async with aclosing(self._one(index, prompt, params)) as chunks:
                        async for item in chunks:
                            await queue.put(item)
                await queue.put(None)
            except Exception as error:
                await queue.put(error)

        workers = [asyncio.create_task(work()) for _ in prompts[:PROMPTS_AT_ONCE]]
        try:
            working = len(workers)
            while working:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    working -= 1
                else:
                    yield item
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


@contextmanager
def _failures_reported() -> Iterator[None]:
    """Log what nobody foresaw, and say no more of it than that it happened."""
    try:
        yield
    except KvloomError:
        raise
    except Exception as error:
        logger.exception("engine failed on a request")
        raise EngineFailedError(
            "The engine failed on this request; the server's log holds the reason."
        ) from error


def service_of(request: Request) -> Service:
    """Return the parts of the server that a request came to."""
    service: Service = request.app.state.service
    return service


def owner_of(request: Request) -> str:
    """Return whose documents and KV a request may use: a digest of its API key, if it has one."""
    owner: str = request.state.owner
    return owner


def salt_of(owner: str, cache_salt: str | None) -> str | None:
    """Return what keeps a request's KV from others: whose it is, its own salt, or both."""
    return ":".join(part for part in (owner, cache_salt) if part) or None


def tenant_for(owner: str, cache_salt: str | None) -> str:
    """Return the digest under which a request's KV is kept and found."""
    return tenant_of(salt_of(owner, cache_salt))
