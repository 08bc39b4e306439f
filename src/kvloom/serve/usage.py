"""Usage as the OpenAI API words it, with kvloom's receipt beside it.

Knows: the engine's receipts and OpenAI's field names.
Does not know: choices or texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kvloom.outputs import EditReceipt, Usage


def usage_fields(usages: Sequence[Usage], *, only_echo: bool = False) -> dict[str, Any]:
    """Return the `usage` object of a reply; receipts of several prompts are added up.

    Args:
        usages: one receipt per prompt.
        only_echo: the drawn token was dropped, so none is reported.
    """
    prompt_tokens = sum(usage.prompt_tokens for usage in usages)
    completion_tokens = 0 if only_echo else sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
        "kvloom": _receipt(usages),
    }


def _receipt(usages: Sequence[Usage]) -> dict[str, Any]:
    tokens: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for usage in usages:
        tokens.update(usage.provenance.tokens)
        nbytes.update(usage.provenance.nbytes)
    firsts = [u.time_to_first_token_s for u in usages if u.time_to_first_token_s is not None]
    totals = [u.total_s for u in usages if u.total_s is not None]
    return {
        "computed_tokens": sum(usage.computed_tokens for usage in usages),
        "cached_tokens": sum(usage.cached_tokens for usage in usages),
        "preemptions": sum(usage.preemptions for usage in usages),
        "time_to_first_token_s": min(firsts, default=None),
        "total_s": max(totals, default=None),
        "provenance": {"tokens": dict(tokens), "bytes": dict(nbytes)},
    }


def with_joining(usage: Usage, receipt: EditReceipt) -> Usage:
    """Return the receipt of a prompt with what it took to join its parts before."""
    computed = usage.computed_tokens + receipt.recomputed
    first, total = usage.time_to_first_token_s, usage.total_s
    return replace(
        usage,
        computed_tokens=computed,
        cached_tokens=max(0, min(usage.cached_tokens, usage.prompt_tokens - computed)),
        time_to_first_token_s=None if first is None else first + receipt.seconds,
        total_s=None if total is None else total + receipt.seconds,
    )
