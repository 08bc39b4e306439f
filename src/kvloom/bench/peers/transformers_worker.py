"""transformers as one engine of the bench: `generate`, the way its documentation drives it.

Knows: left padding, the streamer that tells when a token was there, and reuse of a cache.
Does not know: kvloom, tasks or other engines.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from torch import Tensor

_PAD = 0  # masked, so any id of the vocabulary does


class TransformersWorker:
    """Answers the bench with a model of transformers."""

    def __init__(self) -> None:
        self._model: Any = None
        self._kept: Any = None

    def load(self, fields: dict[str, Any]) -> Loaded:
        """Load the model with its default attention."""
        import torch
        import transformers

        request = LoadRequest(**fields)
        if request.threads is not None:
            torch.set_num_threads(request.threads)
        auto: Any = transformers.AutoModelForCausalLM
        model = auto.from_pretrained(
            request.model, dtype=request.dtype, use_safetensors=True, local_files_only=True
        )
        self._model = model.eval().requires_grad_(False)
        # Without an end-of-text token, so that every engine generates the same number of tokens.
        generation_config: Any = transformers.GenerationConfig
        self._model.generation_config = generation_config(
            do_sample=False, eos_token_id=None, pad_token_id=_PAD
        )
        return Loaded(
            model_path=request.model,
            dtype=str(model.dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            versions={"transformers": transformers.__version__, "torch": torch.__version__},
        )

    def remember(self, fields: dict[str, Any]) -> Remembered:
        """Run the tokens and keep their cache."""
        import torch
        from transformers import DynamicCache

        tokens = torch.tensor([RememberRequest(**fields).tokens])
        cache = DynamicCache(config=self._model.config)
        with torch.inference_mode():
            self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self._kept = cache
        return Remembered()

    def complete(self, fields: dict[str, Any]) -> Completion:
        """Generate for all prompts as one padded batch."""
        request = CompleteRequest(**fields)
        if not request.shared_tokens:
            self._kept = None  # its memory belongs to the task that asked for it
        elif self._kept is None:
            raise RuntimeError("no tokens are kept; ask for `remember` first")
        clock = _Clock()
        started = time.perf_counter()
        token_ids, attention_mask = _left_padded(request.prompts)
        output = self._model.generate(
            token_ids,
            attention_mask=attention_mask,
            max_new_tokens=request.new_tokens,
            past_key_values=self._kept_cache(request.shared_tokens),
            streamer=clock,
        )
        total_s = time.perf_counter() - started
        return Completion(
            token_ids=output[:, token_ids.shape[1] :].tolist(),
            first_token_s=clock.times[1] - started,
            total_s=total_s,
            cached_tokens=request.shared_tokens,
        )

    def _kept_cache(self, num_tokens: int) -> Any:
        """Return the kept cache cut back to what was remembered, or None for a cold start."""
        from transformers.cache_utils import DynamicLayer

        if not num_tokens:
            return None
        # A layer with a window has dropped what would be cut back to: it must be copied.
        if any(type(layer) is not DynamicLayer for layer in self._kept.layers):
            return copy.deepcopy(self._kept)
        self._kept.crop(num_tokens - self._kept.get_seq_length())
        return self._kept


class _Clock:
    """A streamer that notes when it is fed: first with the prompt, then with every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Streamers have this."""


def _left_padded(prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, both [b, s]."""
    import torch

    width = max(map(len, prompts))
    token_ids = torch.full((len(prompts), width), _PAD)
    attention_mask = torch.zeros_like(token_ids)
    for row, prompt in enumerate(prompts):
        token_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    return token_ids, attention_mask


def operations(_progress: Progress) -> Mapping[str, Operation]:
    """Return what this worker can do."""
    worker = TransformersWorker()
    return {"load": worker.load, "remember": worker.remember, "complete": worker.complete}


if __name__ == "__main__":
    serve(operations)
