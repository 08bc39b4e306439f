from __future__ import annotations

import pytest

from kvloom.errors import RequestError
from kvloom.registry import named

NUMBERS = {"one": 1, "nothing": None}


def test_what_is_registered_is_found() -> None:
    assert [named(NUMBERS, name, "number") for name in NUMBERS] == [1, None]


def test_an_unknown_name_is_said_with_the_known_ones() -> None:
    with pytest.raises(
        RequestError, match="no number 'two'; the names are one, nothing"
    ) as refused:
        named(NUMBERS, "two", "number")
    assert refused.value.param == "number"
