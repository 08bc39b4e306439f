"""A series of edits comes to the text that the same edits make of a string."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.errors import RequestError
from kvloom.model.tokenizer import FastTokenizer
from kvloom.reuse.edit_series import TextEdit, edit_series
from kvloom.reuse.retokenize import Retokenizer
from tests.model.tiny_models import byte_level_tokenizer

texts = st.lists(st.sampled_from(["one ", "\n", "zwölf", "🙂", "a", "def f():", "  "])).map("".join)
ends = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6))


@lru_cache
def retokenizer() -> Retokenizer:
    return Retokenizer(FastTokenizer(byte_level_tokenizer()))


@lru_cache
def tokenizer() -> FastTokenizer:
    return FastTokenizer(byte_level_tokenizer())


def place_of(text: str, character: int) -> tuple[int, int]:
    """Return a character's line and column, counted the slow way."""
    before = text[:character]
    line = before.count("\n")
    return line, len(before[before.rfind("\n") + 1 :].encode("utf-16-le")) // 2


@given(texts, st.lists(st.tuples(ends, texts, st.sampled_from(["characters", "lines", "whole"]))))
def test_edits_follow_one_another(
    text: str, changes: list[tuple[tuple[int, int], str, str]]
) -> None:
    tokens = tokenizer().encode(text, add_special_tokens=False)
    edits, now = [], text
    for numbers, new, way in changes or [((0, 0), "", "whole")]:
        start, end = sorted(number % (len(now) + 1) for number in numbers)
        if way == "whole":
            edits.append(TextEdit(new))
            now = new
            continue
        if way == "lines":
            edits.append(TextEdit(new, place_of(now, start), place_of(now, end)))
        else:
            edits.append(TextEdit(new, start, end))
        now = now[:start] + new + now[end:]
    found = edit_series(retokenizer(), tokens, edits)
    assert retokenizer().text(found.applied(tokens)) == now
    assert found.lossless
    starts = [part.start for part in found.replaced]
    assert starts == sorted(starts)


@pytest.mark.parametrize(
    ("edits", "param"),
    [
        ([], "edits"),
        ([TextEdit("x", 1)], "range"),
        ([TextEdit("x", None, 1)], "range"),
        ([TextEdit("x", 0, (0, 1))], "range"),
        ([TextEdit("x", 2, 1)], "range"),
        ([TextEdit("", 0, 3), TextEdit("x", 1, 1)], "range"),
        ([TextEdit("x"), TextEdit("x", (1, 0), (1, 0))], "range"),
    ],
)
def test_what_has_no_place_is_refused(edits: list[TextEdit], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        edit_series(retokenizer(), tokenizer().encode("abc", add_special_tokens=False), edits)
    assert caught.value.param == param


class Deaf(FastTokenizer):
    """A tokenizer without the letter x."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return super().encode(text.replace("x", ""), add_special_tokens=add_special_tokens)


def test_a_text_that_cannot_be_spelled_ends_a_series() -> None:
    deaf = Deaf(byte_level_tokenizer())
    tokens = deaf.encode("abc", add_special_tokens=False)
    lossy, other = TextEdit("x", 1, 1), TextEdit("d", 2, 2)
    assert not edit_series(Retokenizer(deaf), tokens, [lossy]).lossless
    assert not edit_series(Retokenizer(deaf), tokens, [other, lossy]).lossless
    with pytest.raises(RequestError, match="cannot spell"):
        edit_series(Retokenizer(deaf), tokens, [lossy, other])
    with pytest.raises(RequestError, match="cannot spell"):
        edit_series(Retokenizer(deaf), tokens, [lossy], lossless_only=True)
