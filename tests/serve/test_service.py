"""From prompts to chunks: order, limits and clean-up without HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from kvloom.errors import CapacityError
from kvloom.params import SamplingParams
from kvloom.serve.config import ServerConfig
from kvloom.serve.errors import GenerationAbortedError, UnknownModelError
from kvloom.serve.metrics import Metrics
from kvloom.serve.parts import Ask
from kvloom.serve.service import PROMPTS_AT_ONCE, Service, salt_of
from kvloom.store.key import ANYBODY

from .fake_llm import FakeAsyncLLM


def service_of(llm: FakeAsyncLLM, **settings: Any) -> Service:
    return Service(llm, ServerConfig(**settings), Metrics())


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def checked() -> None:
        await scenario
        assert len(asyncio.all_tasks()) == 1, "a task was left behind"

    asyncio.run(checked())


async def texts_of(service: Service, prompts: list[str]) -> dict[int, str]:
    texts = dict.fromkeys(range(len(prompts)), "")
    tokens = [Ask(list(prompt.encode()), ANYBODY) for prompt in prompts]
    async for prompt, chunk in service.generate(tokens, SamplingParams()):
        texts[prompt] += chunk.text
    return texts


@pytest.mark.parametrize("count", [1, 2, PROMPTS_AT_ONCE, 3 * PROMPTS_AT_ONCE + 1])
def test_every_prompt_gets_its_own_chunks(count: int) -> None:
    async def scenario() -> None:
        llm = FakeAsyncLLM()
        prompts = [f"<{number}>" for number in range(count)]
        texts = await texts_of(service_of(llm), prompts)
        assert list(texts.values()) == prompts
        assert llm.peak_live == min(count, PROMPTS_AT_ONCE)
        assert llm.live == 0

    run(scenario())


@pytest.mark.parametrize("count", [1, 100])
def test_closing_cancels_every_prompt(count: int) -> None:
    async def scenario() -> None:
        llm = FakeAsyncLLM()
        chunks = service_of(llm).generate([Ask([65, 66], ANYBODY)] * count, SamplingParams())
        await anext(chunks)
        assert llm.live >= 1
        await chunks.aclose()
        assert llm.live == 0

    run(scenario())


def test_a_consumer_that_waits_stops_the_engine() -> None:
    async def scenario() -> None:
        llm = FakeAsyncLLM()
        chunks = service_of(llm).generate(
            [Ask([65] * 100, ANYBODY)] * 3, SamplingParams(max_tokens=100)
        )
        await anext(chunks)
        for _ in range(200):
            await asyncio.sleep(0)
        # One chunk taken, one in the queue, and one in the hands of each prompt.
        assert llm.tokens_given <= 5
        await chunks.aclose()

    run(scenario())


@pytest.mark.parametrize("count", [1, 64])
def test_one_refusal_ends_all(count: int) -> None:
    async def scenario() -> None:
        llm = FakeAsyncLLM(max_live=count - 1)
        with pytest.raises(CapacityError):
            await texts_of(service_of(llm), ["abc"] * count)
        assert llm.peak_live == count - 1
        assert llm.live == 0

    run(scenario())


def test_an_abort_is_an_error() -> None:
    async def scenario() -> None:
        llm = FakeAsyncLLM()
        llm.abort_after = 1
        with pytest.raises(GenerationAbortedError):
            await texts_of(service_of(llm), ["abc"])

    run(scenario())


def test_the_model_goes_by_its_folder_or_the_given_name() -> None:
    llm = FakeAsyncLLM()
    assert service_of(llm).model_name == "echo"
    named = service_of(llm, served_model_name="other")
    named.check_model("other")
    named.check_model(None)
    with pytest.raises(UnknownModelError):
        named.check_model("echo")


def test_the_context_is_the_smaller_of_setting_and_model() -> None:
    assert service_of(FakeAsyncLLM(max_model_len=77)).max_model_len == 77


def test_salts_of_different_keys_differ() -> None:
    keys, salts = ["", "a" * 64, "b" * 64], [None, "x", "y", "x:y"]
    found = [salt_of(key, salt) for key in keys for salt in salts]
    assert found[0] is None
    assert len(set(found)) == len(found)
