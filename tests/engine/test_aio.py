"""`AsyncLLM`: any number of tasks wait for one engine, and whoever leaves takes nothing along."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable
from typing import cast

import pytest

from kvloom import AsyncLLM
from kvloom.errors import CapacityError, KvloomError, RequestError
from kvloom.outputs import StreamChunk
from kvloom.params import SamplingParams
from tests.engine.worlds import BOOKS, TOKENIZER, expected_completion, greedy
from tests.fake_model import FakeRunner, Oracle

Make = Callable[..., AsyncLLM]
FOREVER = greedy(max_tokens=3000, ignore_eos=True)
TEXT = "once upon a time there was a cache that was a document."


def stream(llm: AsyncLLM, prompt: object, params: SamplingParams) -> AsyncGenerator[StreamChunk]:
    return cast("AsyncGenerator[StreamChunk]", llm.stream(prompt, params))  # type: ignore[arg-type]


async def used_blocks(llm: AsyncLLM) -> int:
    """Return owned blocks, found prefixes not counted; behind everything asked so far."""

    def count(engine: object) -> int:
        memory = engine.memory  # type: ignore[attr-defined]
        if memory.tree is not None:
            memory.tree.clear()
        memory.check()
        return int(memory.pool.num_blocks - memory.pool.free_blocks)

    return await asyncio.wrap_future(llm._loop.call(count))


async def is_idle(llm: AsyncLLM) -> bool:
    stats = await llm.stats()
    mailboxes = await asyncio.wrap_future(llm._loop.call(lambda _: len(llm._loop._mailboxes)))
    return (stats.running, stats.waiting, mailboxes) == (0, 0, 0)


def test_a_stream_is_the_oracle_s_text(make_async_llm: Make) -> None:
    async def main() -> None:
        llm = make_async_llm()
        chunks = [chunk async for chunk in llm.stream(TEXT, greedy(20))]
        prompt = TOKENIZER.encode(TEXT)
        expected = expected_completion(Oracle(), prompt, greedy(20), 0, 3000)
        assert [t for chunk in chunks for t in chunk.token_ids] == expected[0]
        assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        chats = [
            chunk async for chunk in llm.stream_chat([{"role": "x", "content": "y"}], greedy())
        ]
        assert chats[-1].usage is not None
        assert chats[-1].usage.prompt_tokens == len("x: y\n")
        assert await is_idle(llm)
        await llm.close()

    asyncio.run(main())


def test_generate_and_chat_keep_the_order(make_async_llm: Make) -> None:
    async def main() -> None:
        llm = make_async_llm(max_running=3, step_tokens=16)
        prompts = [book[:length] for length in (40, 3, 90) for book in BOOKS]
        outputs = await llm.generate(prompts, [greedy(1 + i) for i in range(9)])
        for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            wanted = greedy(1 + number)
            expected = expected_completion(Oracle(), prompt, wanted, 0, 3000)
            assert list(output.prompt_token_ids) == prompt
            assert list(output.outputs[0].token_ids) == expected[0]
        chats = await llm.chat([[{"role": "u", "content": c}] for c in "ab"], greedy(2))
        assert [chat.prompt for chat in chats] == ["u: a\n", "u: b\n"]
        assert await llm.generate([]) == []
        await llm.close()

    asyncio.run(main())


def test_more_prompts_than_may_wait(make_async_llm: Make) -> None:
    async def main() -> None:
        llm = make_async_llm(max_running=2, max_waiting=1)
        outputs = await llm.generate([[1 + i] for i in range(20)], greedy(3, ignore_eos=True))
        assert [output.prompt_token_ids[0] for output in outputs] == list(range(1, 21))
        others = [stream(llm, [token], FOREVER) for token in (1, 2, 3)]
        firsts = [asyncio.create_task(anext(other)) for other in others]
        await asyncio.gather(*firsts[:2])
        with pytest.raises(CapacityError) as refused:
            await llm.generate([5], greedy())
        assert refused.value.retry_after_s is not None
        await llm.close()
        with pytest.raises(KvloomError, match="closed"):
            await firsts[2]

    asyncio.run(main())


def test_errors_are_raised_as_they_are(make_async_llm: Make) -> None:
    async def main() -> None:
        runner = FakeRunner()
        llm = make_async_llm(runner=runner)
        for prompts in ([], [[]], [[1], [99]], [[1.5]], [None]):
            if prompts:
                with pytest.raises(RequestError):
                    await llm.generate(prompts, greedy())  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="vocabulary"):
            await anext(stream(llm, [99], greedy()))
        runner.failures = [ValueError("no weights today")]
        with pytest.raises(KvloomError, match="no weights today"):
            await llm.generate([[1], [2]], greedy())
        assert await is_idle(llm)
        await llm.close()
        with pytest.raises(KvloomError, match="closed"):
            await llm.generate([1])

    asyncio.run(main())


def test_closing_the_generator_frees_the_pages_at_once(make_async_llm: Make) -> None:
    async def main() -> None:
        llm = make_async_llm(enable_prefix_caching=False)
        chunks = stream(llm, BOOKS[0][:200], FOREVER)
        for _ in range(5):
            await anext(chunks)
        assert await used_blocks(llm) > 0
        await chunks.aclose()
        assert await used_blocks(llm) == 0
        assert await is_idle(llm)
        await llm.close()

    asyncio.run(main())


@pytest.mark.parametrize("turns", [0, 1, 2, 5, 30])
def test_cancelling_a_task_frees_its_pages_at_once(
    make_async_llm: Make, turns: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def read(llm: AsyncLLM) -> None:
        async for _ in llm.stream(BOOKS[0][:200], FOREVER):
            pass

    async def main() -> None:
        llm = make_async_llm(enable_prefix_caching=False)
        tasks = [asyncio.create_task(read(llm)) for _ in range(8)]
        tasks.append(asyncio.create_task(llm.generate([BOOKS[1][:9], BOOKS[2][:9]], FOREVER)))  # type: ignore[arg-type]
        for _ in range(turns):
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        await llm.stats()
        assert await used_blocks(llm) == 0
        assert await is_idle(llm)
        await llm.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())
    assert not caplog.records, "cancelling is nothing to complain about"


def test_64_streams_at_once_with_random_leavers(make_async_llm: Make) -> None:
    oracle = Oracle()
    prompts = [book[:length] for book in BOOKS for length in (3, 64, 100)]
    expected = [expected_completion(oracle, p, greedy(12), 0, 3000)[0] for p in prompts]

    async def client(llm: AsyncLLM, seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(4):
            number = choose.randrange(len(prompts))
            leaves = choose.choice([None, None, 0, 2])
            chunks = stream(llm, prompts[number], greedy(12))
            tokens: list[int] = []
            async for chunk in chunks:
                tokens += chunk.token_ids
                if leaves is not None and len(tokens) > leaves:
                    await chunks.aclose()
                    break
            assert tokens == expected[number][: len(tokens)]
            assert leaves is not None or tokens == expected[number]

    async def main() -> None:
        llm = make_async_llm(blocks=40, max_running=16)
        await asyncio.gather(*(client(llm, seed) for seed in range(64)))
        assert await is_idle(llm)
        assert await used_blocks(llm) == 0
        await llm.close()

    asyncio.run(main())


def test_closing_the_engine_ends_open_streams(make_async_llm: Make) -> None:
    async def main() -> None:
        llm = make_async_llm()
        chunks = stream(llm, BOOKS[0][:9], FOREVER)
        await anext(chunks)
        await llm.close()
        with pytest.raises(KvloomError, match="closed"):
            async for _ in chunks:
                pass

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_requests_of_an_event_loop_that_was_closed_end(make_async_llm: Make) -> None:
    llm = make_async_llm(enable_prefix_caching=False)
    loop = asyncio.new_event_loop()
    chunks = stream(llm, BOOKS[0][:9], FOREVER)
    loop.run_until_complete(anext(chunks))
    loop.close()

    async def main() -> None:
        while not await is_idle(llm):
            await asyncio.sleep(0.001)
        assert await used_blocks(llm) == 0
        assert (await llm.stats()).generated_tokens < 2000
        outputs = await llm.generate(BOOKS[1][:9], greedy())
        assert outputs[0].outputs[0].finish_reason is not None
        await llm.close()

    asyncio.run(main())
