"""The server's parts in one place, and the way from prompts to the engine's chunks.

Knows: the engine, its tokenizer, and how many prompts of one request run at once.
Does not know: the wire format.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from kvloom.errors import KvloomError
from kvloom.outputs import StreamChunk
from kvloom.params import SamplingParams
from kvloom.serve.backend import Backend, Tokenizer
from kvloom.serve.config import ServerConfig
from kvloom.serve.errors import EngineFailedError, GenerationAbortedError, UnknownModelError
from kvloom.serve.guard import Guard
from kvloom.serve.metrics import Metrics

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
        created: Unix time the server started at.
    """

    llm: Backend
    config: ServerConfig
    metrics: Metrics
    guard: Guard = field(default_factory=Guard)
    created: int = field(default_factory=lambda: int(time.time()))
    # One thread: long texts must not hold up the event loop, and a tokenizer serves one caller.
    _tokenizing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="kvloom-tokenizing")
    )

    @property
    def model_name(self) -> str:
        """The model's name in the API."""
        return self.config.served_model_name or self.llm.model_path.name

    @property
    def max_model_len(self) -> int:
        """Tokens that prompt and completion may come to."""
        return self.llm.config.max_model_len or self.llm.spec.max_positions

    async def close(self) -> None:
        """End the engine and the tokenizing thread."""
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

    async def chat_tokens(self, messages: list[dict[str, Any]]) -> list[int]:
        """Return the token ids of a conversation.

        Raises:
            RequestError: the model's template refuses the messages.
        """
        return await self.with_tokenizer(lambda tokenizer: tokenizer.chat_tokens(messages))

    async def generate(self, prompts: Sequence[list[int]], params: SamplingParams) -> PromptChunks:
        """Yield (which prompt, chunk); closing the generator cancels every prompt.

        Raises:
            KvloomError: the engine refuses a prompt or gives it up.
        """
        source = self._one(0, prompts[0], params) if len(prompts) == 1 else None
        async with aclosing(source or self._many(prompts, params)) as chunks:
            async for prompt, chunk in chunks:
                if chunk.usage is not None:
                    self.metrics.finished(chunk.usage)
                yield prompt, chunk

    async def _one(self, index: int, prompt: list[int], params: SamplingParams) -> PromptChunks:
        ended = False
        try:
            stream = cast(AsyncGenerator[StreamChunk, None], self.llm.stream(prompt, params))
            with self.metrics.awaiting_first_token() as first_token:
                async with aclosing(stream):
                    async for chunk in stream:
                        first_token()
                        if chunk.finish_reason == "abort":
                            break
                        ended = chunk.usage is not None
                        yield index, chunk
        except KvloomError:
            raise
        except Exception as error:
            logger.exception("engine failed on a request")
            raise EngineFailedError(
                "The engine failed on this request; the server's log holds the reason."
            ) from error
        if not ended:
            raise GenerationAbortedError("The engine gave the request up; ask again.")

    async def _many(self, prompts: Sequence[list[int]], params: SamplingParams) -> PromptChunks:
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
