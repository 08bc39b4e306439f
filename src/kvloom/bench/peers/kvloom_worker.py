"""kvloom as one engine of the bench, through its public API.

Knows: how a user runs `LLM` for speed and reads its times from outside.
Does not know: tasks or other engines.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kvloom.bench.peers.wire import (
    CompleteRequest,
    Completion,
    Loaded,
    LoadRequest,
    Operation,
    Progress,
    Remembered,
    RememberRequest,
    Tokenized,
    TokenizeRequest,
    serve,
)

if TYPE_CHECKING:
    from kvloom import LLM, SamplingParams, StreamChunk
    from kvloom.outputs import Fidelity


class KvloomWorker:
    """Answers the bench with an `LLM`; its automatic prefix cache is on, as it is by default."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._llm: LLM | None = None
        self._remembered: list[int] = []

    def load(self, fields: dict[str, Any]) -> Loaded:
        """Load the model."""
        import torch

        from kvloom import LLM, StoreSettings

        request = LoadRequest(**fields)
        settings = {"dtype": request.dtype, "kv_memory": request.kv_memory, **request.settings}
        settings.setdefault("repair_when_idle", False)  # what is approximate is measured as it is
        if request.store is not None:
            settings["store"] = StoreSettings(folder=Path(request.store))
        self._llm = LLM(request.model, threads=request.threads, progress=self._progress, **settings)
        passport = self._llm.passport
        return Loaded(
            model_path=str(self._llm.model_path),
            dtype=passport.formats.weights,
            threads=torch.get_num_threads(),
            versions=dict(passport.versions),
            ways=("exact", "repaired", "shifted", "restarted"),
        )

    def tokenize(self, fields: dict[str, Any]) -> Tokenized:
        """Return the tokens of a text."""
        encode = self._loaded.tokenizer.encode
        text = TokenizeRequest(**fields).text
        return Tokenized(leading=encode(""), tokens=encode(text, add_special_tokens=False))

    def remember(self, fields: dict[str, Any]) -> Remembered:
        """Send the tokens as an earlier request; the prefix cache keeps them."""
        self._remembered = RememberRequest(**fields).tokens
        self._loaded.generate(self._remembered, _greedy(1))
        return Remembered()

    def complete(self, fields: dict[str, Any]) -> Completion:
        """Stream one prompt, or generate many at once."""
        request = CompleteRequest(**fields)
        params = _greedy(request.new_tokens)
        if request.way in ("repaired", "shifted"):
            return self._change(request, params)
        if len(request.prompts) == 1:
            started = time.perf_counter()
            return _streamed(self._loaded.stream(request.prompts[0], params), started)
        started = time.perf_counter()
        results = self._loaded.generate(request.prompts, params)
        total_s = time.perf_counter() - started
        first_token_s = [result.usage.time_to_first_token_s for result in results]
        return Completion(
            token_ids=[list(result.outputs[0].token_ids) for result in results],
            first_token_s=min(seconds for seconds in first_token_s if seconds is not None),
            total_s=total_s,
            cached_tokens=sum(result.usage.cached_tokens for result in results),
        )

    def close(self) -> None:
        """End the engine."""
        if self._llm is not None:
            self._llm.close()

    def _change(self, request: CompleteRequest, params: SamplingParams) -> Completion:
        """Change a document of what was remembered into the prompt, and complete it.

        The times begin with the change: an editor has the document open, and its KV is there.
        """
        llm = self._loaded
        with closing(llm.document(self._remembered)) as document:
            text = llm.retokenizer.text(request.prompts[0])
            started = time.perf_counter()
            receipt = document.replace(text, fidelity=cast("Fidelity", request.way))
            done = _streamed(document.stream("", params), started)
        assert done.cached_tokens is not None
        return replace(done, cached_tokens=done.cached_tokens - receipt.recomputed)

    @property
    def _loaded(self) -> LLM:
        if self._llm is None:
            raise RuntimeError("no model is loaded; ask for `load` first")
        return self._llm


def _streamed(chunks: Iterable[StreamChunk], started: float) -> Completion:
    """Return what a stream yields, timed from a moment on."""
    token_ids: list[int] = []
    first_token_s, cached_tokens = 0.0, 0
    for chunk in chunks:
        if chunk.token_ids and not token_ids:
            first_token_s = time.perf_counter() - started
        token_ids += chunk.token_ids
        if chunk.usage is not None:
            cached_tokens = chunk.usage.cached_tokens
    total_s = time.perf_counter() - started
    return Completion(
        token_ids=[token_ids],
        first_token_s=first_token_s,
        total_s=total_s,
        cached_tokens=cached_tokens,
    )


def _greedy(new_tokens: int) -> SamplingParams:
    from kvloom import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)


def operations(progress: Progress) -> Mapping[str, Operation]:
    """Return what this worker can do."""
    worker = KvloomWorker(progress)
    return {
        "load": worker.load,
        "tokenize": worker.tokenize,
        "remember": worker.remember,
        "complete": worker.complete,
    }


if __name__ == "__main__":
    serve(operations)
