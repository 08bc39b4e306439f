"""Options out of range are refused before anything is started."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kvloom import RequestError
from kvloom.bench.results import SpeedOptions


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int4"},
        {"rounds": 0},
        {"rounds": -1},
        {"threads": 0},
        {"timeout_s": 0.0},
        {"timeout_s": -1.0},
        {"timeout_s": math.nan},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        SpeedOptions(**wrong)
    assert caught.value.param == next(iter(wrong))


def test_the_defaults_are_kvlooms_own_format_beside_transformers() -> None:
    options = SpeedOptions()
    assert (options.dtype, options.peers, options.rounds) == ("auto", ("transformers",), 3)
