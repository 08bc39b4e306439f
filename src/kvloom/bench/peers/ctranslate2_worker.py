"""CTranslate2 as one engine of the bench: its `Generator` with a converted model.

Knows: the vocabulary that turns token ids into its strings, step callbacks and static prompts.
Does not know: kvloom, tasks or other engines.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvloom.bench.peers.wire import (
    CompleteRequest,
    Completion,
    Loaded,
    LoadRequest,
    Operation,
    Progress,
    Remembered,
    RememberRequest,
    serve,
)

_COMPUTE_TYPE = "int8"
# No token ends a text, so that every engine generates as many.
_NO_END: list[int] = []


class CTranslate2Worker:
    """Answers the bench with a generator; what is remembered becomes its static prompt."""

    def __init__(self) -> None:
        self._generator: Any = None
        self._vocabulary: list[str] = []
        self._kept: list[int] = []

    def load(self, fields: dict[str, Any]) -> Loaded:
        """Load the converted model."""
        import ctranslate2

        request = LoadRequest(**fields)
        threads = request.threads or os.cpu_count() or 1
        self._generator = ctranslate2.Generator(
            request.model,
            device="cpu",
            compute_type=_COMPUTE_TYPE,
            inter_threads=1,
            intra_threads=threads,
        )
        listing = Path(request.model, "vocabulary.json").read_text(encoding="utf-8")
        self._vocabulary = json.loads(listing)
        return Loaded(
            model_path=request.model,
            dtype=str(self._generator.compute_type),
            threads=threads,
            versions={"ctranslate2": ctranslate2.__version__},
        )

    def remember(self, fields: dict[str, Any]) -> Remembered:
        """Keep the tokens as a static prompt, and have its state computed."""
        self._kept = RememberRequest(**fields).tokens
        self._generate([[self._kept[-1]]], 1, static=self._kept[:-1])
        return Remembered()

    def complete(self, fields: dict[str, Any]) -> Completion:
        """Generate for all prompts as one batch."""
        request = CompleteRequest(**fields)
        # A static prompt is reused whole or not at all.
        static = self._kept[:-1] if request.shared_tokens == len(self._kept) else []
        prompts = [prompt[len(static) :] for prompt in request.prompts]
        return self._generate(prompts, request.new_tokens, static=static)

    def _generate(self, prompts: list[list[int]], new_tokens: int, static: list[int]) -> Completion:
        times: list[float] = []

        def note(_step: Any) -> bool:
            times.append(time.perf_counter())
            return False

        started = time.perf_counter()
        results = self._generator.generate_batch(
            [self._words(prompt) for prompt in prompts],
            static_prompt=self._words(static) or None,
            cache_static_prompt=bool(static),
            max_batch_size=0,
            beam_size=1,
            sampling_topk=1,
            min_length=0,
            max_length=new_tokens,
            include_prompt_in_result=False,
            end_token=_NO_END,
            callback=note,
        )
        total_s = time.perf_counter() - started
        return Completion(
            token_ids=[list(result.sequences_ids[0]) for result in results],
            first_token_s=times[0] - started,
            total_s=total_s,
            cached_tokens=len(static),
        )

    def _words(self, tokens: list[int]) -> list[str]:
        return [self._vocabulary[token] for token in tokens]


def operations(_progress: Progress) -> Mapping[str, Operation]:
    """Return what this worker can do."""
    worker = CTranslate2Worker()
    return {"load": worker.load, "remember": worker.remember, "complete": worker.complete}


if __name__ == "__main__":
    serve(operations)
