"""Requests and their sequences, from submission to the receipt.

Knows: the life of a request: its tokens, documents, counts and times.
Does not know: how rows are run or which of them run next.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from kvloom.decode.accept import Emission, GenerationState
from kvloom.decode.state import DrawKey
from kvloom.engine.scoring import Scoring
from kvloom.engine.shelf import Loading, Looking
from kvloom.errors import KvloomError
from kvloom.kv.doc import KVDoc
from kvloom.outputs import Provenance, StreamChunk, TokenLogprobs, Usage
from kvloom.params import SamplingParams
from kvloom.reuse.repair import RepairReceipt
from kvloom.sched.job import Job
from kvloom.store.key import ANYBODY
from kvloom.types import Rows


@dataclass(slots=True, kw_only=True)
class Request:
    """One submission.

    Attributes:
        request_id: its name.
        prompt_tokens: the prompt.
        params: how to generate; None computes KV and generates nothing.
        keys: what the draws of each completion depend on.
        max_tokens: tokens per completion at most, memory and context considered.
        base: a document whose KV the prompt may start with.
        scoring: what is wanted of the prompt's own tokens; None for nothing.
        reuse_prefix: whether other documents' KV may answer for the prompt.
        exact_only: take of the base what equals a fresh prefill, and no more.
        tenant: digest of whoever asks; nobody else's KV answers, and this answers nobody else.
        storable: whether its KV may be stored as that of others is.
        asked_store: whether the store was asked for the prompt's beginning.
        loading: what the store is about to give.
        submitted_s: time of submission.
    """

    request_id: str
    prompt_tokens: list[int]
    params: SamplingParams | None
    keys: tuple[DrawKey, ...]
    max_tokens: int
    base: KVDoc | None
    scoring: Scoring | None
    submitted_s: float
    reuse_prefix: bool = True
    exact_only: bool = False
    tenant: str = ANYBODY
    storable: bool = True
    asked_store: bool = False
    loading: Looking | Loading | None = None
    sequences: list[Sequence] = field(default_factory=list)
    cached_tokens: int | None = None
    computed_tokens: int = 0
    first_token_s: float | None = None
    provenance: Provenance = field(default_factory=Provenance)
    result: KVDoc | None = None
    prompt_logprobs_sent: bool = False

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs | None, ...] | None:
        """Return the prompt's scores the first time, where they were asked for."""
        wanted = self.params is not None and self.scoring is not None
        if self.prompt_logprobs_sent or not wanted or self.scoring is None:
            return None
        self.prompt_logprobs_sent = True
        return (None, *self.scoring.scores)

    def add_provenance(self, found: Provenance) -> None:
        """Count what one more document holds."""
        known = self.provenance
        tokens = Counter(known.tokens) + Counter(found.tokens)
        nbytes = Counter(known.nbytes) + Counter(found.nbytes)
        self.provenance = Provenance(tokens=dict(tokens), nbytes=dict(nbytes))

    @property
    def num_unfinished(self) -> int:
        """Sequences that have not ended."""
        return sum(not sequence.ended for sequence in self.sequences)

    def usage(self, now_s: float) -> Usage:
        """Return the receipt as of now."""
        states = [sequence.state_of_text for sequence in self.sequences]
        generated = sum(len(state.token_ids) for state in states if state is not None)
        first = self.first_token_s
        return Usage(
            prompt_tokens=len(self.prompt_tokens),
            completion_tokens=generated,
            cached_tokens=self.cached_tokens or 0,
            computed_tokens=self.computed_tokens,
            preemptions=sum(sequence.preemptions for sequence in self.sequences),
            time_to_first_token_s=None if first is None else first - self.submitted_s,
            total_s=now_s - self.submitted_s,
            provenance=self.provenance,
        )


@dataclass(slots=True, eq=False)
class Sequence(Job):
    """One completion of a request: a job with its tokens and document.

    Attributes:
        request: whose completion it is.
        index: which of the request's completions it is.
        tokens: prompt and generated tokens.
        doc: its document while it runs.
        state_of_text: what it has generated; None for a request without generation.
        ended: whether its last chunk is out.
    """

    request: Request = field(kw_only=True)
    index: int = field(kw_only=True)
    tokens: list[int] = field(kw_only=True)
    doc: KVDoc | None = None
    state_of_text: GenerationState | None = None
    ended: bool = False
    most_computed: int = 0

    def count_repeated(self, num_rows: int) -> int:
        """Return how many of the last rows belong to the prompt or were computed before."""
        stop = self.num_computed
        limit = max(len(self.request.prompt_tokens), self.most_computed)
        self.most_computed = max(self.most_computed, stop)
        return max(min(stop, limit) - (stop - num_rows), 0)

    def rows(self, num_rows: int) -> Rows:
        """Return the last rows that were scheduled, with the logits that are wanted of them."""
        assert self.doc is not None
        stop, scoring = self.num_computed, self.request.scoring
        start = stop - num_rows
        tokens = np.asarray(self.tokens[start:stop], dtype=np.int64)
        pos = np.arange(start, stop, dtype=np.int64)
        if scoring is not None and scoring.wants(stop):
            return Rows(self.doc, tokens, pos, "all")
        draws = self.request.params is not None and self.pending == 0
        return Rows(self.doc, tokens, pos, "last" if draws else "none")

    def chunk(self, emission: Emission, usage: Usage | None = None) -> StreamChunk:
        """Return what an emission adds, as the receiver sees it."""
        return StreamChunk(
            request_id=self.request.request_id,
            index=self.index,
            text=emission.text,
            token_ids=emission.token_ids,
            logprobs=emission.logprobs,
            finish_reason=emission.finish_reason,
            stop_reason=emission.stop_reason,
            usage=usage,
            prompt_logprobs=self.request.take_prompt_logprobs(),
        )


@dataclass(frozen=True, slots=True)
class Computed:
    """A request without generation is done.

    Attributes:
        request_id: its name.
        doc: the document that was computed, held until the receiver releases it.
        usage: what it cost.
        scores: log-probabilities per scored token, if asked for.
        logits: fp32 (tokens, v), if asked for.
    """

    request_id: str
    doc: KVDoc
    usage: Usage
    scores: tuple[TokenLogprobs, ...] = ()
    logits: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Repaired:
    """A repair is done.

    Attributes:
        request_id: its name.
        doc: the document that was repaired, held until the receiver releases it.
        receipt: what was done.
    """

    request_id: str
    doc: KVDoc
    receipt: RepairReceipt


@dataclass(frozen=True, slots=True)
class Failed:
    """A request ended with an error; the engine goes on.

    Attributes:
        request_id: its name.
        error: why.
    """

    request_id: str
    error: KvloomError


Event = StreamChunk | Computed | Repaired | Failed
