"""One step from the model's logits to tokens with their log-probabilities.

Knows: the order: log-probabilities of the raw logits, penalties, then the draw.
Does not know: text beyond single tokens, or when a generation ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from kvloom.decode.detokenize import TokenText
from kvloom.decode.logprobs import token_logprobs
from kvloom.decode.penalties import penalise
from kvloom.decode.sample import sample
from kvloom.decode.state import SamplingState
from kvloom.errors import KvloomError
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
    logits: Float[Tensor, "s v"], states: Sequence[SamplingState], tokenizer: TokenText
) -> list[Draw | KvloomError]:
    """Draw the next token of every row; a row that cannot be drawn gets its error instead.

    Args:
        logits: the model's logits, one row per sequence; unchanged.
        states: one per row; unchanged until the sequence accepts its token.
        tokenizer: gives the texts of reported tokens.
    """
    tokens = sample(penalise(logits, states), states)
    draws: list[Draw | KvloomError] = []
    for row, (token, state) in enumerate(zip(tokens, states, strict=True)):
        alternatives = state.params.logprobs
        if isinstance(token, KvloomError):
            draws.append(token)
        elif alternatives is None:
            draws.append(Draw(token))
        else:
            draws.append(_described(logits[row : row + 1], token, alternatives, tokenizer))
    return draws


def _described(
    logits: Tensor, token: int, alternatives: int, tokenizer: TokenText
) -> Draw | KvloomError:
    try:
        return Draw(token, token_logprobs(logits, [token], [alternatives], tokenizer)[0])
    except KvloomError as error:
        return error
