from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.decode.accept import Emission, GenerationState
from kvloom.decode.detokenize import TextDecoder
from kvloom.decode.draw import Draw, draw
from kvloom.decode.state import DrawKey
from kvloom.errors import KvloomError
from kvloom.outputs import Logprob
from kvloom.params import SamplingParams

from .texts import LibraryText


@pytest.fixture(scope="module")
def decoder(smollm: LibraryText) -> TextDecoder:
    return TextDecoder.probe(smollm)


@pytest.fixture(scope="module")
def fallback(sentencepiece: LibraryText) -> TextDecoder:
    return TextDecoder.probe(sentencepiece)


def begin(
    decoder: TextDecoder, prompt: str = "x", max_tokens: int = 1000, **fields: object
) -> GenerationState:
    params = SamplingParams(**{"max_tokens": None, **fields})
    tokens = decoder.tokenizer.encode(prompt)
    return GenerationState(params, decoder, tokens, max_tokens=max_tokens, key=DrawKey(1, 2))


def run(state: GenerationState, tokens: list[int]) -> list[Emission]:
    """Accept tokens until the generation is over."""
    emissions = []
    for token in tokens:
        emissions.append(state.accept(Draw(token)))
        if state.finish is not None:
            break
    return emissions


def ending(emissions: list[Emission]) -> tuple[str | None, str | int | None]:
    assert all(emission.finish_reason is None for emission in emissions[:-1])
    return emissions[-1].finish_reason, emissions[-1].stop_reason


def shown(emissions: list[Emission]) -> str:
    return "".join(emission.text for emission in emissions)


