"""KV answers whom it belongs to, and nobody else, whatever it was computed for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import LLM, AsyncLLM, Chunk, RequestError
from kvloom.engine.engine import Engine
from kvloom.engine.shelf import MIN_LOADED, Shelf
from kvloom.engine.tenants import tenant_of
from kvloom.reuse.prefix import common_prefix
from kvloom.store.disk import DiskStore
from kvloom.store.key import ANYBODY
from kvloom.store.ram import RamStore
from kvloom.store.tiered import TieredStore
from tests.engine.test_shelf import answer
from tests.engine.worlds import (
    BOOKS,
    TOKENIZER,
    expected_completion,
    fake_engine,
    greedy,
    prompts,
)
from tests.fake_model import Oracle

TEXT, SALTS = TOKENIZER.decode(BOOKS[0][:90]), [None, "x", "y"]
ONE = greedy(1)


def test_salts_are_told_apart_and_checked() -> None:
    salts = [None, "x", "y", "x ", "\ud800"]
    assert len({tenant_of(salt) for salt in salts}) == len(salts)
    assert tenant_of(None) == ANYBODY
    assert "secret" not in tenant_of("secret")
    wrong: Any
    for wrong in ("", 5, b"x", ["x"]):
        with pytest.raises(RequestError) as caught:
            tenant_of(wrong)
        assert caught.value.param == "cache_salt"


def reading(kind: str, llm: LLM, salt: str | None) -> int:
    """Read the text in one of the ways there are, and return how many of its tokens were known."""
    chat = [{"role": "user", "content": TEXT}]
    match kind:
        case "generate":
            return llm.generate(TEXT, ONE, cache_salt=salt)[0].usage.cached_tokens
        case "chat":
            return llm.chat(chat, ONE, cache_salt=salt)[0].usage.cached_tokens
        case "stream" | "stream_chat":
            stream = llm.stream(TEXT, ONE, cache_salt=salt)
            if kind == "stream_chat":
                stream = llm.stream_chat(chat, ONE, cache_salt=salt)
            (usage,) = [chunk.usage for chunk in stream if chunk.usage]
            return usage.cached_tokens
        case "parts":
            parts = [Chunk(TEXT), "a"]
            (output,) = llm.generate(parts=parts, params=ONE, cache_salt=salt)
            assert output.receipt is not None
            return len(TEXT) + 1 - output.receipt.recomputed
    doc = llm.document("", cache_salt=salt)
    if kind == "fork":
        doc = doc.fork()
    elif kind == "join":
        doc = llm.join(["a"], cache_salt=salt)
        doc.truncate(0)
    elif kind == "edit":
        return len(TEXT) - doc.edit(0, 0, TEXT).recomputed
    return doc.generate(TEXT, ONE).usage.cached_tokens


@pytest.mark.parametrize("first", ["generate", "document"])
@pytest.mark.parametrize(
    "kind",
    ["generate", "chat", "stream", "stream_chat", "parts", "document", "fork", "join", "edit"],
)
def test_a_text_is_known_to_those_who_gave_the_same_salt(
    make_llm: Callable[..., LLM], kind: str, first: str
) -> None:
    llm = make_llm()
    for salt in SALTS:
        assert reading(kind, llm, salt) == 0
    for salt in SALTS:
        assert reading(kind, llm, salt) >= 80
    assert reading(first, llm, "z") == 0
    llm.loop.call(lambda engine: engine.memory.check()).result(10)


def test_chunks_are_computed_for_each_tenant(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()

    def rows(salt: str | None) -> int:
        parts = ["abc", Chunk(TEXT), "a"]
        doc = llm.join(parts, fidelity="shifted", cache_salt=salt)
        assert doc.receipt is not None
        assert doc.tenant == tenant_of(salt)
        return doc.receipt.recomputed

    before = [rows(salt) for salt in SALTS]
    assert before == [before[0]] * 3
    assert all(rows(salt) < before[0] - 80 for salt in SALTS)


def test_kv_is_not_carried_from_one_tenants_document_to_anothers(
    make_llm: Callable[..., LLM],
) -> None:
    llm = make_llm()
    ours, theirs = (llm.document(TEXT, cache_salt=salt) for salt in ("x", "y"))
    with pytest.raises(RequestError, match="cache_salt"):
        ours.transplant(5, theirs, 5, 9)
    ours.transplant(5, llm.document(TEXT, cache_salt="x"), 5, 9)


def test_async_callers_are_told_apart(make_async_llm: Callable[..., AsyncLLM]) -> None:
    async def scenario() -> None:
        llm = make_async_llm()
        chat = [{"role": "user", "content": TEXT}]

        async def all_ways(salt: str | None) -> list[int]:
            usages = [
                (await llm.generate(TEXT, ONE, cache_salt=salt))[0].usage,
                (await llm.chat(chat, ONE, cache_salt=salt))[0].usage,
            ]
            for stream in (
                llm.stream(TEXT + "abc", ONE, cache_salt=salt),
                llm.stream_chat(chat, ONE, cache_salt=salt),
                (await llm.document(TEXT, cache_salt=salt)).stream("d", ONE),
                (await llm.join([TEXT, "e"], cache_salt=salt)).stream("f", ONE),
            ):
                usages += [chunk.usage async for chunk in stream if chunk.usage]
            return [usage.cached_tokens for usage in usages]

        try:
            first = [await all_ways(salt) for salt in SALTS]
            assert first == [first[0]] * 3
            again = [await all_ways(salt) for salt in SALTS]
            assert all(ours > theirs for ours, theirs in zip(again[0][:2], first[0], strict=False))
            assert again == [again[0]] * 3
        finally:
            await llm.close()

    asyncio.run(scenario())


def started(folder: Path) -> Engine:
    """An engine with what others left in a folder."""
    engine = fake_engine()
    store = TieredStore(RamStore(2**24), DiskStore(folder, 2**24))
    memory = engine.memory
    memory.shelf = Shelf(store, memory.pool, memory.root, b"one model", lambda _: [])
    return engine


steps = st.lists(
    st.tuples(st.sampled_from(SALTS), prompts(longest=150), st.booleans()), min_size=1, max_size=8
)


@settings(max_examples=15, deadline=None)
@given(steps)
def test_each_gets_its_own_back_after_restarts(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[str | None, list[int], bool]]
) -> None:
    folder: Path = tmp_path_factory.mktemp("store")
    known: dict[str | None, list[list[int]]] = {salt: [] for salt in SALTS}
    engine = started(folder)
    for salt, prompt, restart in asked:
        if restart:
            engine.close()
            engine = started(folder)
        most = max((common_prefix(prompt, tokens) for tokens in known[salt]), default=0)
        most = min(most, len(prompt) - 1)
        cached = answer(engine, prompt, tenant_of(salt)).cached_tokens
        assert max(most - MIN_LOADED + 1, 0) <= cached <= most
        completion = expected_completion(Oracle(), prompt, greedy(2), 0, 4000)[0]
        known[salt].append([*prompt, *completion[:-1]])
    engine.close()
