"""Collects the chunks of a request into the objects that users of other engines know.

Knows: how chunks add up.
Does not know: where they come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kvloom.outputs import (
    CompletionOutput,
    FinishReason,
    RequestOutput,
    StreamChunk,
    TokenLogprobs,
    Usage,
)


@dataclass(slots=True)
class _Completion:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def output(self, index: int, *, logprobs_wanted: bool) -> CompletionOutput:
        chosen = zip(self.token_ids, self.logprobs, strict=logprobs_wanted)
        total = math.fsum(entry[token].logprob for token, entry in chosen)
        return CompletionOutput(
            index=index,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=tuple(self.logprobs) if logprobs_wanted else None,
            cumulative_logprob=total if logprobs_wanted else None,
        )


class Collector:
    """One request's chunks so far."""

    def __init__(
        self, prompt: str | None, prompt_tokens: list[int], *, logprobs_wanted: bool
    ) -> None:
        self._prompt = prompt
        self._prompt_tokens = tuple(prompt_tokens)
        self._logprobs_wanted = logprobs_wanted
        self._completions: dict[int, _Completion] = {}
        self._usage: Usage | None = None
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self._request_id = ""

    @property
    def done(self) -> bool:
        """Whether the request's last chunk has come."""
        return self._usage is not None

    def feed(self, chunk: StreamChunk) -> None:
        """Take the next chunk."""
        completion = self._completions.setdefault(chunk.index, _Completion())
        completion.texts.append(chunk.text)
        completion.token_ids += chunk.token_ids
        completion.logprobs += chunk.logprobs or ()
        if chunk.finish_reason is not None:
            completion.finish_reason = chunk.finish_reason
            completion.stop_reason = chunk.stop_reason
        if chunk.prompt_logprobs is not None:
            self._prompt_logprobs = chunk.prompt_logprobs
        self._usage = chunk.usage or self._usage
        self._request_id = chunk.request_id

    def output(self) -> RequestOutput:
        """Return the finished request."""
        assert self._usage is not None, "asked for an unfinished request"
        outputs = tuple(
            self._completions[index].output(index, logprobs_wanted=self._logprobs_wanted)
            for index in sorted(self._completions)
        )
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_tokens,
            outputs=outputs,
            usage=self._usage,
            prompt_logprobs=self._prompt_logprobs,
        )
