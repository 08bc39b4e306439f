from __future__ import annotations

import pytest

from kvloom.engine.batch import Batch, chunk_or_raise
from kvloom.engine.request import Failed
from kvloom.errors import CapacityError, RequestError
from kvloom.outputs import StreamChunk, Usage
from kvloom.store.key import ANYBODY
from tests.engine.worlds import fake_engine, greedy

USAGE = Usage(prompt_tokens=1, completion_tokens=1, cached_tokens=0, computed_tokens=1)
FULL = CapacityError("full", retry_after_s=1.0)


def last_chunk(request_id: str, token: int) -> StreamChunk:
    return StreamChunk(request_id, 0, "x", (token,), finish_reason="stop", usage=USAGE)


def test_results_come_in_order_however_requests_end() -> None:
    batch = Batch([("a", [1]), ("b", [2]), (None, [3])], [greedy()] * 3, ANYBODY)
    assert len(batch.submissions) == 3
    batch.opened(["r0", "r1"])
    assert (len(batch.submissions), batch.open_ids, batch.done) == (1, ["r0", "r1"], False)
    assert batch.take(last_chunk("r1", 12)) is True
    batch.refused(FULL)
    batch.opened(["r2"])
    assert batch.take(StreamChunk("r2", 0, "x", (9,))) is False
    assert batch.take(last_chunk("r0", 11)) is True
    assert batch.take(last_chunk("r2", 13)) is True
    assert batch.done
    results = batch.results()
    assert [r.prompt for r in results] == ["a", "b", None]
    assert [r.outputs[0].token_ids for r in results] == [(11,), (12,), (9, 13)]


def test_submissions_submit_their_own_prompt() -> None:
    engine = fake_engine()
    batch = Batch([(None, [1]), (None, [2, 3])], [greedy(1), greedy(1, ignore_eos=True)], ANYBODY)
    batch.opened([submission(engine) for submission in batch.submissions])
    while not batch.done:
        for event in engine.step():
            batch.take(event)
    assert [r.prompt_token_ids for r in batch.results()] == [(1,), (2, 3)]


def test_a_refusal_is_raised_where_waiting_would_not_help() -> None:
    batch = Batch([(None, [1])], [greedy()], ANYBODY)
    with pytest.raises(CapacityError, match="full"):
        batch.refused(FULL)
    batch.opened(["r0"])
    batch.refused(FULL)
    with pytest.raises(CapacityError, match="never"):
        batch.refused(CapacityError("never"))


def test_a_failure_is_raised() -> None:
    error = RequestError("no")
    with pytest.raises(RequestError, match="no"):
        chunk_or_raise(Failed("r0", error))
