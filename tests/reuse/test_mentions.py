"""Marked are the tokens that spell an identifier which an edit took out or put in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.kv.edit import Replace
from kvloom.reuse.mentions import mentions
from kvloom.reuse.retokenize import TokenEdit
from kvloom.reuse.select import StaleRows, selector

PIECES = [
    b"",
    b"a",
    b"b",
    b"_",
    b"1",
    b" ",
    b".",
    b"ab",
    b" a",
    b"a ",
    b"(b",
    b"\xc3",
    b"\xa9",
    b"a.b",
]
INSIDE = b"ab_\xc3\xa9"


def word_around(data: bytes, place: int) -> tuple[int, int] | None:
    """Return the identifier that a byte lies in, found by walking left and right."""
    joined = INSIDE + b"1"
    if data[place] not in joined:
        return None
    start, stop = place, place + 1
    while start > 0 and data[start - 1] in joined:
        start -= 1
    while stop < len(data) and data[stop] in joined:
        stop += 1
    while start < stop and data[start] not in INSIDE:
        start += 1
    return (start, stop) if start <= place else None


def words_at(data: bytes, cuts: list[tuple[int, int]]) -> set[bytes]:
    """Return the identifiers that lie in ranges of bytes, or around them, in part or whole."""
    found = set()
    for place in range(len(data)):
        word = word_around(data, place)
        if word and any(word[0] < stop and start < word[1] for start, stop in cuts):
            found.add(data[slice(*word)])
    return found


def spelled(tokens: list[int]) -> bytes:
    return b"".join(PIECES[token] or b"|" for token in tokens)


token_lists = st.lists(st.integers(0, len(PIECES) - 1), max_size=30)


@given(
    parts=st.lists(st.tuples(token_lists, token_lists, token_lists), max_size=3), end=token_lists
)
def test_marks_are_those_of_a_walk_over_every_byte(parts, end):
    old: list[int] = []
    new: list[int] = []
    replaced, old_cuts, new_cuts = [], [], []
    for kept, out, into in parts:
        old += kept
        new += kept
        old_cuts.append((len(spelled(old)), len(spelled(old + out))))
        new_cuts.append((len(spelled(new)), len(spelled(new + into))))
        replaced.append(Replace(len(old), len(old) + len(out), tuple(into)))
        old += out
        new += into
    old, new = old + end, new + end
    changed = words_at(spelled(old), old_cuts) ^ words_at(spelled(new), new_cuts)
    data, place, expected = spelled(new), 0, []
    for token in new:
        words = [word_around(data, at) for at in range(place, place + len(spelled([token])))]
        expected.append(any(word and data[slice(*word)] in changed for word in words))
        place += len(spelled([token]))
    edit = TokenEdit(tuple(replaced), canonical=False, lossless=True)
    assert mentions(old, edit, PIECES.__getitem__).tolist() == expected


@given(data=st.data(), size=st.integers(1, 40))
def test_half_of_the_rows_are_for_mentions_and_the_rest_for_those_that_deviate_most(data, size):
    bools = st.lists(st.booleans(), min_size=size, max_size=size)
    numbers = st.lists(st.integers(0, 9), min_size=size, max_size=size)
    marked = np.array(data.draw(bools))
    deviation = np.array(data.draw(numbers), dtype=np.float32)
    place = np.arange(3, 3 + 2 * size, 2)
    count = data.draw(st.integers(0, size))
    rows = StaleRows(place, np.zeros(size, dtype=np.int32), deviation, marked)
    chosen = selector("mentions").choose(rows, count)
    assert len(chosen) == count
    assert chosen.tolist() == sorted(set(chosen.tolist()) & set(place.tolist()))
    taken = np.isin(place, chosen)
    assert (taken & marked).sum() >= min(marked.sum(), count // 2)
    # Whatever was taken beside half of the rows, nothing that was left deviates more.
    left = deviation[~taken].max(initial=-1)
    assert (deviation[taken] < left).sum() <= count // 2
    assert not (deviation[taken & ~marked] < left).any()
    if count // 2 < marked.sum():
        assert (deviation[taken & marked] < deviation[~taken & marked].max(initial=-1)).sum() == 0


@pytest.mark.parametrize("name", ["blend", "first", "random"])
def test_the_other_rules_ask_for_no_marks(name):
    assert not selector(name).wants_marks
    assert selector("mentions").wants_marks
