"""One step from the model's logits to tokens with their log-probabilities.

Knows: the order: log-probabilities of the raw logits, penalties, then the draw.
Does not know: text beyond single tokens, or when a generation ends.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from kvloom.decode.detokenize import TokenText
from kvloom.decode.logprobs import token_logprobs
from kvloom.decode.penalties import penalise
from kvloom.decode.sample import sample
from kvloom.decode.state import SamplingState
from kvloom.outputs import TokenLogprobs


@dataclass(frozen=True, slots=True)
class Draw:
    """A drawn token.

    Attributes:
        token_id: the token.
        logprobs: it and its alternatives, if asked for.
    """

    token_id: int
    logprobs: TokenLogprobs | None = None


def draw(
    row: Float[Tensor, " v"],
    state: SamplingState,
    tokenizer: TokenText,
    likeliest: int | None = None,
) -> Draw:
    """Draw the next token of one sequence; no other sequence has a part in it.

    Args:
        row: the model's logits; unchanged.
        state: the sequence's; unchanged until it accepts its token.
        tokenizer: gives the texts of reported tokens.
        likeliest: the token of the largest logit, where it is known.

    Raises:
        KvloomError: no token can be drawn from these logits.
    """
    penalised = penalise(row, state)
    token = sample(penalised, state, likeliest if penalised is row else None)
    alternatives = state.params.logprobs
    if alternatives is None:
        return Draw(token)
    return Draw(token, token_logprobs(row[None], [token], [alternatives], tokenizer)[0])
