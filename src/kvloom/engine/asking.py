"""Asking: what a caller wants becomes a request, or an error that says why not.

Knows: what a request must be to be run at all.
Does not know: when it runs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvloom.decode.state import check_vocabulary, draw_keys
from kvloom.engine.limits import Limits
from kvloom.engine.request import Request
from kvloom.engine.scoring import Scoring
from kvloom.errors import RequestError
from kvloom.kv.doc import KVDoc
from kvloom.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Wishes:
    """What is wanted beside a completion.

    Attributes:
        base: a document whose KV the prompt may start with.
        exact_only: take of it what equals a fresh prefill, and no more.
        tenant: whose KV may answer, and whose this becomes, as `hash_tenant` gives it.
        score_from: score the prompt's tokens behind this row; None scores none.
        keep_logits: give the logits of the scored rows as well.
        storable: whether the prompt may be stored as others are.
    """

    base: KVDoc | None
    exact_only: bool
    tenant: str
    score_from: int | None
    keep_logits: bool
    storable: bool = True


def make_request(
    number: int,
    limits: Limits,
    prompt_tokens: Sequence[int],
    params: SamplingParams | None,
    wishes: Wishes,
) -> Request:
    """Return a request that can be run.

    Raises:
        RequestError: the prompt is empty, too long or outside of the vocabulary.
    """
    tokens = limits.check(prompt_tokens, generates=params is not None)
    score_from, alternatives = wishes.score_from, 0
    if not isinstance(params, SamplingParams | None):
        raise RequestError(
            f"params are {type(params).__name__}; give SamplingParams.", param="params"
        )
    if params is not None:
        check_vocabulary(params, limits.vocab_size)
        if params.prompt_logprobs is not None:
            score_from, alternatives = 0, params.prompt_logprobs
    scoring = None
    if score_from is not None:
        scoring = Scoring(tokens, score_from, alternatives, wishes.keep_logits)
    room = limits.max_tokens - len(tokens)
    return Request(
        request_id=f"request-{number}",
        prompt_tokens=tokens,
        params=params,
        keys=() if params is None else draw_keys(params),
        max_tokens=0 if params is None else min(params.max_tokens or room, room),
        base=wishes.base,
        scoring=scoring,
        submitted_s=time.monotonic(),
        exact_only=wishes.exact_only,
        tenant=wishes.tenant,
        storable=wishes.storable,
    )
