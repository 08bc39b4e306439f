"""Log-probabilities of chosen and likeliest tokens, from the model's logits as they are.

Knows: log-softmax, ranks, the text of single tokens.
Does not know: temperature and penalties; reported probabilities come before both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kvloom.decode.detokenize import TokenText
from kvloom.decode.sample import unusable_logits
from kvloom.outputs import Logprob, TokenLogprobs

# Rows per pass: a whole prompt at once would need several times the memory of its logits.
BLOCK_ROWS = 32


def token_logprobs(
    logits: Float[Tensor, "s v"],
    token_ids: Sequence[int],
    alternatives: Sequence[int],
    tokenizer: TokenText,
) -> list[TokenLogprobs]:
    """Return per row the chosen token first, then the likeliest tokens by rank.

    Serves generated tokens and prompts alike: row i of a prompt's logits belongs to the token that
    follows row i. The chosen token stands once, also where it is among the likeliest.

    Args:
        logits: the model's logits, before temperature and penalties.
        token_ids: the chosen token of each row.
        alternatives: how many of the likeliest tokens each row reports besides.
        tokenizer: gives the tokens' texts.

    Raises:
        KvloomError: a row's logits are not finite.
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        found += _block_logprobs(logits[block], token_ids[block], alternatives[block], tokenizer)
    return found


def _block_logprobs(
    logits: Tensor, token_ids: Sequence[int], alternatives: Sequence[int], tokenizer: TokenText
) -> list[TokenLogprobs]:
    logits = logits.float()
    for peak in logits.amax(dim=-1).tolist():
        if not abs(peak) < torch.inf:
            raise unusable_logits(peak)
    norms = logits.logsumexp(dim=-1)
    chosen = logits.gather(1, torch.tensor(token_ids, dtype=torch.int64)[:, None])
    ranks = (logits > chosen).sum(dim=-1) + 1
    top_values, top_ids = logits.topk(min(max(alternatives), logits.shape[1]), dim=-1)
    found: list[TokenLogprobs] = []
    for row, (token_id, count) in enumerate(zip(token_ids, alternatives, strict=True)):
        norm = float(norms[row])
        entries = {
            token_id: describe(tokenizer, token_id, float(chosen[row, 0]) - norm, int(ranks[row]))
        }
        values = top_values[row, :count].tolist()
        likeliest = sorted(zip(values, top_ids[row, :count].tolist(), strict=True), key=_rank_key)
        for value, other in likeliest:
            # Equal logits share the best of their ranks, as the chosen token's rank does.
            rank = values.index(value) + 1
            entries.setdefault(other, describe(tokenizer, other, value - norm, rank))
        found.append(entries)
    return found


def _rank_key(entry: tuple[float, int]) -> tuple[float, int]:
    return -entry[0], entry[1]


def describe(tokenizer: TokenText, token_id: int, logprob: float, rank: int) -> Logprob:
    """Return a log-probability with the token's text and bytes."""
    token_bytes = tokenizer.token_bytes(token_id)
    try:
        text = token_bytes.decode("utf-8")
    except UnicodeDecodeError:
        return Logprob(logprob, rank, None, token_bytes)
    # Special tokens stand for no bytes, but have a name.
    text = text or tokenizer.decode([token_id], skip_special_tokens=False)
    return Logprob(logprob, rank, text, token_bytes)
