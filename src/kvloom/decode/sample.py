"""One token per row of logits: greedy, or one uniform number against the kept probabilities.

Knows: temperature, then min-p, top-k and top-p as in vLLM; draws that depend on seed, completion
and step only. Equal logits rank by token id.
Does not know: penalties, which change logits before, or what the tokens mean.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from kvloom.decode.state import DrawKey, SamplingState
from kvloom.errors import KvloomError
from kvloom.params import SamplingParams

# Rows are ranked this far first; a top-p that needs more tokens ranks them all.
FIRST_RANKS = 256


def sample(row: Float[Tensor, " v"], state: SamplingState, likeliest: int | None = None) -> int:
    """Draw the next token of one sequence.

    Args:
        row: penalised logits.
        state: the sequence's; read, not changed.
        likeliest: the token of the largest logit, where it is known.

    Raises:
        KvloomError: the largest logit is not a finite number.
    """
    if likeliest is None:
        # NumPy's argmax is several times faster than torch's; it too returns the first of equals.
        likeliest = int(row.float().cpu().numpy().argmax())
    peak = row[likeliest].item()
    if not math.isfinite(peak):
        raise unusable_logits(peak)
    if state.params.greedy or state.params.top_k == 1:
        return likeliest
    return _draw(row.float(), peak, state.params, uniform_number(state.key, state.step))


def uniform_number(key: DrawKey, step: int) -> float:
    """Return the number in [0, 1) that decides one draw.

    Source: Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3 (Philox).
    """
    counter = np.array([step, 0, 0, 0], dtype=np.uint64)
    bits = int(np.random.Philox(key=np.array(key, dtype=np.uint64), counter=counter).random_raw())
    return (bits >> 11) * 2.0**-53


def unusable_logits(peak: float) -> KvloomError:
    """Return the error of a row whose largest logit is not a finite number."""
    if peak == -np.inf:
        return KvloomError(
            "No token can be drawn: every logit is minus infinity. "
            "Lower min_tokens or remove entries of logit_bias and stop_token_ids."
        )
    return KvloomError(
        f"No token can be drawn: the model's logits hold {peak}. The weights are damaged or the "
        "number format overflows; check the model's files or load it with dtype='float32'."
    )


def _draw(row: Float[Tensor, " v"], peak: float, params: SamplingParams, uniform: float) -> int:
    if 0 < params.top_k < row.shape[0]:
        ids = _ranked(row, params.top_k)
        weights = _weights(row[ids], peak, params).double().numpy()
        kept = _top_p_length(weights, params.top_p * float(weights.sum()))
        return _pick_ranked(ids[:kept], weights[:kept], uniform)
    weights_by_id = _weights(row, peak, params)
    if params.top_p < 1.0:
        return _draw_top_p(row, weights_by_id, params.top_p, uniform)
    return _pick(weights_by_id.cumsum(0, dtype=torch.float64).numpy(), uniform)


def _draw_top_p(row: Tensor, weights_by_id: Tensor, top_p: float, uniform: float) -> int:
    mass = top_p * float(weights_by_id.sum(dtype=torch.float64))
    count = min(FIRST_RANKS, row.shape[0])
    ids = _ranked(row, count)
    weights = weights_by_id[ids].double().numpy()
    kept = _top_p_length(weights, mass)
    if kept < count or count == row.shape[0]:
        return _pick_ranked(ids[:kept], weights[:kept], uniform)
    all_kept = _with_mass(weights_by_id.numpy(), mass)
    return _pick(np.cumsum(all_kept, dtype=np.float64), uniform)


def _with_mass(weights: np.ndarray, mass: float) -> np.ndarray:
    """Set all but the largest weights that together hold the mass to 0."""
    # Values sort several times faster than ids by value; the ids of equal values come after.
    falling = np.sort(weights)[::-1]
    kept = _top_p_length(falling, mass)
    least = falling[kept - 1]
    largest = np.where(weights > least, weights, 0.0)
    equal = np.flatnonzero(weights == least)[: kept - np.count_nonzero(largest)]
    largest[equal] = least
    return largest


def _weights(values: Tensor, peak: float, params: SamplingParams) -> Tensor:
    """Probabilities over that of the likeliest token, 0 where min-p drops them."""
    # The peak goes first: it stays exactly 0, however small the temperature. The bound keeps the
    # factor finite in fp32, because 0 times infinity is not a number.
    weights = ((values - peak) * min(1.0 / params.temperature, 1e37)).exp_()
    if params.min_p > 0.0:
        weights.masked_fill_(weights < params.min_p, 0.0)
    return weights


def _ranked(row: Tensor, count: int) -> Tensor:
    """Ids of the largest logits, by falling logit and, among equals, rising id."""
    if count == row.shape[0]:
        return row.sort(descending=True, stable=True).indices
    values, ids = row.topk(count + 1)
    least = values[count]
    if values[count - 1] == least:
        # The cut goes through equal logits, of which topk returns any.
        above = ids[values > least]
        equal = (row == least).nonzero()[: count - len(above), 0]
        ids = torch.cat([above, equal])
    ids = ids[:count].sort().values
    return ids[row[ids].sort(descending=True, stable=True).indices]


def _top_p_length(weights: np.ndarray, mass: float) -> int:
    """Length of the shortest non-empty prefix that holds the mass; all where none does."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    return min(int(np.searchsorted(cumulative, mass, side="left")) + 1, len(weights))


def _pick_ranked(ids: Tensor, weights: np.ndarray, uniform: float) -> int:
    # By id, not by rank: rounding that swaps two near-equal logits moves no other token's share.
    by_id = ids.numpy().argsort()
    return int(ids[by_id[_pick(np.cumsum(weights[by_id]), uniform)]])


def _pick(cumulative: np.ndarray, uniform: float) -> int:
    # The product stays below the total, so that tokens without a share are never found.
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
