"""What is asked becomes a request with room for what was asked, or is refused."""

from __future__ import annotations

from typing import Any

import pytest

from kvloom.engine.asking import Wishes, make_request
from kvloom.engine.limits import Limits
from kvloom.errors import RequestError
from kvloom.params import SamplingParams

LIMITS = Limits(vocab_size=32, model_positions=100, memory_tokens=80, user_tokens=None)
NONE = Wishes(None, False, "", None, False)


@pytest.mark.parametrize(("wanted", "granted"), [(5, 5), (70, 70), (71, 70), (None, 70)])
def test_no_more_is_generated_than_fits(wanted: int | None, granted: int) -> None:
    request = make_request(3, LIMITS, range(1, 11), SamplingParams(max_tokens=wanted, n=2), NONE)
    assert request.max_tokens == granted
    assert (request.request_id, len(request.keys)) == ("request-3", 2)


def test_scores_are_kept_where_somebody_wants_them() -> None:
    assert make_request(0, LIMITS, [1, 2], None, NONE).scoring is None
    scored = make_request(0, LIMITS, [1, 2], None, Wishes(None, False, "", 0, True)).scoring
    assert scored is not None
    assert scored.next_row == 0
    assert make_request(0, LIMITS, [1], SamplingParams(prompt_logprobs=1), NONE).scoring is not None


@pytest.mark.parametrize(
    ("tokens", "params", "param"),
    [
        ([], None, "prompt"),
        ([1] * 81, None, "prompt"),
        ([32], None, "prompt"),
        ([1], "greedy", "params"),
        ([1], SamplingParams(stop_token_ids=(40,)), "stop_token_ids"),
    ],
)
def test_what_cannot_run_is_refused(tokens: list[int], params: Any, param: str) -> None:
    with pytest.raises(RequestError) as refused:
        make_request(0, LIMITS, tokens, params, NONE)
    assert refused.value.param == param
