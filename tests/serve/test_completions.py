"""Replies of `/v1/completions`, asked by the official client."""

from __future__ import annotations

import openai
import pytest

from .fake_llm import BOS, FakeTokenizer
from .running import RunningServer, events_of


def test_answers_a_text_and_reports_usage(server: RunningServer) -> None:
    client = server.openai()
    reply = client.completions.create(model="echo", prompt="hello", max_tokens=100)
    assert reply.object == "text_completion"
    assert reply.model == "echo"
    assert [choice.text for choice in reply.choices] == ["hello"]
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].logprobs is None
    assert reply.usage.prompt_tokens == 6
    assert reply.usage.completion_tokens == 6
    assert reply.usage.total_tokens == 12
    assert reply.usage.prompt_tokens_details.cached_tokens == 0

    again = client.completions.create(model="echo", prompt="hello", max_tokens=100)
    assert again.usage.prompt_tokens_details.cached_tokens == 5
    receipt = again.usage.kvloom
    assert receipt["cached_tokens"] == 5
    assert receipt["computed_tokens"] == 1
    assert receipt["provenance"] == {"tokens": {"exact": 6}, "bytes": {"plain": 64}}
    assert 0 < receipt["time_to_first_token_s"] <= receipt["total_s"]


def test_generates_sixteen_tokens_unless_told(shared_server: RunningServer) -> None:
    reply = shared_server.openai().completions.create(model="echo", prompt="x" * 40)
    assert reply.choices[0].text == "x" * 16
    assert reply.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("one", ["one"]),
        (["one", "two", "one"], ["one", "two", "one"]),
        ([111, 110, 101], ["one"]),
        ([[111, 110, 101], [116]], ["one", "t"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_takes_every_kind_of_prompt(
    shared_server: RunningServer, prompt: object, texts: list[str], stream: bool
) -> None:
    client = shared_server.openai()
    reply = client.completions.create(model="echo", prompt=prompt, stream=stream)
    if stream:
        got = [""] * len(texts)
        for chunk in reply:
            got[chunk.choices[0].index] += chunk.choices[0].text
    else:
        assert [choice.index for choice in reply.choices] == list(range(len(texts)))
        got = [choice.text for choice in reply.choices]
    assert got == texts


def test_numbers_choices_by_prompt_and_completion(shared_server: RunningServer) -> None:
    reply = shared_server.openai().completions.create(model="echo", prompt=["a", "b"], n=3)
    assert [choice.text for choice in reply.choices] == ["a", "a1", "a2", "b", "b1", "b2"]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3, 4, 5]
    assert reply.usage.prompt_tokens == 4


def test_many_prompts_all_come_back(shared_server: RunningServer) -> None:
    prompts = [f"prompt {number}" for number in range(300)]
    reply = shared_server.openai().completions.create(model="echo", prompt=prompts)
    assert [choice.text for choice in reply.choices] == prompts
    assert shared_server.llm.peak_live <= 64


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_echo_puts_the_prompt_first(shared_server: RunningServer, stream: bool, n: int) -> None:
    reply = shared_server.openai().completions.create(
        model="echo", prompt=["für ", "zwei "], echo=True, n=n, stream=stream
    )
    expected = ["für für ", "für für 1", "zwei zwei ", "zwei zwei 1"]
    got = [""] * (2 * n)
    if stream:
        for chunk in reply:
            got[chunk.choices[0].index] += chunk.choices[0].text
    else:
        got = [choice.text for choice in reply.choices]
    assert got == [text for text in expected if n == 2 or not text.endswith("1")]


def test_echo_of_token_ids_is_their_text(shared_server: RunningServer) -> None:
    reply = shared_server.openai().completions.create(
        model="echo", prompt=[BOS, 104, 105], echo=True
    )
    assert reply.choices[0].text == "hihi"


def test_echo_alone_draws_nothing(shared_server: RunningServer) -> None:
    reply = shared_server.openai().completions.create(
        model="echo", prompt="score me", echo=True, max_tokens=0, logprobs=1
    )
    assert reply.choices[0].text == "score me"
    assert reply.choices[0].finish_reason == "length"
    assert len(reply.choices[0].logprobs.tokens) == len("score me") + 1
    assert reply.usage.completion_tokens == 0
    assert reply.usage.total_tokens == reply.usage.prompt_tokens == 9


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_prompt_and_answer(shared_server: RunningServer, stream: bool) -> None:
    text = "aé"
    reply = shared_server.openai().completions.create(
        model="echo", prompt=text, echo=True, logprobs=3, stream=stream
    )
    pieces = reply if stream else [reply]
    lists = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for piece in pieces:
        if piece.choices[0].logprobs is not None:
            for name in lists:
                lists[name] += getattr(piece.choices[0].logprobs, name)
    once = ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert lists["tokens"] == ["<s>", *once, *once, "</s>"]
    assert lists["token_logprobs"] == [None] + [-1.0] * 7
    # Offsets count characters of the text: both bytes of the second character stand at one place.
    assert lists["text_offset"] == [0, 0, 1, 1, 2, 3, 3, 4]
    assert lists["top_logprobs"][0] is None
    assert lists["top_logprobs"][1] == {"b": -0.5, "a": -1.0, "c": -9999.0}


def test_logprobs_zero_reports_the_drawn_tokens_alone(shared_server: RunningServer) -> None:
    reply = shared_server.openai().completions.create(model="echo", prompt="ab", logprobs=0)
    assert reply.choices[0].logprobs.tokens == ["a", "b", "</s>"]
    assert reply.choices[0].logprobs.token_logprobs == [-1.0, -1.0, -1.0]
    assert reply.choices[0].logprobs.top_logprobs is None


def test_stop_strings_end_the_text(shared_server: RunningServer) -> None:
    client = shared_server.openai()
    reply = client.completions.create(model="echo", prompt="one. two", stop=". ")
    assert reply.choices[0].text == "one"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].stop_reason == ". "


