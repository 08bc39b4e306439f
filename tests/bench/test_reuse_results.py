"""What cannot be measured is refused in words; an answer counts before what a model says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvloom import RequestError
from kvloom.bench.reuse_results import ReuseOptions

from .case_fakes import joined, outcome


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"chunks": 1}, "chunks is 1; it must be at least 2"),
        ({"chunk_tokens": -1}, "chunk_tokens is -1"),
        ({"scored": 0}, "scored is 0"),
        ({"shares": ()}, "shares are"),
        ({"shares": (2.0,)}, "shares are"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        replace(ReuseOptions(), **options)  # type: ignore[arg-type]


def test_the_answer_is_what_is_expected_where_there_is_one() -> None:
    made = joined("one", outcome("exact"), scored=24, answered=5)
    assert made.expected == 5
    assert replace(made, answered=0).expected == 24