@settings(deadline=None)
@given(
    text=st.text("ab c🙂é\n", min_size=1, max_size=30),
    stops=st.lists(st.text("ab c🙂", min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
    limit=st.integers(1, 40),
)
def test_text_and_reason_equal_a_look_at_the_whole_text(
    decoder: TextDecoder, text: str, stops: list[str], include: bool, limit: int
) -> None:
    tokens = decoder.tokenizer.encode(text)
    state = begin(decoder, max_tokens=limit, stop=tuple(stops), include_stop_str_in_output=include)
    emissions = run(state, tokens)
    if state.finish is None:
        emissions.append(state.abort())
    count = len(state.token_ids)
    assert state.token_ids == tokens[:count]
    assert [token for emission in emissions for token in emission.token_ids] == tokens[:count]
    assert shown(emissions) == state.text == state.output().text
    full = decoder.tokenizer.decode(tokens[:count])
    reason, stop = ending(emissions)
    if reason == "stop":
        assert stop in stops
        place = full.index(stop)
        assert state.text == full[: place + len(stop) if include else place]
        # The token before the last left no stop string complete.
        earlier = decoder.tokenizer.decode(tokens[: count - 1])
        assert not any(stop in earlier for stop in stops)
    else:
        assert state.text == full
        assert not any(stop in full for stop in stops)
        assert (reason, count) == (("length", limit) if limit <= len(tokens) else ("abort", count))


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_the_end_of_text_token_is_in_the_tokens_and_only_shown_when_asked(
    decoder: TextDecoder, include: bool, skip: bool
) -> None:
    (end,) = decoder.tokenizer.eos_token_ids
    tokens = [*decoder.tokenizer.encode(" hello"), end]
    state = begin(decoder, include_stop_str_in_output=include, skip_special_tokens=skip)
    emissions = run(state, [*tokens, *tokens])
    assert ending(emissions) == ("stop", None)
    assert state.output().token_ids == tuple(tokens)
    assert state.text == (" hello<|im_end|>" if include and not skip else " hello")


def test_ignore_eos_goes_on(decoder: TextDecoder) -> None:
    (end,) = decoder.tokenizer.eos_token_ids
    word = decoder.tokenizer.encode(" hello")
    state = begin(decoder, ignore_eos=True, max_tokens=2 * len(word) + 1)
    emissions = run(state, [*word, end, *word])
    assert ending(emissions) == ("length", None)
    assert state.text == " hello hello"


def test_stop_tokens_name_themselves(decoder: TextDecoder) -> None:
    (comma,) = decoder.tokenizer.encode(",")
    tokens = decoder.tokenizer.encode(" hello,")
    for include, text in ((False, " hello"), (True, " hello,")):
        state = begin(decoder, stop_token_ids=(comma,), include_stop_str_in_output=include)
        assert ending(run(state, tokens)) == ("stop", comma)
        assert state.text == text


@pytest.mark.parametrize("stop", [{"stop": ","}, {"stop_token_ids": None}])
def test_nothing_stops_before_min_tokens(decoder: TextDecoder, stop: dict) -> None:
    (comma,) = decoder.tokenizer.encode(",")
    if "stop_token_ids" in stop:
        stop = {"stop_token_ids": (comma,)}
    state = begin(decoder, min_tokens=4, **stop)
    emissions = run(state, [comma] * 10)
    assert len(state.token_ids) == 4
    assert ending(emissions)[0] == "stop"
    assert state.text == ",,,"


def test_a_stop_string_at_the_last_token_is_a_stop(decoder: TextDecoder) -> None:
    tokens = decoder.tokenizer.encode(" hello,")
    state = begin(decoder, stop=",", max_tokens=len(tokens))
    assert ending(run(state, tokens)) == ("stop", ",")


def test_an_end_of_text_token_at_the_limit_is_a_stop(decoder: TextDecoder) -> None:
    (end,) = decoder.tokenizer.eos_token_ids
    state = begin(decoder, max_tokens=2)
    assert ending(run(state, [50, end])) == ("stop", None)


def test_held_text_comes_out_at_the_limit_and_at_the_end(decoder: TextDecoder) -> None:
    (end,) = decoder.tokenizer.eos_token_ids
    tokens = decoder.tokenizer.encode(" hello")
    for last, limit in (([], len(tokens)), ([end], 100)):
        state = begin(decoder, stop=" hello there", max_tokens=limit)
        emissions = run(state, tokens + last)
        assert shown(emissions[:-1]) == ""
        assert emissions[-1].text == " hello"


def test_an_unfinished_character_comes_out_replaced_at_the_end(decoder: TextDecoder) -> None:
    half, *_ = decoder.tokenizer.encode("🙂")
    state = begin(decoder)
    assert state.accept(Draw(half)).text == ""
    aborted = state.abort()
    assert (aborted.text, aborted.token_ids, aborted.finish_reason) == ("�", (), "abort")
    assert state.output().finish_reason == "abort"


def test_a_stop_string_of_byte_tokens_stops_at_once(fallback: TextDecoder) -> None:
    tokens = fallback.tokenizer.encode("ab\n")
    state = begin(fallback, stop="\n")
    emissions = run(state, [*tokens, *tokens])
    assert ending(emissions) == ("stop", "\n")
    assert state.token_ids == tokens
    assert state.text == " ab"


def test_a_generation_that_is_over_takes_nothing(decoder: TextDecoder) -> None:
    state = begin(decoder, max_tokens=1)
    run(state, [50])
    with pytest.raises(KvloomError, match="over"):
        state.accept(Draw(51))
    with pytest.raises(KvloomError, match="over"):
        state.abort()
    assert state.token_ids == [50]


def test_probabilities_are_kept_and_summed(decoder: TextDecoder) -> None:
    state = begin(decoder, logprobs=1, max_tokens=3)
    entries = [{token: Logprob(-token / 7, 1), 9: Logprob(-0.1, 1)} for token in (50, 51, 52)]
    for token, entry in zip((50, 51, 52), entries, strict=True):
        assert state.accept(Draw(token, entry)).logprobs == (entry,)
    output = state.output()
    assert output.logprobs == tuple(entries)
    assert math.isclose(output.cumulative_logprob, -(50 + 51 + 52) / 7)
    assert output.index == 2


def test_missing_probabilities_are_an_error_and_unwanted_ones_are_none(
    decoder: TextDecoder,
) -> None:
    state = begin(decoder, logprobs=0)
    assert state.output().cumulative_logprob == 0.0
    with pytest.raises(KvloomError, match="log-probabilities"):
        state.accept(Draw(50))
    assert state.token_ids == []
    plain = begin(decoder)
    assert plain.accept(Draw(50)).logprobs is None
    assert plain.output().logprobs is None
    assert plain.output().cumulative_logprob is None


def test_the_sampler_counts_what_was_accepted(decoder: TextDecoder) -> None:
    state = begin(decoder, frequency_penalty=1.0)
    run(state, [50, 51, 50])
    assert state.sampling.step == 3
    assert state.sampling.counts.ids.tolist() == [50, 51]
    assert state.sampling.counts.counts.tolist() == [2, 1]


def fake_logits(tokens: list[int]) -> torch.Tensor:
    """Logits that depend on the history alone, as a model's do whatever became of its KV."""
    generator = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)
    return 2 * torch.randn(500, generator=generator)


@settings(deadline=None, max_examples=25)
@given(pauses=st.lists(st.sets(st.integers(0, 3)), max_size=30))
def test_pauses_and_company_change_no_output(decoder: TextDecoder, pauses: list[set[int]]) -> None:
    """Preemption: a paused generation goes on from its tokens, in another batch than before."""
    fields = [
        {"repetition_penalty": 1.3, "logprobs": 2},
        {"top_p": 0.8, "frequency_penalty": 0.5},
        {"temperature": 0.0, "min_tokens": 3},
        {"top_k": 20, "stop": "e"},
    ]

    def advance(states: list[GenerationState]) -> None:
        for state in states:
            state.accept(draw(fake_logits(state.token_ids), state.sampling, decoder.tokenizer))

    alone = [begin(decoder, max_tokens=8, **extra) for extra in fields]
    for state in alone:
        while state.finish is None:
            advance([state])
    mixed = [begin(decoder, max_tokens=8, **extra) for extra in fields]
    for paused in [*pauses, *[set()] * 8]:
        running = [
            state for row, state in enumerate(mixed) if row not in paused and not state.finish
        ]
        if running:
            advance(running[::-1])
    for state, expected in zip(mixed, alone, strict=True):
        assert state.token_ids == expected.token_ids
        assert state.output().text == expected.output().text
        assert state.finish == expected.finish
