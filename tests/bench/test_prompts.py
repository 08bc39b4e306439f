"""Prompts have the exact lengths, and share nothing but what is meant to be shared."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom import RequestError
from kvloom.bench.prompts import cut_prompts, source_text, tokens_needed
from kvloom.bench.tasks import FULL, QUICK, make_tasks


@given(rounds=st.integers(1, 4), leading=st.sampled_from([(), (0,), (0, 0)]))
def test_prompts_are_pieces_of_the_text_that_occur_once(
    rounds: int, leading: tuple[int, ...]
) -> None:
    tasks = make_tasks(QUICK)
    # A text in which no token occurs twice shows every reuse; 0 is no part of it.
    tokens = range(1, tokens_needed(tasks, rounds) + 1)
    table = cut_prompts(tasks, rounds, tokens, leading)
    assert set(table) == set(itertools.product([t.name for t in tasks], range(rounds + 1)))
    seen: set[int] = set()
    for task in tasks:
        remembered = table[task.name, 0].remembered
        if task.way == "restarted":
            assert remembered == table[task.name, 0].prompts[0]
        elif task.edited_tokens:
            assert len(remembered) == 72 - task.edited_tokens + task.replaced_tokens
        else:
            assert len(remembered) == task.shared_tokens
        for number in range(rounds + 1):
            cut = table[task.name, number]
            if task.way == "restarted":
                assert (cut.remembered,) == cut.prompts
                remembered = leading
            else:
                assert cut.remembered == remembered
            assert tuple(map(len, cut.prompts)) == task.prompt_tokens
            for prompt in cut.prompts:
                assert prompt[: len(leading)] == leading
                own = set(prompt) - set(remembered) - {0}
                assert seen.isdisjoint(own)
                seen.update(own)
                if not task.edited_tokens and task.way != "restarted":
                    assert prompt[: len(remembered)] == remembered
                    assert cut.shared_tokens == len(remembered)
                    new = prompt[max(len(remembered), len(leading)) :]
                    assert new == tuple(range(new[0], new[0] + len(new)))
        assert seen.isdisjoint(remembered[len(leading) :])


@given(rounds=st.integers(1, 4))
def test_an_edit_replaces_a_line_at_another_place_each_round(rounds: int) -> None:
    task, *_ = (task for task in make_tasks(QUICK) if task.edited_tokens)
    # Few different tokens, so that old and new lines are alike by chance.
    tokens = [number % 3 for number in range(tokens_needed([task], rounds))]
    table = cut_prompts([task], rounds, tokens)
    places = []
    for number in range(rounds + 1):
        cut = table[task.name, number]
        (prompt,) = cut.prompts
        places.append(cut.shared_tokens)
        assert 72 // 4 <= places[-1] <= 72 * 3 // 4
        behind = places[-1] + task.edited_tokens
        assert prompt[behind:] == cut.remembered[places[-1] + task.replaced_tokens :]
        assert len(prompt) != len(cut.remembered)
    assert len(set(places)) == rounds + 1


def test_too_short_a_text_is_an_error() -> None:
    with pytest.raises(RequestError, match="gives only 100 tokens"):
        cut_prompts(make_tasks(QUICK), 1, range(100))


def test_source_text_is_code_of_the_wanted_length() -> None:
    text = source_text(20_000)
    assert len(text) == 160_000
    assert text.count(" def ") > 100
    assert "import " in text


def test_the_standard_library_is_long_enough_for_many_full_rounds() -> None:
    needed = tokens_needed(make_tasks(FULL), 20)
    assert len(source_text(needed)) == 8 * needed
