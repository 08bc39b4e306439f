"""Usage of several prompts."""

from __future__ import annotations

from openai.types import CompletionUsage

from kvloom.outputs import EditReceipt, Provenance, Usage
from kvloom.serve.usage import usage_fields, with_joining

FIRST = Usage(10, 4, 6, 4, 1, 0.5, 2.0, Provenance({"exact": 10, "moved": 2}, {"plain": 100}))
SECOND = Usage(20, 5, 0, 20, 0, 0.2, 1.0, Provenance({"exact": 20}, {"plain": 50, "int4": 9}))


def test_receipts_add_up() -> None:
    fields = usage_fields([FIRST, SECOND])
    usage = CompletionUsage.model_validate(fields)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (30, 9, 39)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 6
    assert fields["kvloom"] == {
        "computed_tokens": 24,
        "cached_tokens": 6,
        "preemptions": 1,
        "time_to_first_token_s": 0.2,
        "total_s": 2.0,
        "provenance": {
            "tokens": {"exact": 30, "moved": 2},
            "bytes": {"plain": 150, "int4": 9},
        },
    }


def test_a_dropped_token_is_not_reported() -> None:
    fields = usage_fields([FIRST], only_echo=True)
    assert fields["completion_tokens"] == 0
    assert fields["total_tokens"] == fields["prompt_tokens"] == 10


def test_times_that_are_not_known_stay_unknown() -> None:
    fields = usage_fields([Usage(1, 0, 0, 1)])
    assert fields["kvloom"]["time_to_first_token_s"] is None
    assert fields["kvloom"]["total_s"] is None


def test_joining_is_part_of_the_price() -> None:
    joined = with_joining(FIRST, EditReceipt("repaired", {}, recomputed=3, seconds=1.0))
    assert (joined.prompt_tokens, joined.completion_tokens) == (10, 4)
    assert (joined.computed_tokens, joined.cached_tokens) == (7, 3)
    assert (joined.time_to_first_token_s, joined.total_s) == (1.5, 3.0)
    # Chunks that are computed behind a sink may take more rows than the prompt has.
    dear = with_joining(FIRST, EditReceipt("shifted", {}, recomputed=30))
    assert (dear.computed_tokens, dear.cached_tokens) == (34, 0)
    unknown = with_joining(Usage(9, 0, 0, 9), EditReceipt("shifted", {}, recomputed=1))
    assert (unknown.time_to_first_token_s, unknown.total_s) == (None, None)
