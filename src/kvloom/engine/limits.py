"""Limits: what a prompt may be, said before anything is computed.

Knows: vocabulary and length.
Does not know: queues or running requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.errors import RequestError


@dataclass(frozen=True, slots=True)
class Limits:
    """How large a document may grow.

    Attributes:
        vocab_size: token ids are below this.
        model_positions: what the model supports.
        memory_tokens: what the KV memory holds.
        user_tokens: what the user allows; None allows all.
    """

    vocab_size: int
    model_positions: int
    memory_tokens: int
    user_tokens: int | None

    @property
    def max_tokens(self) -> int:
        """Tokens that one document may grow to."""
        limits = [self.model_positions, self.memory_tokens]
        return min(limits if self.user_tokens is None else [*limits, self.user_tokens])

    def check(self, prompt_tokens: Sequence[int], *, generates: bool) -> list[int]:
        """Return the prompt as a list.

        Raises:
            RequestError: it is empty, too long or holds ids outside of the vocabulary.
        """
        tokens = list(prompt_tokens)
        if not tokens:
            raise RequestError("The prompt is empty; give at least one token.", param="prompt")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int):
                raise RequestError(
                    f"The prompt holds {token!r}; give text or a list of integers.", param="prompt"
                )
            if not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"The prompt holds token {token}, but this model's vocabulary ends at "
                    f"{self.vocab_size - 1}; use the model's own tokenizer.",
                    param="prompt",
                )
        longest = self.max_tokens - 1 if generates else self.max_tokens
        if len(tokens) > longest:
            reasons = [f"the model's context is {self.model_positions}"]
            reasons.append(f"the KV memory holds {self.memory_tokens}")
            if self.user_tokens is not None:
                reasons.append(f"max_model_len is {self.user_tokens}")
            raise RequestError(
                f"The prompt has {len(tokens)} tokens and at most {longest} fit "
                f"({', '.join(reasons)}); shorten it or raise the limit.",
                param="prompt",
            )
        return tokens
