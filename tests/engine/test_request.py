from __future__ import annotations

from kvloom.decode.accept import Emission
from kvloom.engine.request import Request, Sequence
from kvloom.engine.scoring import Scoring
from kvloom.params import SamplingParams
from tests.engine.worlds import fake_engine, greedy


def sequence(
    prompt: int = 10, params: SamplingParams | None = None, scoring: Scoring | None = None
) -> Sequence:
    request = Request(
        request_id="r",
        prompt_tokens=list(range(1, prompt + 1)),
        params=params,
        keys=(),
        max_tokens=5,
        base=None,
        scoring=scoring,
        reuse_prefix=True,
        submitted_s=10.0,
    )
    made = Sequence(0, prompt, request=request, index=0, tokens=list(request.prompt_tokens))
    made.doc = fake_engine().new_document()
    request.sequences.append(made)
    return made


def test_rows_are_the_last_scheduled_ones_and_only_the_very_last_draws() -> None:
    made = sequence(params=greedy())
    made.num_computed = 4
    rows = made.rows(3)
    assert (rows.tokens.tolist(), rows.pos.tolist(), rows.logits) == ([2, 3, 4], [1, 2, 3], "none")
    made.num_computed = 10
    rows = made.rows(6)
    assert (rows.tokens.tolist(), rows.logits) == ([5, 6, 7, 8, 9, 10], "last")
    kv_only = sequence()
    kv_only.num_computed = 10
    assert kv_only.rows(10).logits == "none"


def test_scored_rows_give_all_logits() -> None:
    tokens = list(range(1, 11))
    made = sequence(params=greedy(), scoring=Scoring(tokens, 5, 0, False))
    for computed, num_rows, logits in ((5, 5, "none"), (6, 1, "all"), (10, 4, "all")):
        made.num_computed = computed
        assert made.rows(num_rows).logits == logits


def test_rows_of_the_prompt_count_and_generated_ones_only_when_they_are_run_again() -> None:
    made = sequence(prompt=10)
    counts = []
    for computed, num_rows in ((6, 6), (10, 4), (11, 1), (12, 1), (8, 8), (13, 5), (14, 1)):
        made.num_computed = computed
        counts.append(made.count_repeated(num_rows))
    assert counts == [6, 4, 0, 0, 8, 4, 0]


def test_prompt_scores_are_given_once() -> None:
    scoring = Scoring([1, 2], 0, 0, False, scores=[{}])
    made = sequence(params=greedy(), scoring=scoring)
    assert made.chunk(Emission("a", (1,))).prompt_logprobs == (None, {})
    assert made.chunk(Emission("b", (2,))).prompt_logprobs is None
    assert sequence(params=greedy()).chunk(Emission("a", (1,))).prompt_logprobs is None


def test_the_receipt_adds_up_times_and_preemptions() -> None:
    made = sequence(params=greedy())
    made.request.first_token_s = 10.5
    made.preemptions = 2
    made.request.cached_tokens, made.request.computed_tokens = 3, 7
    usage = made.request.usage(now_s=12.0)
    assert (usage.prompt_tokens, usage.cached_tokens, usage.computed_tokens) == (10, 3, 7)
    assert (usage.preemptions, usage.time_to_first_token_s, usage.total_s) == (2, 0.5, 2.0)
    assert made.request.num_unfinished == 1
    made.ended = True
    assert made.request.num_unfinished == 0
