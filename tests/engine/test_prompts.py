from __future__ import annotations

from typing import Any

import pytest

from kvloom.engine.prompts import as_chats, as_params, as_prompts, tokenize
from kvloom.errors import RequestError
from kvloom.params import SamplingParams
from tests.engine.worlds import TOKENIZER

CHAT = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("ab", ["ab"]),
        ([1, 2], [[1, 2]]),
        ((1, 2), [(1, 2)]),
        (["ab", [1, 2]], ["ab", [1, 2]]),
        ([[1], [2]], [[1], [2]]),
        ([], []),
        ([[]], [[]]),
    ],
)
def test_one_or_many_prompts(given: Any, expected: list[Any]) -> None:
    assert as_prompts(given) == expected


@pytest.mark.parametrize("given", [5, None, b"ab", bytearray(b"ab"), {1, 2}, {"a": 1}])
def test_what_is_no_prompt_is_refused(given: Any) -> None:
    for call in (as_prompts, lambda prompt: tokenize(TOKENIZER, prompt)):
        with pytest.raises(RequestError) as refused:
            call(given)
        assert refused.value.param == "prompt"


def test_text_keeps_its_text_and_ids_have_none() -> None:
    assert tokenize(TOKENIZER, "ab") == ("ab", [1, 2])
    assert tokenize(TOKENIZER, (1, 2)) == (None, [1, 2])


@pytest.mark.parametrize(
    ("given", "expected"), [(CHAT, [CHAT]), ([CHAT, CHAT], [CHAT, CHAT]), ([], [[]]), (5, [5])]
)
def test_one_or_many_chats(given: Any, expected: list[Any]) -> None:
    assert as_chats(given) == expected


def test_parameters_for_all_or_for_each() -> None:
    one, two = SamplingParams(n=1), SamplingParams(n=2)
    assert as_params(None, 2) == [SamplingParams()] * 2
    assert as_params(one, 2) == [one, one]
    assert as_params((one, two), 2) == [one, two]
    for wrong in ([one], [one, two, one], 5, {"n": 1}, [one, None]):
        with pytest.raises(RequestError) as refused:
            as_params(wrong, 2)  # type: ignore[arg-type]
        assert refused.value.param == "params"
