"""Streams: the chunks of one request as an iterator of the thread that asked.

Knows: queues, and that a stream that is left ends its request.
Does not know: asyncio, or how requests are run.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from queue import SimpleQueue

from kvloom.engine.batch import chunk_or_raise
from kvloom.engine.engine import Engine
from kvloom.engine.loop import EngineLoop
from kvloom.engine.request import Event
from kvloom.kv.doc import KVDoc
from kvloom.outputs import StreamChunk
from kvloom.params import SamplingParams


def stream_tokens(
    loop: EngineLoop,
    tokens: list[int],
    params: SamplingParams | None,
    base: KVDoc | None = None,
    *,
    tenant: str,
    exact_only: bool = False,
) -> Iterator[StreamChunk]:
    """Yield what every step adds behind these tokens; closing the iterator cancels the request.

    Args:
        loop: runs the request, which is submitted before this returns.
        tokens: the prompt.
        params: how to generate; None takes the defaults.
        base: a document whose KV the prompt may start with.
        tenant: whose KV may answer besides, and whose this becomes.
        exact_only: take of it what equals a fresh prefill, and no more.

    Raises:
        RequestError: the prompt or its parameters are wrong.
        CapacityError: too many requests wait.
    """
    params = params or SamplingParams()
    inbox: SimpleQueue[Event] = SimpleQueue()

    def submit(engine: Engine) -> str:
        return engine.submit(tokens, params, base=base, exact_only=exact_only, tenant=tenant)

    (request_id,) = loop.submit_and_wait([submit], inbox.put)
    chunks = _receive(loop, request_id, inbox)
    next(chunks)
    return chunks  # type: ignore[return-value]


def _receive(
    loop: EngineLoop, request_id: str, inbox: SimpleQueue[Event]
) -> Generator[StreamChunk | None, None, None]:
    """Yield None, then the chunks: once started, the generator cancels where it is left."""
    try:
        yield None
        while True:
            chunk = chunk_or_raise(inbox.get())
            yield chunk
            if chunk.usage is not None:
                return
    finally:
        loop.cancel(request_id)
