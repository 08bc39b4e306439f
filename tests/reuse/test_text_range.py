"""Lines and columns name the characters that the slow way, line by line, finds."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import RequestError
from kvloom.reuse.text_range import line_column_range

texts = st.text(alphabet="aé🙂\n\r \u0301日", max_size=30)
units = st.sampled_from(["utf-8", "utf-16", "utf-32"])


def places(text: str, encoding: str) -> dict[tuple[int, int], int]:
    """Return the character of every place there is."""
    width = {"utf-8": 1, "utf-16": 2, "utf-32": 4}[encoding]
    found, begin = {}, 0
    lines = re.split("(\r\n|\n|\r)", text)
    for number, line in enumerate(lines[::2]):
        for count in range(len(line) + 1):
            name = encoding if width == 1 else f"{encoding}-le"
            found[number, len(line[:count].encode(name)) // width] = begin + count
        begin += len(line) + len("".join(lines[2 * number + 1 : 2 * number + 2]))
    return found


@given(text=texts, encoding=units, data=st.data())
def test_every_place_is_found(text, encoding, data):
    known = sorted(places(text, encoding).items(), key=lambda item: item[1])
    ends = [data.draw(st.integers(0, len(known) - 1)) for _ in range(2)]
    (start, first), (end, last) = (known[n] for n in sorted(ends))
    assert line_column_range(text, start, end, encoding) == (first, last)


@given(
    text=texts,
    encoding=units,
    place=st.tuples(st.integers(-1, 6), st.integers(-1, 20)),
)
def test_every_other_place_is_refused(text, encoding, place):
    if place in places(text, encoding):
        character = places(text, encoding)[place]
        assert line_column_range(text, place, place, encoding) == (character, character)
    else:
        with pytest.raises(RequestError, match="another than the client's") as error:
            line_column_range(text, place, place, encoding)
        assert error.value.param == "range"


def test_a_range_runs_forwards_and_units_are_known() -> None:
    with pytest.raises(RequestError, match="earlier place first"):
        line_column_range("ab\ncd", (1, 0), (0, 2))
    with pytest.raises(RequestError, match="latin-1"):
        line_column_range("ab", (0, 0), (0, 1), "latin-1")  # type: ignore[arg-type]
    assert line_column_range("🙂x", (0, 2), (0, 3)) == (1, 2)
