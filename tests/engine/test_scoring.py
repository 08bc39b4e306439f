from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.engine.scoring import Scoring
from kvloom.errors import KvloomError
from tests.engine.worlds import BOOKS, TOKENIZER, expected_logprobs
from tests.fake_model import Oracle

TOKENS = BOOKS[0][:30]
ORACLE = Oracle()
LOGITS = torch.stack([ORACLE.logits(TOKENS[: row + 1]) for row in range(len(TOKENS))])


@given(
    first=st.integers(0, 29),
    cuts=st.sets(st.integers(1, 29)),
    goes_back=st.integers(0, 10),
    keep=st.booleans(),
)
def test_scores_do_not_depend_on_the_chunks_nor_on_rows_run_again(
    first: int, cuts: set[int], goes_back: int, keep: bool
) -> None:
    scoring = Scoring(TOKENS, first, 2, keep)
    edges = [0, *sorted(cuts), 30]
    for start, stop in itertools.pairwise(edges):
        # A preempted request runs some rows again.
        again = max(start - goes_back, 0)
        assert scoring.wants(stop) == (first < min(stop, 29) and scoring.next_row < 29)
        scoring.take(LOGITS[again:stop], again, TOKENIZER)
    expected = expected_logprobs(ORACLE, TOKENS, first)
    scores = [e[t].logprob for e, t in zip(scoring.scores, TOKENS[first + 1 :], strict=True)]
    assert scores == pytest.approx(expected, abs=1e-5)
    if keep and first < 29:
        assert scoring.logits is not None
        assert torch.equal(scoring.logits, LOGITS[first:29])
    else:
        assert scoring.logits is None


def test_kept_logits_are_no_view_of_the_step_s() -> None:
    scoring = Scoring(TOKENS, 0, 0, True)
    step = LOGITS.clone()
    scoring.take(step, 0, TOKENIZER)
    step.zero_()
    assert scoring.logits is not None
    assert torch.equal(scoring.logits, LOGITS[:29])


def test_logits_that_are_no_numbers_are_said() -> None:
    with pytest.raises(KvloomError, match="nan"):
        Scoring(TOKENS, 0, 0, False).take(torch.full((30, 32), torch.nan), 0, TOKENIZER)
