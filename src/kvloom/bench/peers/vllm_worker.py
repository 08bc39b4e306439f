"""vLLM as one engine of the bench: its engine with prefix caching, stepped in this process.

Knows: the variables that vLLM reads, requests, steps and what a step returns.
Does not know: kvloom, tasks or other engines.
"""

from __future__ import annotations

import os
import sys
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
from kvloom.config import parse_bytes

_DTYPE = "bfloat16"


class VllmWorker:
    """Answers the bench with an `LLM`'s engine."""

    def __init__(self) -> None:
        self._engine: Any = None
        self._requests = 0

    def load(self, fields: dict[str, Any]) -> Loaded:
        """Load the model."""
        request = LoadRequest(**fields)
        threads = request.threads or os.cpu_count() or 1
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ |= {
            # One process: its memory is what is measured, and a step is a call.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_NO_USAGE_STATS": "1",
            # What it compiles belongs to its environment and goes with it.
            "VLLM_CACHE_ROOT": str(Path(sys.prefix).parent / "models" / "vllm"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
        }
        import torch
        import vllm

        llm = vllm.LLM(
            model=request.model,
            dtype=_DTYPE,
            enable_prefix_caching=True,
            kv_cache_memory_bytes=parse_bytes(request.kv_memory),
            generation_config="vllm",
        )
        self._engine = llm.llm_engine
        return Loaded(
            model_path=request.model,
            dtype=_DTYPE,
            threads=torch.get_num_threads(),
            versions={"vllm": vllm.__version__, "torch of vllm": torch.__version__},
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
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        finished: dict[str, Any] = {}
        first_token_s = 0.0
        started = time.perf_counter()
        names = []
        for prompt in prompts:
            names.append(f"bench-{self._requests}")
            self._requests += 1
            self._engine.add_request(names[-1], {"prompt_token_ids": prompt}, params)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if not first_token_s and output.outputs[0].token_ids:
                    first_token_s = time.perf_counter() - started
                if output.finished:
                    finished[output.request_id] = output
        total_s = time.perf_counter() - started
        return Completion(
            token_ids=[list(finished[name].outputs[0].token_ids) for name in names],
            first_token_s=first_token_s,
            total_s=total_s,
            cached_tokens=sum(finished[name].num_cached_tokens or 0 for name in names),
        )


def operations(_progress: Progress) -> Mapping[str, Operation]:
    """Return what this worker can do."""
    worker = VllmWorker()
    return {"load": worker.load, "remember": worker.remember, "complete": worker.complete}


if __name__ == "__main__":
    serve(operations)
