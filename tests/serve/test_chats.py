"""Replies of `/v1/chat/completions`, asked by the official client."""

from __future__ import annotations

import asyncio

import openai
import pytest

from .running import RunningServer, events_of

HELLO = [{"role": "user", "content": "hello"}]


def test_answers_a_conversation(shared_server: RunningServer) -> None:
    reply = shared_server.openai().chat.completions.create(
        model="echo", messages=[{"role": "system", "content": "be brief"}, *HELLO]
    )
    assert reply.object == "chat.completion"
    message = reply.choices[0].message
    assert message.role == "assistant"
    assert message.content == "system:be brief\nuser:hello\n"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_answer_may_be_sent_back_as_it_came(shared_server: RunningServer) -> None:
    client = shared_server.openai()
    reply = client.chat.completions.create(model="echo", messages=HELLO)
    messages = [*HELLO, reply.choices[0].message, {"role": "user", "content": "more"}]
    again = client.chat.completions.create(model="echo", messages=messages)
    assert again.choices[0].message.content.endswith("user:more\n")
    fields = reply.choices[0].message.model_dump()
    client.chat.completions.create(model="echo", messages=[fields, *HELLO])


def test_may_fill_the_context_unless_told(server: RunningServer) -> None:
    client = server.openai()
    client.chat.completions.create(model="echo", messages=HELLO)
    client.chat.completions.create(model="echo", messages=HELLO, max_completion_tokens=3)
    client.chat.completions.create(model="echo", messages=HELLO, max_tokens=4)
    limits = [params.max_tokens for _, params in server.llm.submitted]
    assert limits == [None, 3, 4]


def test_text_parts_are_joined(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    reply = server.openai().chat.completions.create(
        model="echo", messages=[{"role": "developer", "content": parts}, *HELLO]
    )
    assert reply.choices[0].message.content == "system:one\ntwo\nuser:hello\n"


def test_stream_carries_the_role_first_and_the_reason_last(shared_server: RunningServer) -> None:
    body = {"model": "echo", "messages": HELLO, "stream": True, "n": 2}
    events = events_of(shared_server.post("/v1/chat/completions", body).text)
    assert events[-1] == "[DONE]"
    for index in (0, 1):
        choices = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == index]
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert all(set(choice["delta"]) == {"content"} for choice in choices[1:-1])
        assert choices[-1]["delta"] == {}
        assert choices[-1]["finish_reason"] == "stop"
        text = "".join(choice["delta"]["content"] for choice in choices[:-1])
        assert text == "user:hello\n" + ("1" if index else "")
    assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}


def test_no_stream_event_holds_half_a_character(shared_server: RunningServer) -> None:
    messages = [{"role": "user", "content": "häß 🙂 漢字"}]
    stream = shared_server.openai().chat.completions.create(
        model="echo", messages=messages, stream=True
    )
    deltas = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(deltas) == "user:häß 🙂 漢字\n"
    assert "�" not in "".join(deltas)


def test_stream_ends_with_usage_if_asked(shared_server: RunningServer) -> None:
    stream = shared_server.openai().chat.completions.create(
        model="echo", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.prompt_tokens == len("user:hello\n")
    assert last.usage.prompt_tokens_details.cached_tokens >= 0
    assert last.usage.kvloom["computed_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_come_per_token(shared_server: RunningServer, stream: bool) -> None:
    reply = shared_server.openai().chat.completions.create(
        model="echo", messages=HELLO, logprobs=True, top_logprobs=3, max_tokens=4, stream=stream
    )
    content = []
    for piece in reply if stream else [reply]:
        if piece.choices[0].logprobs is not None:
            content += piece.choices[0].logprobs.content
    assert [entry.token for entry in content] == list("user")
    assert content[0].logprob == -1.0
    assert content[0].bytes == [ord("u")]
    ranked = [(entry.token, entry.logprob) for entry in content[0].top_logprobs]
    assert ranked == [("v", -0.5), ("u", -1.0), ("w", -9999.0)]


def test_logprobs_without_alternatives(shared_server: RunningServer) -> None:
    reply = shared_server.openai().chat.completions.create(
        model="echo", messages=HELLO, logprobs=True
    )
    content = reply.choices[0].logprobs.content
    assert content[-1].token == "</s>"
    assert content[-1].bytes is None
    assert all(entry.top_logprobs == [] for entry in content)


def test_a_refusing_template_is_the_clients_error(shared_server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError, match="template refuses") as caught:
        shared_server.openai().chat.completions.create(
            model="echo", messages=[{"role": "assistant", "content": "me last"}]
        )
    assert caught.value.body["param"] == "messages"


def test_async_client_streams(shared_server: RunningServer) -> None:
    async def ask(text: str) -> str:
        async with shared_server.async_openai() as client:
            stream = await client.chat.completions.create(
                model="echo", messages=[{"role": "user", "content": text}], stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        return await asyncio.gather(*(ask(f"question {number}") for number in range(8)))

    assert asyncio.run(ask_all()) == [f"user:question {number}\n" for number in range(8)]
