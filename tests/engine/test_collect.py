from __future__ import annotations

import pytest

from kvloom.engine.collect import Collector
from kvloom.outputs import Logprob, StreamChunk, Usage

USAGE = Usage(prompt_tokens=2, completion_tokens=3, cached_tokens=0, computed_tokens=2)


def test_chunks_of_several_completions_add_up_apart() -> None:
    collector = Collector("ab", [1, 2], logprobs_wanted=False)
    for chunk in (
        StreamChunk("r", 1, "x", (5,), prompt_logprobs=(None, {2: Logprob(-1.0, 1)})),
        StreamChunk("r", 0, "", (6,)),
        StreamChunk("r", 1, "y", (7,), finish_reason="stop", stop_reason="z"),
        StreamChunk("r", 0, "w", (), finish_reason="length", usage=USAGE),
    ):
        assert not collector.done
        collector.feed(chunk)
    assert collector.done
    output = collector.output()
    assert [(o.index, o.text, o.token_ids) for o in output.outputs] == [
        (0, "w", (6,)),
        (1, "xy", (5, 7)),
    ]
    assert [(o.finish_reason, o.stop_reason) for o in output.outputs] == [
        ("length", None),
        ("stop", "z"),
    ]
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "ab", (1, 2))
    assert output.usage is USAGE
    assert output.prompt_logprobs == (None, {2: Logprob(-1.0, 1)})
    assert [o.cumulative_logprob for o in output.outputs] == [None, None]
    assert [o.logprobs for o in output.outputs] == [None, None]


def test_log_probabilities_are_summed_over_the_chosen_tokens() -> None:
    collector = Collector(None, [1], logprobs_wanted=True)
    first = {5: Logprob(-1.5, 2), 6: Logprob(-0.5, 1)}
    collector.feed(StreamChunk("r", 0, "x", (5,), logprobs=(first,)))
    last = {7: Logprob(-2.0, 1)}
    collector.feed(
        StreamChunk("r", 0, "y", (7,), logprobs=(last,), finish_reason="stop", usage=USAGE)
    )
    (completion,) = collector.output().outputs
    assert completion.logprobs == (first, last)
    assert completion.cumulative_logprob == pytest.approx(-3.5)


def test_an_unfinished_request_has_no_output() -> None:
    collector = Collector(None, [1], logprobs_wanted=False)
    collector.feed(StreamChunk("r", 0, "x", (5,)))
    with pytest.raises(AssertionError, match="unfinished"):
        collector.output()
