"""Streams over real sockets: clients that leave, stall or read slowly, and engines that fail."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from kvloom.errors import CapacityError

from .fake_llm import FakeAsyncLLM
from .raw_client import RawClient
from .running import RunningServer, events_of, eventually

STREAM = {"prompt": "x" * 100, "stream": True, "max_tokens": 1000}
WHOLE = {"prompt": "x" * 100, "max_tokens": 1000}
CHAT_STREAM = {"messages": [{"role": "user", "content": "x" * 100}], "stream": True}


def disconnects(server: RunningServer) -> float:
    registry = server.app.state.service.metrics.registry
    return registry.get_sample_value("kvloom_client_disconnects_total")


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", STREAM), ("/v1/chat/completions", CHAT_STREAM)]
)
def test_leaving_a_stream_cancels_the_request(
    server: RunningServer, path: str, body: dict[str, object], how: str
) -> None:
    server.llm.hold_after = 20
    with RawClient(server.port, path, body) as client:
        client.read_until(b"data: ")
        assert server.llm.live == 1
        if how == "reset":
            client.reset()
    eventually(lambda: server.llm.live == 0)
    assert server.llm.finished == {"abort": 1}
    assert server.llm.tokens_given <= 21
    eventually(lambda: disconnects(server) == 1)


@pytest.mark.parametrize("hold_after", [0, 20])
@pytest.mark.parametrize("body", [STREAM, WHOLE, WHOLE | {"prompt": ["x", "y", "z" * 50]}])
def test_leaving_before_the_answer_cancels_the_request(
    server: RunningServer, body: dict[str, object], hold_after: int
) -> None:
    server.llm.hold_after = hold_after
    num_prompts = 3 if isinstance(body["prompt"], list) else 1
    with RawClient(server.port, "/v1/completions", body):
        eventually(lambda: server.llm.live == num_prompts or server.llm.tokens_given >= 20)
    eventually(lambda: server.llm.live == 0)
    assert server.llm.finished["abort"] >= 1
    eventually(lambda: disconnects(server) == 1)
    server.llm.hold_after = None
    assert server.post("/v1/completions", {"prompt": "next"}).status_code == 200


def test_closing_the_clients_stream_cancels_the_request(server: RunningServer) -> None:
    server.llm.delay_s = 0.001
    stream = server.openai().completions.create(
        model="echo", prompt="x", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    stream.close()
    eventually(lambda: server.llm.live == 0)
    assert server.llm.tokens_given < 4000


def test_a_reader_that_stops_holds_up_neither_memory_nor_others() -> None:
    with RunningServer(FakeAsyncLLM(max_model_len=60_000)) as server:
        body = {"prompt": "x" * 10, "stream": True, "max_tokens": 50_000, "ignore_eos": True}
        body |= {"logprobs": 3}
        with RawClient(server.port, "/v1/completions", body, receive_buffer=4096):
            given = -1

            def engine_waits() -> bool:
                nonlocal given
                before, given = given, server.llm.tokens_given
                time.sleep(0.3)
                return 0 < given == before

            eventually(engine_waits, timeout_s=60)
            # The socket buffers are full, and the engine is asked for nothing more.
            assert given < 50_000
            assert server.post("/v1/completions", {"prompt": "other"}).status_code == 200
            assert server.llm.live == 1
        eventually(lambda: server.llm.live == 0)


def test_a_reader_that_never_returns_is_cut_off() -> None:
    with RunningServer(FakeAsyncLLM(max_model_len=60_000), stall_timeout_s=0.2) as server:
        body = {"prompt": "x" * 10, "stream": True, "max_tokens": 50_000, "ignore_eos": True}
        body |= {"logprobs": 3}
        with RawClient(server.port, "/v1/completions", body, receive_buffer=4096):
            eventually(lambda: server.llm.finished["abort"] == 1, timeout_s=60)
            assert server.llm.live == 0


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (RuntimeError("secret detail"), "engine_error", "The engine failed"),
        (CapacityError("No memory is left."), "kv_memory_exceeded", "No memory is left."),
    ],
)
@pytest.mark.parametrize("prompt", ["hello", ["hello", "world"]])
def test_a_failure_during_a_stream_ends_it_with_an_error_event(
    server: RunningServer, failure: Exception, code: str, message: str, prompt: object
) -> None:
    server.llm.failure, server.llm.fail_after = failure, 3
    response = server.post("/v1/completions", {"prompt": prompt, "stream": True})
    assert response.status_code == 200
    *events, last = events_of(response.text)
    assert all("choices" in event for event in events)
    assert set(last) == {"error"}
    assert last["error"]["code"] == code
    assert message in last["error"]["message"]
    assert "secret" not in response.text

    client = server.openai()
    with pytest.raises(openai.APIError, match=message):
        list(client.completions.create(model="echo", prompt=prompt, stream=True))
    eventually(lambda: server.llm.live == 0)
    server.llm.failure = None
    assert client.completions.create(model="echo", prompt="x").choices[0].text == "x"


def test_an_aborted_stream_says_so(server: RunningServer) -> None:
    server.llm.abort_after = 2
    response = server.post("/v1/completions", {"prompt": "hello", "stream": True})
    assert events_of(response.text)[-1]["error"]["code"] == "engine_error"


@pytest.fixture
def busy() -> Iterator[RunningServer]:
    with RunningServer() as server:
        server.llm.delay_s = 0.001
        yield server


def test_many_streams_with_random_disconnects_mix_nothing_up(busy: RunningServer) -> None:
    """64 clients at once; each prompt is its own answer, so a mix-up cannot hide."""
    rng = random.Random(3)
    plans = [
        (f"request {number} {rng.random()} é🙂", rng.choice(["read", "leave", "whole", "cancel"]))
        for number in range(400)
    ]
    rng.shuffle(plans)

    async def one(client: httpx.AsyncClient, text: str, plan: str) -> None:
        body = {"prompt": text, "max_tokens": 200}
        if plan == "whole":
            reply = (await client.post("/v1/completions", json=body)).json()
            assert reply["choices"][0]["text"] == text
        elif plan == "cancel":
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await client.post("/v1/completions", json=body | {"prompt": text * 5})
        else:
            received, stop_at = "", 5 if plan == "leave" else 10**6
            async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as r:
                async for line in r.aiter_lines():
                    if line and line != "data: [DONE]":
                        (event,) = events_of(f"{line}\n\n")
                        received += event["choices"][0]["text"]
                        stop_at -= 1
                    if not stop_at:
                        break
            assert received == text if plan == "read" else text.startswith(received)

    async def work(client: httpx.AsyncClient) -> None:
        while plans:
            await one(client, *plans.pop())

    async def everybody() -> None:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=busy.url, timeout=60, limits=limits) as client:
            await asyncio.gather(*(work(client) for _ in range(64)))

    asyncio.run(everybody())
    eventually(lambda: busy.llm.live == 0)
    assert busy.llm.peak_live > 32
    assert busy.llm.finished["stop"] >= 150
    assert busy.llm.finished["abort"] >= 40
    assert busy.llm.finished.total() == len(busy.llm.submitted)
    assert busy.post("/v1/completions", {"prompt": "after"}).json()["choices"][0]["text"] == "after"
