from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvloom import LLM, Chunk, SamplingParams
from kvloom.engine.parts import sink_of, tokenize_parts
from kvloom.errors import RequestError
from kvloom.outputs import Fidelity
from tests.engine.worlds import TOKENIZER
from tests.tolerances import TOLERANCE

GREEDY = SamplingParams(temperature=0.0, max_tokens=3)
TEXTS = ("def add(left, right):", "The quick brown fox", "jumps over the lazy dog")


def test_parts_are_tokenised_apart(tiny_llm: LLM) -> None:
    parts = tokenize_parts(tiny_llm.tokenizer, [TEXTS[0], Chunk(TEXTS[1]), TEXTS[2]])
    assert [part.reusable for part in parts] == [False, True, False]
    alone = [
        tiny_llm.tokenizer.encode(text, add_special_tokens=number == 0)
        for number, text in enumerate(TEXTS)
    ]
    assert [list(part.tokens) for part in parts] == alone


@pytest.mark.parametrize("wrong", ["text", None, 3, [3], [b"bytes"], [Chunk(3)]])  # type: ignore[arg-type]
def test_what_is_no_part_is_said(tiny_llm: LLM, wrong: object) -> None:
    with pytest.raises(RequestError) as refused:
        tokenize_parts(tiny_llm.tokenizer, wrong)  # type: ignore[arg-type]
    assert refused.value.param == "parts"


def test_a_sink_has_a_token_and_no_text_of_its_own(tiny_llm: LLM) -> None:
    sink = sink_of(tiny_llm.tokenizer)
    assert sink
    assert not tiny_llm.tokenizer.decode(list(sink)).strip()


@pytest.mark.parametrize("fidelity", ["exact", "repaired", "shifted"])
def test_a_joined_prompt_reads_as_its_parts(tiny_llm: LLM, fidelity: str) -> None:
    parts = [TEXTS[0], Chunk(TEXTS[1]), Chunk(TEXTS[2]), " and"]
    joined = tiny_llm.join(parts, fidelity=fidelity)  # type: ignore[arg-type]
    expected = [
        token for part in tokenize_parts(tiny_llm.tokenizer, parts) for token in part.tokens
    ]
    assert joined.tokens == expected
    (output,) = tiny_llm.generate(parts=parts, params=GREEDY, fidelity=fidelity)  # type: ignore[arg-type]
    assert list(output.prompt_token_ids) == expected
    assert output.receipt is not None
    assert output.receipt.fidelity == fidelity


def test_prompts_and_parts_exclude_each_other(tiny_llm: LLM) -> None:
    for prompts, parts in ((None, None), ("text", ["text"])):
        with pytest.raises(RequestError, match="not both"):
            tiny_llm.generate(prompts, GREEDY, parts=parts)


def test_only_the_first_part_begins_a_text_and_a_sink_does_so_too(tiny_llm: LLM) -> None:
    tokenizer = tiny_llm.tokenizer
    first, second = tokenize_parts(tokenizer, ["def", "def"])
    assert list(first.tokens) == tokenizer.encode("def")
    assert list(second.tokens) == tokenizer.encode("def", add_special_tokens=False)
    assert sink_of(tokenizer)[0] == tokenizer.bos_token_id
    assert sink_of(TOKENIZER) == (0, TOKENIZER.letters.index("\n"))


def test_a_chunk_behind_the_sink_it_was_computed_behind_is_as_computed_in_place(
    tiny_llm: LLM,
) -> None:
    parts = [TEXTS[0], Chunk(TEXTS[1])]

    def scores(fidelity: Fidelity, sink: str | None) -> np.ndarray:
        tenant = f"{fidelity} {sink}"  # who finds nothing that was computed before
        joined = tiny_llm.join(parts, fidelity=fidelity, sink=sink, cache_salt=tenant)
        return np.array(joined.score(TEXTS[2])[0])

    expected, near = scores("exact", None), TOLERANCE["float32"]["logprobs"]
    assert abs(scores("shifted", TEXTS[0]) - expected).max() < near
    for sink in ("", None):
        assert abs(scores("shifted", sink) - expected).max() > 10 * near


def test_a_sink_that_is_no_text_is_said(tiny_llm: LLM) -> None:
    tokens: Any = [1]
    with pytest.raises(RequestError, match="sink is list") as refused:
        tiny_llm.join([Chunk("a")], sink=tokens)
    assert refused.value.param == "sink"
