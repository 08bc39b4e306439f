"""Log-probabilities in OpenAI's shapes, checked against their laws."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.completion_choice import Logprobs

from kvloom.outputs import Logprob
from kvloom.serve.logprobs import CompletionLogprobs, chat_logprobs, token_label

from .fake_llm import BOS, EOS, FakeTokenizer, entries

TOKENIZER = FakeTokenizer()


@given(text=st.text(max_size=30), cuts=st.lists(st.integers(0, 120), max_size=4))
def test_offsets_point_into_the_text_however_it_is_cut(text: str, cuts: list[int]) -> None:
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    builder = CompletionLogprobs(TOKENIZER, 1)
    edges = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    labels: list[str] = []
    offsets: list[int] = []
    for start, stop in pairwise(edges):
        part = tokens[start:stop]
        fields = builder.fields(part, [entries(token, 1) for token in part])
        Logprobs.model_validate(fields)
        labels += fields["tokens"]
        offsets += fields["text_offset"]
    assert len(labels) == len(tokens)
    for label, offset in zip(labels, offsets, strict=True):
        if label.startswith("bytes:"):
            assert ord(text[offset]) > 127
        else:
            assert text[offset] == label


def test_labels_are_text_bytes_or_special_names() -> None:
    assert token_label(TOKENIZER, ord("a")) == "a"
    assert token_label(TOKENIZER, 0xE6) == "bytes:\\xe6"
    assert token_label(TOKENIZER, EOS) == "</s>"


def test_a_chat_keeps_the_most_likely_alternatives() -> None:
    rows = {token: Logprob(-float(token), token + 1) for token in range(5)}
    (entry,) = chat_logprobs(TOKENIZER, [4], [rows], 2)
    parsed = ChatCompletionTokenLogprob.model_validate(entry)
    assert parsed.logprob == -4.0
    assert [top.logprob for top in parsed.top_logprobs] == [0.0, -1.0]


def test_impossible_tokens_stay_valid_json() -> None:
    rows = {65: Logprob(-math.inf, 1)}
    (entry,) = chat_logprobs(TOKENIZER, [65], [rows], 1)
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0


def test_of_two_tokens_with_one_text_the_likelier_is_told() -> None:
    class Twins(FakeTokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            return b"same"

    rows = {1: Logprob(-3.0, 2), 2: Logprob(-1.0, 1)}
    fields = CompletionLogprobs(Twins(), 2).fields([1], [rows])
    assert fields["top_logprobs"] == [{"same": -1.0}]
    assert fields["token_logprobs"] == [-3.0]


def test_nothing_predicts_the_first_token() -> None:
    fields = CompletionLogprobs(TOKENIZER, 1).fields([BOS, 65], [None, entries(65, 1)])
    assert fields["token_logprobs"] == [None, -1.0]
    assert fields["top_logprobs"] == [None, {"B": -0.5, "A": -1.0}]
