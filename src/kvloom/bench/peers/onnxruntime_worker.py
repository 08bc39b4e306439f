"""ONNX Runtime GenAI as one engine of the bench: its generator, and its rewinding to reuse a start.

Knows: batches padded on the right, the settings of a model folder, and what a generator keeps.
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
    equal_start,
    serve,
)

_FORMAT = "int4"
# Room behind a remembered text for what the requests that follow add.
_ROOM = 256


class OnnxRuntimeWorker:
    """Answers the bench with generators; the one that remembers is kept and rewound."""

    def __init__(self) -> None:
        self._model: Any = None
        self._pad = 0
        self._kept: Any = None
        self._kept_tokens: list[int] = []

    def load(self, fields: dict[str, Any]) -> Loaded:
        """Load the converted model."""
        import onnxruntime_genai

        request = LoadRequest(**fields)
        threads = request.threads or os.cpu_count() or 1
        settings = json.loads(Path(request.model, "genai_config.json").read_text(encoding="utf-8"))
        # The vocabulary's last token pads and ends: a text's own end must neither stop a prompt,
        # so that every engine generates as many tokens, nor be masked as padding.
        self._pad = int(settings["model"]["vocab_size"]) - 1
        config = onnxruntime_genai.Config(request.model)
        changes = {
            "eos_token_id": self._pad,
            "pad_token_id": self._pad,
            "decoder": {"session_options": {"intra_op_num_threads": threads}},
        }
        config.overlay(json.dumps({"model": changes}))
        self._model = onnxruntime_genai.Model(config)
        return Loaded(
            model_path=request.model,
            dtype=_FORMAT,
            threads=threads,
            versions={"onnxruntime-genai": onnxruntime_genai.__version__},
        )

    def remember(self, fields: dict[str, Any]) -> Remembered:
        """Compute the tokens in a generator that is kept."""
        tokens = RememberRequest(**fields).tokens
        self._forget()
        self._kept = self._generator(1, len(tokens) + _ROOM)
        self._append(self._kept, [tokens])
        self._kept_tokens = tokens
        return Remembered()

    def complete(self, fields: dict[str, Any]) -> Completion:
        """Generate for all prompts as one padded batch, behind the kept start if there is one."""
        request = CompleteRequest(**fields)
        started = time.perf_counter()
        cached_tokens = 0
        if request.shared_tokens:
            (prompt,) = request.prompts
            cached_tokens = min(equal_start(self._kept_tokens, prompt), len(prompt) - 1)
            generator = self._kept
            generator.rewind_to(cached_tokens)
            self._append(generator, [prompt[cached_tokens:]])
            self._kept_tokens = prompt
        else:
            self._forget()
            width = max(map(len, request.prompts))
            generator = self._generator(len(request.prompts), width + request.new_tokens)
            padded = [row + [self._pad] * (width - len(row)) for row in request.prompts]
            self._append(generator, padded)
        outputs: list[list[int]] = [[] for _ in request.prompts]
        first_token_s = 0.0
        for _ in range(request.new_tokens):
            generator.generate_next_token()
            for output, token in zip(outputs, generator.get_next_tokens(), strict=True):
                output.append(int(token))
            first_token_s = first_token_s or time.perf_counter() - started
        return Completion(
            token_ids=outputs,
            first_token_s=first_token_s,
            total_s=time.perf_counter() - started,
            cached_tokens=cached_tokens,
        )

    def _generator(self, rows: int, length: int) -> Any:
        import onnxruntime_genai

        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, max_length=length, batch_size=rows)
        return onnxruntime_genai.Generator(self._model, params)

    def _append(self, generator: Any, rows: list[list[int]]) -> None:
        import numpy as np

        generator.append_tokens(np.array(rows, dtype=np.int32))

    def _forget(self) -> None:
        self._kept, self._kept_tokens = None, []


def operations(_progress: Progress) -> Mapping[str, Operation]:
    """Return what this worker can do."""
    worker = OnnxRuntimeWorker()
    return {"load": worker.load, "remember": worker.remember, "complete": worker.complete}


if __name__ == "__main__":
    serve(operations)
