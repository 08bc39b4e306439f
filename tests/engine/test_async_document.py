"""`AsyncDocument` does what `Document` does, and leaves nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from kvloom import LLM, AsyncLLM
from kvloom.errors import RequestError
from tests.engine.test_aio import used_blocks
from tests.engine.worlds import greedy

TEXT = "once upon a time there was a cache that was a document."
MORE = "and then it was edited."


def test_it_answers_as_a_document_does(
    make_llm: Callable[..., LLM], make_async_llm: Callable[..., AsyncLLM]
) -> None:
    document = make_llm().document(TEXT)
    expected = [document.generate(MORE, greedy()).outputs[0].token_ids]
    scores = document.score(MORE)
    document.append(MORE)
    expected.append(document.generate("", greedy()).outputs[0].token_ids)

    async def ask() -> None:
        llm = make_async_llm()
        ours = await llm.document(TEXT)
        first = (await ours.generate(MORE, greedy())).outputs[0]
        assert await ours.score(MORE) == pytest.approx(scores)
        logprobs, logits = await ours.score(MORE, return_logits=True)
        assert len(logits) == len(logprobs) == len(scores)
        fork = await ours.fork()
        await ours.append(MORE)
        streamed = [chunk async for chunk in ours.stream("", greedy())]
        second = tuple(token for chunk in streamed for token in chunk.token_ids)
        assert [first.token_ids, second] == expected
        assert (await ours.provenance).tokens == {"exact": len(document.tokens)}
        assert await ours.nbytes > 0
        assert ours.tokens == document.tokens
        assert ours.text == document.text
        assert fork.tokens == ours.tokens[: len(fork.tokens)]
        await ours.truncate(3)
        assert ours.tokens == document.tokens[:3]
        await ours.close()
        await fork.close()
        await llm.stats()  # lets go of what was closed
        assert await used_blocks(llm) == 0
        await llm.close()

    asyncio.run(ask())


def test_what_cannot_be_done_is_said(make_async_llm: Callable[..., AsyncLLM]) -> None:
    async def ask() -> None:
        llm = make_async_llm()
        document = await llm.document(TEXT)
        with pytest.raises(RequestError, match="cannot be cut"):
            await document.truncate(10_000)
        with pytest.raises(RequestError, match="no text to score"):
            await document.score("")
        assert document.text == TEXT
        await llm.close()

    asyncio.run(ask())


def test_it_is_edited_as_a_document_is(
    make_llm: Callable[..., LLM], make_async_llm: Callable[..., AsyncLLM]
) -> None:
    document = make_llm().document(TEXT)

    async def ask() -> None:
        llm = make_async_llm()
        ours = await llm.document(TEXT)
        source = await llm.document(TEXT)
        for place, fidelity in ((20, "exact"), (21, "shifted")):
            expected = document.edit(place, place + 4, MORE, fidelity=fidelity)
            found = await ours.edit(place, place + 4, MORE, fidelity=fidelity)
            assert replace(found, seconds=0) == replace(expected, seconds=0)
            assert ours.text == document.text
        exact = await ours.generate("", greedy(), exact_only=True)
        fresh = await llm.generate(ours.tokens, greedy())
        assert exact.outputs[0].token_ids == fresh[0].outputs[0].token_ids
        assert set(exact.usage.provenance.tokens) == {"exact"}
        assert (await ours.repair()).fidelity == document.repair().fidelity == "exact"
        assert (await ours.replace(TEXT)).tokens == document.replace(TEXT).tokens
        receipt = await ours.transplant(4, source, 4, 8)
        assert sum(receipt.tokens.values()) == len(ours.tokens)
        await llm.close()

    asyncio.run(ask())


def test_changes_wait_for_each_other_even_if_nobody_waits_for_them(
    make_async_llm: Callable[..., AsyncLLM],
) -> None:
    async def ask() -> None:
        llm = make_async_llm()
        document = await llm.document("abc")
        changes = [asyncio.create_task(document.append(letter)) for letter in "defghij"]
        await asyncio.sleep(0)
        changes[0].cancel()  # has begun, and is carried out
        changes[3].cancel()  # waits, and is not
        await asyncio.gather(*changes, return_exceptions=True)
        await document.truncate(len(document.tokens))
        assert document.text == "abcdefhij"
        await llm.close()

    asyncio.run(ask())
