"""Selectors name as many rows as asked for, in order, and for their own reasons."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import RequestError
from kvloom.reuse.select import SELECTORS, StaleRows, selector


@st.composite
def stale(draw: st.DrawFn) -> StaleRows:
    """Rows of several parts with gaps between them."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    gaps = draw(st.lists(st.integers(0, 5), min_size=len(lengths), max_size=len(lengths)))
    places: list[int] = []
    for length, gap in zip(lengths, gaps, strict=True):
        start = (places[-1] + 1 if places else 0) + gap
        places += range(start, start + length)
    part = np.repeat(np.arange(len(lengths)) * 2, lengths).astype(np.int32)
    deviations = st.lists(st.integers(0, 5), min_size=len(places), max_size=len(places))
    deviation = np.array(draw(deviations), dtype=np.float32)
    marks = draw(st.lists(st.booleans(), min_size=len(places), max_size=len(places)))
    return StaleRows(np.array(places), part, deviation, np.array(marks))


@pytest.mark.parametrize("name", SELECTORS)
@given(rows=stale(), data=st.data())
def test_so_many_rows_are_chosen_in_order(name, rows, data):
    count = data.draw(st.integers(1, len(rows.place)))
    rule = selector(name)
    assert rule.name == name
    chosen = rule.choose(rows, count)
    assert chosen.tolist() == sorted(set(chosen.tolist()) & set(rows.place.tolist()))
    assert len(chosen) == count
    assert chosen.tolist() == rule.choose(rows, count).tolist()


@given(rows=stale(), data=st.data())
def test_blend_takes_those_that_deviate_most(rows, data):
    count = data.draw(st.integers(1, len(rows.place)))
    chosen = np.isin(rows.place, selector("blend").choose(rows, count))
    assert rows.deviation[chosen].min() >= rows.deviation[~chosen].max(initial=0)


@given(rows=stale(), data=st.data())
def test_first_takes_the_first_of_every_part(rows, data):
    count = data.draw(st.integers(1, len(rows.place)))
    chosen = np.isin(rows.place, selector("first").choose(rows, count))
    taken = [chosen[rows.part == part] for part in np.unique(rows.part)]
    # Taken ones come first in every part, and no part is a row ahead while another has some left.
    assert all(part.tolist() == sorted(part.tolist(), reverse=True) for part in taken)
    most = max(int(part.sum()) for part in taken)
    assert all(part.sum() >= min(most - 1, len(part)) for part in taken)


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(RequestError, match="blend, "):
        selector("best")
