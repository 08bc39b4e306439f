"""A document ends where both files go on alike, and holds the changes before that place."""

from __future__ import annotations

from hypothesis import assume, given
from hypothesis import strategies as st

from kvloom.bench.edit_places import SINK_TOKENS, PlaceRule, Places, choose_places
from kvloom.kv.edit import Replace

sizes = st.integers(0, 12)


@st.composite
def edited(draw: st.DrawFn) -> tuple[list[int], list[int], list[Replace]]:
    """Return old and new tokens, and what was replaced; kept tokens differ from one another."""
    old: list[int] = []
    new: list[int] = []
    replaced: list[Replace] = []
    kept = iter(range(10_000))
    for _ in range(draw(st.integers(0, 4))):
        same = [next(kept) for _ in range(draw(st.integers(1 if replaced else 0, 40)))]
        out, into = draw(sizes), draw(sizes)
        assume(out or into)
        old += same
        new += same
        replaced.append(Replace(len(old), len(old) + out, tuple(-1 - x for x in range(into))))
        old += [-100 - x for x in range(out)]
        new += replaced[-1].tokens
    rest = [next(kept) for _ in range(draw(st.integers(0, 60)))]
    return old + rest, new + rest, replaced


rules = st.builds(PlaceRule, st.integers(0, 10), st.integers(1, 10), st.integers(12, 80))


def new_ranges(replaced: list[Replace]) -> list[tuple[int, int]]:
    """Return where each change stands in the new tokens."""
    ranges, growth = [], 0
    for part in replaced:
        start = part.start + growth
        ranges.append((start, start + len(part.tokens)))
        growth += len(part.tokens) - (part.stop - part.start)
    return ranges


def last_that_fits(replaced: list[Replace], length: int, rule: PlaceRule) -> int | None:
    """Return the last change that enough kept tokens follow."""
    ranges, found = new_ranges(replaced), None
    for number, (_, end) in enumerate(ranges):
        last = end + rule.behind + rule.scored
        if last <= length and not any(start < last for start, _ in ranges[number + 1 :]):
            found = number
    return found


def has_start(ranges: list[tuple[int, int]], stop: int, context: int) -> bool:
    """Whether a document can begin within the context, near no change and before the last."""
    if stop <= context:
        return True
    return any(
        all(start + SINK_TOKENS <= first or start > max(first, end - 1) for first, end in ranges)
        for start in range(stop - context, ranges[-1][0] + 1)
    )


@given(edit=edited(), rule=rules)
def test_places_keep_their_promises(edit, rule):
    old, new, replaced = edit
    found = choose_places(replaced, len(new), rule)
    ranges, last = new_ranges(replaced), last_that_fits(replaced, len(new), rule)
    if isinstance(found, str):
        if last is not None:
            stop = ranges[last][1] + rule.behind
            assert not has_start(ranges[: last + 1], stop, rule.context), found
        return
    before = old[found.old_start : found.old_stop]
    after = new[found.new_start : found.new_stop]
    scored = slice(found.new_stop, found.new_stop + rule.scored)
    assert len(new[scored]) == rule.scored
    assert old[found.old_stop : found.old_stop + rule.scored] == new[scored]
    assert min(new[scored]) >= 0, "scored what the edit put in"
    assert len(after) <= rule.context
    assert last is not None
    assert found.new_stop == ranges[last][1] + rule.behind
    numbers = [n for n in range(last + 1) if ranges[n][0] >= found.new_start]
    assert len(numbers) == found.hunks >= 1
    rebuilt, edge = list[int](), 0
    for part in (replaced[n] for n in numbers):
        rebuilt += [*before[edge : part.start - found.old_start], *part.tokens]
        edge = part.stop - found.old_start
    assert rebuilt + before[edge:] == after
    assert len(before) - edge == rule.behind
    first = ranges[numbers[0]]
    assert (found.first_change, found.first_stop) == (
        first[0] - found.new_start,
        first[1] - found.new_start,
    )
    assert found.new_start == 0 or found.first_change >= SINK_TOKENS


@given(edit=edited(), rule=rules, odd=st.integers(2, 5))
def test_places_move_to_where_the_tokenizer_agrees(edit, rule, odd):
    _, new, replaced = edit

    def is_stable(start: int, stop: int) -> bool:
        return stop % odd == 0 and (start == 0 or start != stop - rule.context)

    found = choose_places(replaced, len(new), rule, is_stable)
    plain = choose_places(replaced, len(new), rule)
    if isinstance(found, Places):
        assert is_stable(found.new_start, found.new_stop)
        assert is_stable(found.new_stop, found.new_stop + rule.scored)
        assert isinstance(plain, Places)
        assert 0 <= found.new_stop - plain.new_stop <= rule.behind


def test_reasons_say_what_is_missing():
    rule = PlaceRule(2, 3, 10)
    assert choose_places([], 50, rule) == "nothing changes"
    late = choose_places([Replace(46, 47, (1,))], 50, rule)
    assert late == "no change is followed by 5 unchanged tokens"
    long = choose_places([Replace(10, 11, tuple(range(20)))], 50, rule)
    assert long == "the context of 10 tokens holds nothing before the last change"
    rough = choose_places([Replace(10, 11, (1,))], 50, rule, lambda start, stop: False)
    assert rough == "no place behind the last change is a border of tokens"
