"""Typed edits are changes of one line that follow from the seed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvloom.bench.chain_lines import LineEdit, typed_edits

lines = st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), max_size=8)
TYPED = ["typed", "", "  typed as well"]


def applied(text: str, edit: LineEdit) -> str:
    """Edit a text the slow way: by the characters where its lines begin."""
    starts = [0, *(place + 1 for place, letter in enumerate(text) if letter == "\n")]
    (first, low), (last, high) = edit.start, edit.end
    return text[: starts[first] + low] + edit.text + text[starts[last] + high :]


@given(parts=st.lists(lines, min_size=6, max_size=20), seed=st.integers(0, 99))
def test_every_edit_changes_one_line_behind_the_first_ones(parts: list[str], seed: int) -> None:
    text = "\n".join(parts)
    for edit in typed_edits(text, TYPED, 30, seed):
        before, text = text.split("\n"), applied(text, edit)
        after = text.split("\n")
        assert after[:3] == parts[:3]
        assert after[-1] == parts[-1]
        place = edit.start[0]
        assert after[:place] == before[:place]
        grown = len(after) - len(before)
        assert grown in (-1, 0, 1)
        assert after[place + (grown >= 0) :] == before[place + (grown <= 0) :]
        assert abs(len(after) - len(parts)) <= 1


def test_the_same_seed_makes_the_same_edits_and_another_one_others() -> None:
    text = "\n".join(map(str, range(50)))
    first, same, other = (list(typed_edits(text, TYPED, 20, seed)) for seed in (1, 1, 2))
    assert first == same
    assert first != other
    assert len({edit.start[0] for edit in first}) > 10
    assert {edit.start[0] == edit.end[0] for edit in first} == {True, False}
