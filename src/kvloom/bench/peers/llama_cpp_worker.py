"""llama.cpp as one engine of the bench: its library as its server drives it.

Knows: batches of several sequences, the memory of a sequence, and how parts of it are kept.
Does not know: kvloom, tasks or other engines.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
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

# Sequences at once and tokens over all of them; a longer prompt or a larger batch is an error.
_MOST_SEQUENCES = 32
_MOST_TOKENS = 16384
_KEPT = 0  # the sequence that outlives a request, like a slot of the server
_ASIDE = 1  # where the cells behind a change wait: a batch must go on where its sequence ends

Placed = tuple[int, int, int, bool]
"""A token, its position, its sequence, and whether its logits are wanted."""


class LlamaCppWorker:
    """Answers the bench with a context; one prompt reuses the start of the one before."""

    def __init__(self) -> None:
        self._library: Any = None
        self._context: Any = None
        self._memory: Any = None
        self._batch: Any = None
        self._batch_tokens = 0
        self._vocabulary_size = 0
        self._kept: list[int] = []

    def load(self, fields: dict[str, Any]) -> Loaded:
        """Load the GGUF file with the library's default settings."""
        import llama_cpp

        request = LoadRequest(**fields)
        self._library = llama_cpp
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            request.model.encode(), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise RuntimeError(f"llama.cpp cannot read {request.model}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = _MOST_TOKENS
        params.n_seq_max = _MOST_SEQUENCES
        params.kv_unified = True
        threads = request.threads or os.cpu_count() or 1
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context; is there too little memory?")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch_tokens = int(llama_cpp.llama_n_batch(self._context))
        self._batch = llama_cpp.llama_batch_init(self._batch_tokens, 0, 1)
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        self._vocabulary_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        return Loaded(
            model_path=request.model,
            dtype=_describe(llama_cpp, model),
            threads=threads,
            versions={"llama-cpp-python": llama_cpp.__version__},
            ways=("exact", "shifted"),
        )

    def remember(self, fields: dict[str, Any]) -> Remembered:
        """Compute the tokens in the kept sequence."""
        self._prefill_kept(RememberRequest(**fields).tokens)
        return Remembered()

    def complete(self, fields: dict[str, Any]) -> Completion:
        """Generate for one prompt in the kept sequence, or for many in sequences of their own."""
        request = CompleteRequest(**fields)
        started = time.perf_counter()
        if len(request.prompts) == 1:
            prefill = self._shift_kept if request.way == "shifted" else self._prefill_kept
            first, cached_tokens = prefill(request.prompts[0])
            tokens = [first]
        else:
            tokens, cached_tokens = self._prefill_all(request.prompts), 0
        first_token_s = time.perf_counter() - started
        outputs = [[token] for token in tokens]
        lengths = [len(prompt) for prompt in request.prompts]
        for step in range(request.new_tokens - 1):
            placed = [
                (output[-1], length + step, sequence, True)
                for sequence, (output, length) in enumerate(zip(outputs, lengths, strict=True))
            ]
            for output, token in zip(outputs, self._decode(placed), strict=True):
                output.append(token)
        total_s = time.perf_counter() - started
        if len(request.prompts) == 1:
            self._kept = [*request.prompts[0], *outputs[0][:-1]]
        return Completion(
            token_ids=outputs,
            first_token_s=first_token_s,
            total_s=max(total_s, first_token_s),
            cached_tokens=cached_tokens,
        )

    def _prefill_kept(self, prompt: list[int]) -> tuple[int, int]:
        """Compute what the kept sequence lacks; return a token, and how many were kept."""
        kept = min(equal_start(self._kept, prompt), len(prompt) - 1)
        self._library.llama_memory_seq_rm(self._memory, _KEPT, kept, -1)
        last = len(prompt) - 1
        placed = [(prompt[at], at, _KEPT, at == last) for at in range(kept, len(prompt))]
        (token,) = self._decode(placed)
        self._kept = list(prompt)
        return token, kept

    def _shift_kept(self, prompt: list[int]) -> tuple[int, int]:
        """Compute what is new in the middle of the kept sequence, and move what is behind it.

        It is what the server's `--cache-reuse` does, by hand and for a change: the keys behind are
        rotated at the next decode, and nothing sees the new tokens but what is computed later. The
        last token is computed again, for its logits.
        """
        start, behind = _changed(self._kept, prompt)
        if not behind:
            return self._prefill_kept(prompt)
        library, memory = self._library, self._memory
        old_end, new_end, last = len(self._kept) - behind, len(prompt) - behind, len(prompt) - 1
        library.llama_memory_seq_cp(memory, _KEPT, _ASIDE, old_end, -1)
        library.llama_memory_seq_rm(memory, _KEPT, start, -1)
        library.llama_memory_seq_add(memory, _ASIDE, old_end, -1, new_end - old_end)
        self._decode([(prompt[at], at, _KEPT, False) for at in range(start, new_end)])
        library.llama_memory_seq_cp(memory, _ASIDE, _KEPT, new_end, last)
        library.llama_memory_seq_rm(memory, _ASIDE, -1, -1)
        (token,) = self._decode([(prompt[last], last, _KEPT, True)])
        self._kept = list(prompt)
        return token, len(prompt) - (new_end - start) - 1

    def _prefill_all(self, prompts: Sequence[list[int]]) -> list[int]:
        """Compute every prompt in a sequence of its own; return a token for each."""
        self._library.llama_memory_clear(self._memory, False)
        self._kept = []
        placed = [
            (token, at, sequence, at == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
        ]
        return self._decode(placed)

    def _decode(self, placed: Sequence[Placed]) -> list[int]:
        """Compute tokens, as many at once as a batch takes; return the likeliest wanted ones."""
        chosen: list[int] = []
        for start in range(0, len(placed), self._batch_tokens):
            chunk = placed[start : start + self._batch_tokens]
            self._fill(chunk)
            status = self._library.llama_decode(self._context, self._batch)
            if status:
                raise RuntimeError(f"llama_decode failed with status {status}")
            chosen += [self._likeliest(row) for row, place in enumerate(chunk) if place[3]]
        return chosen

    def _fill(self, chunk: Sequence[Placed]) -> None:
        batch = self._batch
        batch.n_tokens = len(chunk)
        for row, (token, position, sequence, wanted) in enumerate(chunk):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = wanted

    def _likeliest(self, row: int) -> int:
        import numpy as np

        logits = self._library.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary_size,)).argmax())


def _changed(old: Sequence[int], new: Sequence[int]) -> tuple[int, int]:
    """Return how many tokens are the same before a change, and behind it."""
    before = equal_start(old, new)
    behind = equal_start(old[::-1], new[::-1])
    return before, min(behind, min(len(old), len(new)) - before)


def _describe(library: Any, model: Any) -> str:
    """Return what the file says of its format, such as "llama 135M Q4_1"."""
    import ctypes

    text = ctypes.create_string_buffer(128)
    library.llama_model_desc(model, text, 128)
    return text.value.decode(errors="replace")


def operations(_progress: Progress) -> Mapping[str, Operation]:
    """Return what this worker can do."""
    worker = LlamaCppWorker()
    return {"load": worker.load, "remember": worker.remember, "complete": worker.complete}


if __name__ == "__main__":
    serve(operations)
