"""What a generation gives back: texts, tokens, log-probabilities and the receipt of its cost.

Knows: the shapes that users of other engines know.
Does not know: how any of it was computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token at one place.

    Attributes:
        logprob: natural logarithm of the probability, after temperature 1 and before penalties.
        rank: 1 for the most likely token.
        decoded_token: the token's text on its own; None if it is no whole character.
        token_bytes: the bytes the token stands for.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None
    token_bytes: bytes = b""


TokenLogprobs = Mapping[int, Logprob]


@dataclass(frozen=True, slots=True)
class Provenance:
    """How the KV behind an answer or a document came about, counted in tokens and bytes.

    Attributes:
        tokens: tokens by state; `exact`, and one entry per taint that occurs.
        nbytes: bytes of KV shown, by codec (`plain` is unencoded).
    """

    tokens: Mapping[str, int] = field(default_factory=dict)
    nbytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    """The receipt of one request.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens generated, over all completions.
        cached_tokens: prompt tokens whose KV was reused.
        computed_tokens: rows of the prompt that were run, recomputations after preemption included.
        preemptions: how often the request lost its memory and was computed again.
        time_to_first_token_s: seconds from submission to the first generated token.
        total_s: seconds from submission to the end.
        provenance: the state of the KV that the answer was read from.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    computed_tokens: int
    preemptions: int = 0
    time_to_first_token_s: float | None = None
    total_s: float | None = None
    provenance: Provenance = field(default_factory=Provenance)


Fidelity = Literal["exact", "repaired", "shifted"]
"""How near an edited document's KV comes to a fresh prefill: equal, partly computed again, or only
moved."""


PartVerb = Literal["compute", "load", "shift", "repair", "recompute"]
"""What is done with a part of a prompt: computed alone, brought from a tier of the store, shown
where it stands, some of its rows computed again, or all of it computed behind what is before it."""


@dataclass(frozen=True, slots=True)
class PartAction:
    """One thing that was done with one part of a joined prompt.

    Attributes:
        part: number of the part.
        action: what was done.
        rows: that were run for it.
        tier: where its KV lay; empty where it was computed.
        variant: which KV of its tokens was shown; empty where none was.
    """

    part: int
    action: PartVerb
    rows: int = 0
    tier: str = ""
    variant: str = ""


@dataclass(frozen=True, slots=True)
class EditReceipt:
    """What an edit of a document did to its KV.

    Attributes:
        fidelity: what was done; more exact than was asked where approximating would not pay.
        tokens: tokens of the new document by state; `exact`, and one entry per taint that occurs.
        recomputed: rows that were run.
        repaired: of these, rows of old tokens.
        deviation: how far the old values at the check layer are from what they would be now, as a
            share of their square; None where nobody compared.
        deviation_left: the part of it that was not repaired.
        canonical: the tokens are proved to be those that the tokenizer makes of the new text.
        lossless: the tokens spell the new text.
        seconds: time it took.
        actions: what was done with the parts of a joined prompt, in order of the parts.
        loaded_bytes: KV that was brought from the store for it.
    """

    fidelity: Fidelity
    tokens: Mapping[str, int]
    recomputed: int
    repaired: int = 0
    deviation: float | None = None
    deviation_left: float | None = None
    canonical: bool = False
    lossless: bool = True
    seconds: float = 0.0
    actions: tuple[PartAction, ...] = ()
    loaded_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DocumentLayout:
    """How a document's KV lies in memory.

    Attributes:
        nbytes: of the blocks it takes.
        blocks: of 64 tokens each, shared ones included.
        spans: stretches, each with a shift of its own.
        views: runs of slots that a decode step reads; with a query turned for each, or, where many
            short ones lie together, with their keys turned slot by slot as they are read.
    """

    nbytes: int
    blocks: int
    spans: int
    views: int


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        index: which of the `n` completions.
        text: the generated text.
        token_ids: the generated tokens.
        finish_reason: `stop`, `length` or `abort`.
        stop_reason: the stop string or token id that ended it; None for the end-of-text token.
        logprobs: per generated token, if asked for.
        cumulative_logprob: sum over the generated tokens, if log-probabilities were asked for.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    cumulative_logprob: float | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All completions of one prompt, with their receipt.

    Attributes:
        request_id: the engine's name of the request.
        prompt: the prompt's text; None if token ids were given.
        prompt_token_ids: the prompt's tokens.
        outputs: one entry per completion, by index.
        usage: what it cost.
        prompt_logprobs: per prompt token if asked for; the first is None.
        receipt: how the parts of the prompt were joined; None where it had none.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    usage: Usage
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    receipt: EditReceipt | None = None


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """What one step added to one completion of a streamed request.

    Attributes:
        request_id: the engine's name of the request.
        index: which of the `n` completions.
        text: text that can no longer change; may be empty while a character is incomplete.
        token_ids: tokens that were added.
        logprobs: per added token, if asked for.
        finish_reason: set on the completion's last chunk.
        stop_reason: the stop string or token id that ended it.
        usage: set on the request's last chunk.
        prompt_logprobs: set on the first chunk, if asked for.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    usage: Usage | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters and gauges of an engine since it was made.

    Attributes:
        running: sequences that run.
        waiting: requests that wait.
        pages_total: pages of the pool; a page is 64 slots of one layer and KV head.
        pages_free: pages that nobody owns.
        page_bytes: bytes of a page.
        kv_bytes_total: bytes of the pool.
        kv_bytes_used: bytes of owned pages.
        idle_documents: cached prefixes that no running request shows.
        requests_finished: requests by finish reason.
        prompt_tokens: tokens of all admitted prompts.
        cached_tokens: prompt tokens whose KV was reused.
        computed_tokens: prompt rows that were run.
        generated_tokens: tokens that were sampled.
        preemptions: sequences that lost their memory and were computed again.
        steps: forward passes.
        prefix_hits: admissions that reused at least one token.
        prefix_queries: admissions that looked for reusable tokens.
        idle_repaired_rows: rows of documents that were made exact while nobody waited.
        idle_repair_failures: documents that could not be made exact so, and stay as they are.
    """

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_free: int = 0
    page_bytes: int = 0
    kv_bytes_total: int = 0
    kv_bytes_used: int = 0
    idle_documents: int = 0
    requests_finished: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    prefix_hits: int = 0
    prefix_queries: int = 0
    idle_repaired_rows: int = 0
    idle_repair_failures: int = 0
