from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.decode.stop import Finish, StopText, finish_by_token
from kvloom.params import SamplingParams

TEXT = st.text("abc", max_size=20)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def feed_all(stopper: StopText, pieces: list[str]) -> tuple[list[str], str | None]:
    """Feed pieces until a stop string ends the text, or flush behind the last."""
    shown = []
    for piece in pieces:
        text, stop = stopper.feed(piece)
        shown.append(text)
        if stop is not None:
            return shown, stop
    return [*shown, stopper.flush()], None


def obvious(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Look at the text letter by letter."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@settings(deadline=None)
@given(st.lists(TEXT, max_size=8), STOPS, st.booleans())
def test_any_cut_into_pieces_gives_the_obvious_text(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    shown, stop = feed_all(StopText(stops, include_stop=include), pieces)
    assert ("".join(shown), stop) == obvious("".join(pieces), stops, include)


@settings(deadline=None)
@given(st.lists(TEXT, max_size=8), STOPS)
def test_text_is_held_back_exactly_while_it_may_become_a_stop(
    pieces: list[str], stops: list[str]
) -> None:
    stopper = StopText(stops)
    seen = shown = ""
    for piece in pieces:
        seen += piece
        text, stop = stopper.feed(piece)
        shown += text
        if stop is not None:
            return
        begun = [
            length
            for length in range(len(seen) + 1)
            if any(stop[:length] == seen[len(seen) - length :] for stop in stops)
        ]
        assert shown == seen[: len(seen) - max(begun, default=0)]


@settings(deadline=None)
@given(st.lists(TEXT, max_size=6), STOPS, TEXT)
def test_finds_tells_what_feeding_would(pieces: list[str], stops: list[str], more: str) -> None:
    stopper = StopText(stops)
    for piece in pieces:
        if stopper.feed(piece)[1] is not None:
            return
    found = stopper.finds(more)
    assert found == (stopper.feed(more)[1] is not None)


def test_a_stop_string_that_may_not_stop_is_text_and_the_search_goes_on_behind_it() -> None:
    stopper = StopText(["end"])
    assert stopper.feed("an e", may_stop=False) == ("an ", None)
    assert stopper.feed("nd, e", may_stop=False) == ("end, ", None)
    assert stopper.feed("nd.") == ("", "end")


PARAMS = {"stop_token_ids": (7, 3), "min_tokens": 2, "max_tokens": 4}


@pytest.mark.parametrize(
    ("fields", "token", "generated", "expected"),
    [
        ({}, 5, 3, None),
        ({}, 3, 3, Finish("stop", None)),
        ({}, 7, 3, Finish("stop", 7)),
        ({}, 3, 1, None),
        ({}, 7, 1, None),
        ({"ignore_eos": True}, 4, 3, None),
        ({"ignore_eos": True}, 3, 3, Finish("stop", 3)),
    ],
)
def test_tokens_end_the_text(
    fields: dict, token: int, generated: int, expected: Finish | None
) -> None:
    params = SamplingParams(**PARAMS, **fields)
    assert finish_by_token(params, token, generated, frozenset({3, 4})) == expected
