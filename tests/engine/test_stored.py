"""What a user is told about the store, and may do with it, is what the store does."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvloom import LLM, AsyncLLM, KvloomError, StoreSettings
from kvloom.engine.engine import Engine
from kvloom.engine.stored import Store, store_of
from kvloom.store.chunk import Chunk
from kvloom.store.ram import RamStore
from kvloom.store.tiered import TieredStore
from tests.engine.test_shelf import MORE, PROMPT, SECRET, Odd, give_shelf
from tests.engine.worlds import greedy

TEXT = "A text that is long enough to be worth the way to the disk and back. " * 2


def settings(folder: Path) -> dict[str, Any]:
    return {"kv_memory": "4MiB", "store": StoreSettings(folder=folder)}


def given(llm: LLM, store: TieredStore) -> Store:
    """Give an engine a store while it runs."""

    def give(engine: Engine) -> Store | None:
        give_shelf(engine, store)
        return store_of(engine, llm.loop)

    found = llm.loop.call(give).result(10)
    assert found is not None
    return found


def test_there_is_none_unless_it_is_asked_for(tiny_llm: LLM) -> None:
    assert tiny_llm.store is None


def test_a_stored_text_is_listed_counted_pinned_and_deleted(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with LLM(str(tiny_folder), **settings(tmp_path)) as llm:
        assert llm.store is not None
        assert llm.store.folder == tmp_path
        assert not llm.store.entries()
        (output,) = llm.generate(TEXT, greedy(2, ignore_eos=True))
        assert llm.store.flush()
        (entry,) = llm.store.entries()
        use = llm.store.statistics()
        # The last token that was drawn was never read.
        assert entry.num_tokens == use.kept_tokens == output.usage.prompt_tokens + 1
        assert (entry.tiers, entry.hits, entry.pinned) == (("ram", "disk"), 0, False)
        assert (use.pending, use.dropped, use.loaded_tokens) == (0, 0, 0)
        assert use.tiers["disk"].nbytes <= entry.nbytes
        assert (tmp_path / f"{entry.name}.safetensors").is_file()
        assert llm.store.pin(entry.name)
        assert not llm.store.pin("0" * 64)
    with LLM(str(tiny_folder), **settings(tmp_path)) as llm:
        assert llm.store is not None
        (again,) = llm.generate(TEXT, greedy(1))
        assert llm.store.flush()
        use = llm.store.statistics()
        assert use.loaded_tokens == again.usage.cached_tokens == again.usage.prompt_tokens - 1
        assert (use.tiers["disk"].hits, use.missed_tokens) == (1, 0)
        (kept,) = llm.store.entries()
        assert (kept.name, kept.hits, kept.pinned) == (entry.name, 1, True)
        assert kept.last_used >= entry.last_used
        assert llm.store.delete(entry.name)
        assert not llm.store.delete(entry.name)
        assert not llm.store.entries()
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(KvloomError, match="closed"):
        llm.store.flush()


def test_what_was_used_last_comes_first(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    now = iter(range(100))
    store = given(llm, TieredStore(RamStore(2**24, clock=lambda: next(now))))
    assert store.folder is None
    for prompt in (PROMPT, MORE):
        llm.generate(prompt, greedy(1))
        assert store.flush()
    first, second = store.entries()
    assert [first.num_tokens, second.num_tokens] == [len(MORE), len(PROMPT)]


def test_secrets_and_losses_are_counted(make_llm: Callable[..., LLM]) -> None:
    llm = make_llm()
    odd = Odd(RamStore(2**24))
    store = given(llm, odd)
    llm.generate([SECRET, *PROMPT], greedy(1))
    assert store.flush()
    assert store.statistics().secret == 1
    odd.gives = "nothing"

    def forget(engine: Engine) -> None:
        assert engine.memory.tree is not None
        engine.memory.tree.clear()

    llm.loop.call(forget).result(10)
    llm.generate([SECRET, *PROMPT], greedy(1))
    assert store.statistics().missed_tokens == len(PROMPT)


def test_waiting_for_a_store_that_hangs_ends(make_llm: Callable[..., LLM]) -> None:
    free = threading.Event()

    class Slow(TieredStore):
        def put(self, chunk: Chunk, *, secret: bool = False) -> bool:
            assert free.wait(20)
            return super().put(chunk, secret=secret)

    llm = make_llm()
    store = given(llm, Slow(RamStore(2**24)))
    llm.generate([PROMPT, MORE], greedy(1))
    assert not store.flush(0.05)
    assert store.statistics().pending >= 1
    free.set()
    assert store.flush()
    assert store.statistics().pending == 0
    assert len(store.entries()) == 2


def test_tasks_ask_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    async def scenario() -> None:
        llm = AsyncLLM(str(tiny_folder), **settings(tmp_path))
        try:
            assert llm.store is not None
            await llm.generate(TEXT, greedy(1))
            assert await llm.store.flush()
            (entry,) = await llm.store.entries()
            assert (await llm.store.statistics()).kept_tokens == entry.num_tokens
            assert await llm.store.pin(entry.name)
            assert await llm.store.delete(entry.name)
            assert not await llm.store.entries()
            assert llm.store.folder == tmp_path
        finally:
            await llm.close()

    asyncio.run(scenario())