def test_stream_is_sse_to_the_byte(shared_server: RunningServer) -> None:
    body = {"model": "echo", "prompt": "hé\n\n", "stream": True}
    response = shared_server.post("/v1/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response.text)
    assert events[-1] == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "hé\n\n"
    assert {event["id"] for event in events[:-1]} == {response.headers["x-request-id"]}
    assert {event["object"] for event in events[:-1]} == {"text_completion"}
    assert all("usage" not in event for event in events[:-1])
    reasons = [event["choices"][0]["finish_reason"] for event in events[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]


def test_stream_ends_with_usage_if_asked(shared_server: RunningServer) -> None:
    stream = shared_server.openai().completions.create(
        model="echo",
        prompt=["ab", "cde"],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == 7
    assert chunks[-1].usage.completion_tokens == 7
    assert chunks[-1].usage.kvloom["provenance"]["tokens"] == {"exact": 7}


def test_sampling_fields_reach_the_engine(server: RunningServer) -> None:
    server.openai().completions.create(
        model="echo",
        prompt="p",
        best_of=2,
        n=2,
        temperature=0.5,
        top_p=0.9,
        seed=-7,
        presence_penalty=1,
        frequency_penalty=-1.5,
        logit_bias={"7": 3},
        max_tokens=9,
        stop=["x", "y"],
        user="somebody",
        extra_body={
            "top_k": 40,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [5],
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
        },
    )
    (_, params), *_ = server.llm.submitted
    assert (params.n, params.temperature, params.top_p, params.seed) == (2, 0.5, 0.9, -7)
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1.5)
    assert params.logit_bias == {7: 3}
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (9, 2, True)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (40, 0.1, 1.1)
    assert params.stop == ("x", "y")
    assert params.stop_token_ids == (5,)
    assert params.include_stop_str_in_output
    assert not params.skip_special_tokens


def test_special_tokens_of_the_prompt_can_be_left_out(server: RunningServer) -> None:
    extra = {"add_special_tokens": False}
    server.openai().completions.create(model="echo", prompt="p", extra_body=extra)
    assert server.llm.submitted[0][0] == FakeTokenizer().encode("p", add_special_tokens=False)


def test_errors_of_the_engine_name_the_field(shared_server: RunningServer) -> None:
    client = shared_server.openai()
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="echo", prompt=[1, 2, 99999])
    assert caught.value.body["param"] == "prompt"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="echo", prompt="p", temperature=1000)
    assert caught.value.body["param"] == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="echo", prompt="p" * 10000)
    assert caught.value.body["param"] == "prompt"
