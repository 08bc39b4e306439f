"""Chunks are about as long as asked, lose nothing, and their questions are about one of them."""

from __future__ import annotations

import re
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.bench.prompts import library_modules
from kvloom.bench.reuse_cases import ChunkRule, Filling, Questions, Texts, cut, quote
from kvloom.bench.reuse_source import Question

WORDS = st.text("ab \nß", min_size=1, max_size=200)


def words(text: str) -> int:
    """Count words and single signs, as a tokenizer of sorts."""
    return len(re.findall(r"\w+|\s", text))


def rule(count: int, tokens: int) -> ChunkRule:
    return ChunkRule(count, tokens, words)


def sets(*passages: list[str]) -> Questions:
    made = [
        Question(str(number), tuple(one), f"what {number}", "" if number else "yes")
        for number, one in enumerate(passages)
    ]
    return Questions("a set", made)


@given(text=WORDS, tokens=st.integers(1, 50))
def test_what_is_cut_is_still_there_and_words_stay_whole(text: str, tokens: int) -> None:
    head, rest = cut(text, tokens, words)
    assert head
    assert head + rest == text
    if rest and any(sign.isspace() for sign in head):
        assert head[-1].isspace() or len(head) == 12 * tokens


@given(texts=st.lists(WORDS, max_size=6), tokens=st.integers(4, 60))
def test_chunks_are_the_texts_one_after_the_other(texts: list[str], tokens: int) -> None:
    filling = Filling(texts, rule(1, tokens))
    chunks = list(iter(filling.next_chunk, ""))
    assert "".join(chunks) == "".join(text for text in texts if text.strip())


def test_chunks_of_real_text_are_about_as_long_as_asked() -> None:
    texts = [text for _, text in islice(library_modules(), 4)]
    filling = Filling(texts, rule(1, 300))
    lengths = [words(filling.next_chunk()) for _ in range(40)]
    assert min(lengths) > 0.5 * 300
    assert max(lengths) < 1.5 * 300
    assert sum(lengths) == pytest.approx(40 * 300, rel=0.1)


def test_texts_stay_as_they_are_where_no_length_is_asked_for() -> None:
    (case,) = Texts("here", ["one\n", "", "two\n", "three\n"]).cases(rule(3, 0))
    assert case.chunks == ("one\n", "two\n", "three\n")
    (first, second) = sets(["a", "b"], ["c", "d", "e", "f"]).cases(rule(3, 0))
    assert first.chunks == ("a\n\n", "b\n\n", "c\n\n")
    assert second.chunks == ("c\n\n", "d\n\n", "e\n\n")


def test_each_passage_of_a_question_begins_a_chunk_and_others_fill_it() -> None:
    first, second = sets(["a " * 4, "b " * 4], ["c " * 40]).cases(rule(3, 20))
    assert [chunk[0] for chunk in first.chunks] == ["a", "b", "c"]
    assert "c" in first.chunks[0]
    assert second.chunks[0].startswith("c ")
    assert (first.question, first.answer) == ("Question: what 0\nAnswer:", " yes")
    assert second.answer == ""


def test_a_set_that_cannot_fill_all_chunks_gives_fewer() -> None:
    (case,) = sets(["a", "b"]).cases(rule(8, 50))
    assert case.chunks == ("a\n\n", "b\n\n")


def test_prompts_of_texts_have_their_own_chunks_and_quote_one_of_them() -> None:
    texts = [text for _, text in islice(library_modules(), 2)]
    cases = list(islice(Texts("here", texts).cases(rule(4, 200)), 5))
    assert len({case.name for case in cases}) == 5
    assert len({chunk for case in cases for chunk in case.chunks}) == 20
    for number, case in enumerate(cases):
        quoted = case.question.split("\n", 1)[1]
        assert quoted + case.answer in case.chunks[number % 4]
        assert case.answer


@pytest.mark.parametrize(("texts", "found"), [([], 0), (["a\n"], 0), (["a\n", "b\n"], 1)])
def test_few_texts_give_one_prompt_or_none(texts: list[str], found: int) -> None:
    assert len(list(Texts("here", texts).cases(rule(8, 0)))) == found


@given(st.text("ab\n", min_size=2, max_size=600))
def test_quotes_stand_before_what_follows_them(chunk: str) -> None:
    question, answer = quote(chunk)
    quoted = question.split("\n", 1)[1]
    assert chunk.endswith(quoted + answer)
    assert answer
    assert 0 < len(quoted) <= 160
