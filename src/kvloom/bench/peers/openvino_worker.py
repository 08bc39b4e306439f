"""OpenVINO GenAI as one engine of the bench: its continuous batching with prefix caching.

Knows: requests, steps and what a step adds.
Does not know: kvloom, tasks or other engines.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
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

_FORMAT = "int8"


class OpenVinoWorker:
    """Answers the bench with a pipeline."""

    def __init__(self) -> None:
        self._pipeline: Any = None
        self._requests = 0

    def load(self, fields: dict[str, Any]) -> Loaded:
        """Load the converted model."""
        import openvino
        import openvino_genai

        request = LoadRequest(**fields)
        threads = request.threads or os.cpu_count() or 1
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            request.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        return Loaded(
            model_path=request.model,
            dtype=_FORMAT,
            threads=threads,
            versions={
                "openvino": openvino.get_version().partition("-")[0],
                "openvino-genai": openvino_genai.__version__.partition("-")[0],
            },
        )

    def remember(self, fields: dict[str, Any]) -> Remembered:
        """Send the tokens as an earlier request; prefix caching keeps them."""
        self._generate([RememberRequest(**fields).tokens], 1)
        return Remembered()

    def complete(self, fields: dict[str, Any]) -> Completion:
        """Add all prompts and step until every one has its tokens."""
        request = CompleteRequest(**fields)
        return self._generate(request.prompts, request.new_tokens)

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> Completion:
        import numpy as np
        import openvino
        import openvino_genai

        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        outputs: list[list[int]] = [[] for _ in prompts]
        first_token_s = 0.0
        started = time.perf_counter()
        handles = []
        for prompt in prompts:
            tokens = openvino.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self._pipeline.add_request(self._requests, tokens, config))
            self._requests += 1
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
            for handle, output in zip(handles, outputs, strict=True):
                if handle.can_read():
                    for part in handle.read().values():
                        output.extend(part.generated_ids)
            if not first_token_s and any(outputs):
                first_token_s = time.perf_counter() - started
        return Completion(
            token_ids=outputs,
            first_token_s=first_token_s,
            total_s=time.perf_counter() - started,
        )


def operations(_progress: Progress) -> Mapping[str, Operation]:
    """Return what this worker can do."""
    worker = OpenVinoWorker()
    return {"load": worker.load, "remember": worker.remember, "complete": worker.complete}


if __name__ == "__main__":
    serve(operations)
