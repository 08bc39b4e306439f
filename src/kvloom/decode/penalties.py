"""Changes of logits before sampling: bias, penalties, and the mask of `min_tokens`.

Knows: the order, which is vLLM's: logit bias; repetition penalty over prompt and output; frequency
and presence penalty over the output; last the mask, so that nothing brings a masked token back.
Does not know: temperature, truncation or draws.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kvloom.decode.state import SamplingState


def penalise(row: Float[Tensor, " v"], state: SamplingState) -> Float[Tensor, " v"]:
    """Return the logits to sample from: the given tensor if nothing differs, else a copy.

    Args:
        row: the model's logits for one sequence.
        state: the sequence's.
    """
    if not state.adjusts_logits:
        return row
    row = row.clone()
    if len(state.bias_ids):
        row[state.bias_ids] += state.bias.to(row.dtype)
    if state.counts is not None:
        ids = state.counts.ids
        row[ids] = _penalised(row[ids], state.counts.counts, state)
    if state.masks_end:
        row[state.end_ids[state.end_ids < row.shape[0]]] = -torch.inf
    return row


def _penalised(values: Tensor, counts: Tensor, state: SamplingState) -> Tensor:
    params = state.params
    if params.repetition_penalty != 1.0:
        factor = params.repetition_penalty
        values = torch.where(values > 0, values / factor, values * factor)
    penalty = params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
    return values - penalty
