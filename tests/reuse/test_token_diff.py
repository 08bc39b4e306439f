"""Hunks turn one sequence into the other, and no fewer tokens would do."""

from __future__ import annotations

import difflib
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvloom.reuse.token_diff import MIN_KEPT, hunks

sequences = st.lists(st.integers(0, 5), max_size=40)


def applied(old: list[int], new: list[int], min_kept: int) -> list[int]:
    made, edge = [], 0
    for hunk in hunks(old, new, min_kept):
        made += old[edge : hunk.old_start] + new[hunk.new_start : hunk.new_stop]
        edge = hunk.old_stop
    return made + old[edge:]


@given(old=sequences, new=sequences, min_kept=st.integers(1, 9))
def test_hunks_make_the_new_sequence(old, new, min_kept):
    assert applied(old, new, min_kept) == new
    found = hunks(old, new, min_kept)
    assert all(b.old_start - a.old_stop >= min_kept for a, b in pairwise(found))
    assert (found == []) == (old == new)


@given(old=sequences, new=sequences)
def test_no_more_is_changed_than_another_diff_changes(old, new):
    ours = sum(max(x.old_stop - x.old_start, x.new_stop - x.new_start) for x in hunks(old, new, 1))
    codes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    theirs = sum(max(b - a, d - c) for tag, a, b, c, d in codes if tag != "equal")
    assert ours <= theirs


def test_hunks_with_little_between_them_are_one() -> None:
    old = list(range(100))
    near, far = [*old], [*old]
    near[50] = near[50 + MIN_KEPT] = -1
    far[50] = far[51 + MIN_KEPT] = -1
    assert len(hunks(old, near)) == 1
    assert len(hunks(old, far)) == 2
