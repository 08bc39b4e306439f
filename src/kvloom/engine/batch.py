"""Batches: prompts that are run together, and their results in order.

Knows: which prompts still have to be submitted, which run, and which are done.
Does not know: how to submit or to wait; `LLM` and `AsyncLLM` do that in their own ways.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial

from kvloom.engine.collect import Collector
from kvloom.engine.engine import Engine
from kvloom.engine.loop import Submission
from kvloom.engine.request import Event, Failed
from kvloom.errors import CapacityError
from kvloom.outputs import RequestOutput, StreamChunk
from kvloom.params import SamplingParams


class Batch:
    """Prompts with their parameters; more than may wait are submitted as others end."""

    def __init__(
        self,
        asked: Sequence[tuple[str | None, list[int]]],
        params: Sequence[SamplingParams],
        tenant: str,
    ) -> None:
        """Begin with nothing submitted.

        Args:
            asked: text, if it was one, and token ids of every prompt.
            params: one per prompt.
            tenant: whose KV may answer, and whose this becomes.
        """
        pairs = list(zip(asked, params, strict=True))
        self._submissions: list[Submission] = [
            partial(_submit, tokens, wanted, tenant) for (_, tokens), wanted in pairs
        ]
        self._collectors = [
            Collector(text, tokens, logprobs_wanted=wanted.logprobs is not None)
            for (text, tokens), wanted in pairs
        ]
        self._waiting = deque(range(len(pairs)))
        self._open: dict[str, int] = {}

    @property
    def done(self) -> bool:
        """Whether every prompt has its result."""
        return not self._waiting and not self._open

    @property
    def open_ids(self) -> list[str]:
        """Requests that were submitted and have not ended."""
        return list(self._open)

    @property
    def submissions(self) -> list[Submission]:
        """What has to be submitted still, in order."""
        return [self._submissions[index] for index in self._waiting]

    def opened(self, request_ids: Sequence[str]) -> None:
        """Take note that the first submissions were taken."""
        for request_id in request_ids:
            self._open[request_id] = self._waiting.popleft()

    def refused(self, error: CapacityError) -> None:
        """Raise the error unless a place in the queue will be free when one's own requests end."""
        if error.retry_after_s is None or not self._open:
            raise error

    def take(self, event: Event) -> bool:
        """Take what a step added; return whether a request has ended.

        Raises:
            KvloomError: the request has failed.
        """
        chunk = chunk_or_raise(event)
        collector = self._collectors[self._open[chunk.request_id]]
        collector.feed(chunk)
        if collector.done:
            del self._open[chunk.request_id]
        return collector.done

    def results(self) -> list[RequestOutput]:
        """Return the finished requests in the order of the prompts."""
        return [collector.output() for collector in self._collectors]


def chunk_or_raise(event: Event) -> StreamChunk:
    """Return a generation's next chunk.

    Raises:
        KvloomError: the generation has failed.
    """
    if isinstance(event, Failed):
        raise event.error
    assert isinstance(event, StreamChunk)
    return event


def _submit(tokens: list[int], params: SamplingParams, tenant: str, engine: Engine) -> str:
    return engine.submit(tokens, params, tenant=tenant)
