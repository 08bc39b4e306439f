"""What the sampler remembers of one running sequence.

Knows: the parameters, the seed, how many tokens were generated and which ones were seen.
Does not know: logits, text, or the KV the tokens were computed with; preemption leaves it as it is.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvloom.errors import RequestError
from kvloom.params import SamplingParams


class DrawKey(NamedTuple):
    """What a completion's draws depend on besides the step.

    Attributes:
        seed: unsigned 64-bit number shared by the completions of a request.
        completion: which of the request's completions it is.
    """

    seed: int
    completion: int = 0


def draw_keys(params: SamplingParams) -> tuple[DrawKey, ...]:
    """Return one key per completion, with a random seed where none was given."""
    seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
    return tuple(DrawKey(seed, completion) for completion in range(params.n))


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Check that every token id the parameters name is one the model can produce.

    Raises:
        RequestError: an id of `logit_bias` or `stop_token_ids` is outside the vocabulary.
    """
    for name, token_ids in (
        ("logit_bias", params.logit_bias),
        ("stop_token_ids", params.stop_token_ids),
    ):
        for token_id in token_ids:
            if token_id >= vocab_size:
                raise RequestError(
                    f"{name} names token {token_id}, but the model's vocabulary ends at "
                    f"{vocab_size - 1}; leave it out or use an id of this model.",
                    param=name,
                )


class TokenCounts:
    """How often each seen token was generated, as arrays that grow with the distinct tokens."""

    def __init__(self, seen: Sequence[int] = ()) -> None:
        self._ids = np.unique(np.asarray(seen, dtype=np.int64))
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._slots = {int(token_id): slot for slot, token_id in enumerate(self._ids)}

    def add(self, token_id: int) -> None:
        """Count one more generated token."""
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.resize(self._ids, 2 * slot + 16)
            self._counts = np.concatenate([self._counts, np.zeros(slot + 16, dtype=np.float32)])
        self._ids[slot] = token_id
        self._counts[slot] += 1

    @property
    def ids(self) -> Tensor:
        """The distinct tokens seen, int64."""
        return torch.from_numpy(self._ids[: len(self._slots)])

    @property
    def counts(self) -> Tensor:
        """How often each of `ids` was generated, fp32; 0 for tokens of the prompt only."""
        return torch.from_numpy(self._counts[: len(self._slots)])


class SamplingState:
    """The sampler's memory of one completion.

    Attributes:
        params: how tokens are drawn.
        key: what its draws depend on.
        step: tokens generated so far.
        counts: the tokens seen; None where no penalty asks for them.
        bias_ids: token ids with a logit bias.
        bias: fp32 addend of each of `bias_ids`.
        end_ids: tokens that may not be drawn before `min_tokens`.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_tokens: Sequence[int] = (),
        *,
        key: DrawKey,
        eos_token_ids: Iterable[int] = (),
    ) -> None:
        """Begin a completion.

        Args:
            params: how tokens are drawn.
            prompt_tokens: the prompt; read only if a repetition penalty asks for it.
            key: what its draws depend on.
            eos_token_ids: the model's end-of-text tokens.
        """
        self.params = params
        self.key = key
        self.step = 0
        self.counts: TokenCounts | None = None
        if params.repetition_penalty != 1.0:
            self.counts = TokenCounts(prompt_tokens)
        elif params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            self.counts = TokenCounts()
        self.bias_ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
        self.bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        ends = sorted({*eos_token_ids, *params.stop_token_ids}) if params.min_tokens else []
        self.end_ids = torch.tensor(ends, dtype=torch.int64)
        self._always_adjusts = self.counts is not None or bool(params.logit_bias)
        self._masked_steps = params.min_tokens if ends else 0

    def record(self, token_id: int) -> None:
        """Take note of a generated token."""
        self.step += 1
        if self.counts is not None:
            self.counts.add(token_id)

    @property
    def masks_end(self) -> bool:
        """Whether the next token may not end the text."""
        return self.step < self._masked_steps

    @property
    def adjusts_logits(self) -> bool:
        """Whether the next logits differ from the model's before they are sampled."""
        return self._always_adjusts or self.masks_end
