"""Scoring: log-probabilities of tokens that were given, not drawn.

Knows: which rows' logits are wanted, and which were seen already.
Does not know: documents or steps; a preempted request goes on where its scores end.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvloom.decode.detokenize import TokenText
from kvloom.decode.logprobs import token_logprobs
from kvloom.outputs import TokenLogprobs


@dataclass(slots=True)
class Scoring:
    """The scores of a prompt's tokens from one place on.

    Attributes:
        tokens: the prompt; row i scores token i + 1.
        next_row: first row whose logits are still wanted.
        alternatives: likeliest tokens reported besides.
        keep_logits: keep the rows' logits whole.
        scores: one entry per scored token.
    """

    tokens: list[int]
    next_row: int
    alternatives: int
    keep_logits: bool
    scores: list[TokenLogprobs] = field(default_factory=list)
    _logits: list[Tensor] = field(default_factory=list)

    def wants(self, stop: int) -> bool:
        """Whether rows before `stop` hold logits that are still wanted."""
        return self.next_row < min(stop, len(self.tokens) - 1)

    def take(self, logits: Tensor, first_row: int, tokenizer: TokenText) -> None:
        """Score the tokens that follow these rows, (s, v).

        Raises:
            KvloomError: a row's logits are not finite.
        """
        stop = min(first_row + len(logits), len(self.tokens) - 1)
        if self.next_row >= stop:
            return
        wanted = logits[self.next_row - first_row : stop - first_row]
        targets = self.tokens[self.next_row + 1 : stop + 1]
        counts = [self.alternatives] * len(targets)
        self.scores += token_logprobs(wanted, targets, counts, tokenizer)
        if self.keep_logits:
            self._logits.append(wanted.clone())
        self.next_row = stop

    @property
    def logits(self) -> Tensor | None:
        """The logits that were kept, fp32 (tokens, v)."""
        return torch.cat(self._logits) if self._logits else None
