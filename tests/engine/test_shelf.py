"""Shelved prefixes come back bit for bit to whom they belong, or are computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvloom.config import EngineConfig
from kvloom.decode.detokenize import TextDecoder
from kvloom.engine import idle as idle_module
from kvloom.engine import shelf as shelf_module
from kvloom.engine.engine import Engine
from kvloom.engine.shelf import Loading, Shelf
from kvloom.kv.carrying import carried_out
from kvloom.kv.doc import KVDoc
from kvloom.kv.pool import Pool
from kvloom.store.chunk import Chunk
from kvloom.store.disk import DiskStore
from kvloom.store.key import ANYBODY, hash_tenant
from kvloom.store.prefix import Step
from kvloom.store.ram import RamStore
from kvloom.store.remote import FileBucket, RemoteStore
from kvloom.store.tiered import TieredStore
from kvloom.types import LayerSpec
from tests.engine.worlds import BOOKS, TOKENIZER, expected_completion, fake_engine, greedy
from tests.fake_model import FakeRunner, Oracle

ALICE = hash_tenant("alice")
SECRET = 29


def open_store(folder: Path | None = None) -> TieredStore:
    return TieredStore(RamStore(2**24), None if folder is None else DiskStore(folder, 2**24))


def give_shelf(engine: Engine, store: Any, fingerprint: bytes = b"one model") -> Shelf:
    """A shelf whose texts are secret where they hold one token."""

    def scan(tokens: Sequence[int]) -> list[str]:
        return ["secret"] if SECRET in tokens else []

    engine.memory.shelf = Shelf(store, engine.pool, engine.memory.root, fingerprint, scan)
    return engine.memory.shelf


def shelved_engine(store: Any, fingerprint: bytes = b"one model", **settings: Any) -> Engine:
    engine = fake_engine(fingerprint=fingerprint, **settings)
    give_shelf(engine, store, fingerprint)
    return engine


def answer(engine: Engine, prompt: list[int], tenant: str = ANYBODY) -> Any:
    """Run a request to its end and return its usage."""
    engine.submit(prompt, greedy(2), tenant=tenant)
    tokens: list[int] = []
    deadline = time.monotonic() + 20
    while engine.has_work:
        assert time.monotonic() < deadline, "the request does not end"
        for event in engine.step():
            tokens += event.token_ids  # type: ignore[union-attr]
            usage = event.usage  # type: ignore[union-attr]
    assert tokens == expected_completion(Oracle(), prompt, greedy(2), 0, 4000)[0]
    engine.memory.check()
    return usage


def idle(engine: Engine) -> None:
    while engine.idle.has_work:
        engine.idle.step()


PROMPT, MORE = (
    [token % 28 + 1 for token in book[:length]]
    for book, length in zip(BOOKS[:2], (150, 100), strict=True)
)


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_a_new_engine_goes_on_where_another_ended(tmp_path: Path, tier: str) -> None:
    store = open_store(tmp_path if tier == "disk" else None)
    engine = shelved_engine(store)
    answer(engine, PROMPT)
    if tier == "disk":
        engine.close()
        store = open_store(tmp_path)
    else:
        idle(engine)
        assert engine.memory.shelf is not None
        engine.memory.shelf._scanner.drain(10)
    again = shelved_engine(store)
    assert answer(again, [*PROMPT, 5]).cached_tokens >= 150
    grown = answer(again, [*PROMPT, 5, *MORE])
    assert grown.cached_tokens >= 151
    idle(again)
    again.close()
    if tier == "disk":
        last = shelved_engine(open_store(tmp_path))
        assert answer(last, [*PROMPT, 5, *MORE, 7]).cached_tokens >= 250
        last.close()


def test_others_find_nothing(tmp_path: Path) -> None:
    engine = shelved_engine(open_store(tmp_path))
    answer(engine, PROMPT, ALICE)
    engine.close()
    for tenant, fingerprint, found in (
        (ANYBODY, b"one model", False),
        (hash_tenant("bob"), b"one model", False),
        (ALICE, b"another", False),
        (ALICE, b"one model", True),
    ):
        other = shelved_engine(open_store(tmp_path), fingerprint)
        assert (answer(other, [*PROMPT, 5], tenant).cached_tokens > 0) == found
        other.idle._waiting.clear()
        other.close()


def test_inexact_kv_is_never_shelved(tmp_path: Path) -> None:
    engine = shelved_engine(open_store())
    doc = engine.new_document()
    other = KVDoc(engine.pool, engine.memory.root)
    slots = other.append(PROMPT[:100])
    engine.pool.write(0, torch.from_numpy(slots), torch.ones(1, 100, 2), torch.ones(1, 100, 2))
    other.close_tail()
    doc.extend([other.spans[0].sub(10, 100).at(0)])
    engine.memory.publish(doc, ANYBODY)
    engine.memory.publish(doc, ANYBODY)
    engine.idle.put_by(doc.tokens, ANYBODY)
    idle(engine)
    assert engine.memory.shelf is not None
    assert engine.memory.shelf.counts["kept_tokens"] == 0
    other.close()


def test_secrets_stay_in_memory(tmp_path: Path) -> None:
    engine = shelved_engine(open_store(tmp_path))
    answer(engine, PROMPT)
    answer(engine, [SECRET, *PROMPT])
    idle(engine)
    shelf = engine.memory.shelf
    assert shelf is not None
    shelf._scanner.drain(10)
    shelf.store.flush()
    assert shelf.store.statistics().secret == 1
    engine.close()
    again = shelved_engine(open_store(tmp_path))
    assert answer(again, [SECRET, *PROMPT, 5]).cached_tokens == 0
    assert answer(again, [*PROMPT, 5]).cached_tokens >= 150
    again.close()


class Odd(TieredStore):
    """A store that knows chunks and gives something else for them."""

    gives: Any = None

    def fetch(self, key: Any) -> Future[Chunk | None]:
        future: Future[Chunk | None] = Future()
        if self.gives == "raises":
            future.set_exception(OSError("no such file"))
        elif self.gives == "cancelled":
            future.cancel()
        elif self.gives is not None:
            chunk = self.get(key)
            future.set_result(
                None if chunk is None or self.gives == "nothing" else self.gives(chunk)
            )
        return future


def other_format(chunk: Chunk) -> Chunk:
    return replace(chunk, tensors={name: x.double() for name, x in chunk.tensors.items()})


def other_place(chunk: Chunk) -> Chunk:
    return replace(chunk, base=chunk.base + 3)


def other_names(chunk: Chunk) -> Chunk:
    return replace(chunk, tensors={"x": torch.zeros(3)})


def half_a_tile(chunk: Chunk) -> Chunk:
    return replace(chunk, layout="tiled")


ODDITIES = ["raises", "nothing", "cancelled", other_format, other_place, other_names, half_a_tile]


@pytest.mark.parametrize("gives", ODDITIES, ids=lambda gives: getattr(gives, "__name__", gives))
def test_what_is_damaged_or_gone_is_computed(gives: Any) -> None:
    store = Odd(RamStore(2**24))
    engine = shelved_engine(store)
    answer(engine, PROMPT)
    idle(engine)
    assert engine.memory.shelf is not None
    engine.memory.shelf._scanner.drain(10)
    store.gives = gives
    again = shelved_engine(store)
    assert answer(again, [*PROMPT, 5]).cached_tokens == 0
    assert again.pool.used_bytes == 3 * again.pool.block_bytes


def test_a_store_that_hangs_is_waited_for_a_while_and_by_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shelf_module, "LOADING_S", 0.3)
    store = Odd(RamStore(2**24))
    engine = shelved_engine(store)
    answer(engine, PROMPT)
    idle(engine)
    shelf = engine.memory.shelf
    assert shelf is not None
    shelf._scanner.drain(10)
    again = shelved_engine(store)
    waits = again.submit([*PROMPT, 5], greedy(1))
    others = [again.submit(BOOKS[1][:9], greedy(1)) for _ in range(2)]
    ended: list[str] = []
    while again.has_work:
        ended += [event.request_id for event in again.step()]
    assert ended == [*others, waits]
    again.memory.check()


def test_hanging_reads_are_skipped_until_they_end() -> None:
    engine = shelved_engine(store := Odd(RamStore(2**24)))
    shelf = engine.memory.shelf
    assert shelf is not None
    running: Future[Any] = Future()
    running.set_running_or_notify_cancel()
    waiting: Future[Any] = Future()
    nothing: Any = None
    steps = [Step(nothing, 40), Step(nothing, 9)]
    shelf.take(Loading(steps, [running, waiting], 0.0)).close()
    assert waiting.cancelled()
    assert (shelf.counts["missed"], shelf.counts["missed_tokens"]) == (1, 49)
    store.gives = lambda chunk: chunk
    for _ in range(2):
        assert shelf.look(PROMPT, 0, ANYBODY) is None
    assert shelf.counts["skipped"] == 2
    running.set_result(None)
    shelf.look(PROMPT, 0, ANYBODY)
    assert shelf.counts["skipped"] == 2


class Slow(FileBucket):
    """A bucket that says what it has when it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = str(folder)
        self.asked = 0
        self.may_answer = threading.Event()

    def records(self, place: str | None) -> list[bytes]:
        self.asked += 1
        assert self.may_answer.wait(20)
        return super().records(place)


def far_store(bucket: Slow, near: list[int] | None = None) -> TieredStore:
    """A store with a prompt in a far place, and another one near; the far place does not answer."""
    far = RemoteStore(FileBucket(bucket.folder))
    for prompt, tiers in ((PROMPT, (None, far)), (near, (None, None))):
        store = TieredStore(RamStore(2**24), *tiers)
        engine = shelved_engine(store)
        if prompt is not None:
            answer(engine, prompt)
        idle(engine)
        assert engine.memory.shelf is not None
        engine.memory.shelf._scanner.drain(10)
        store.flush()
    ram: Any = store._ram
    return TieredStore(ram, None, RemoteStore(bucket, timeout_s=30))


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Slow]:
    bucket = Slow(tmp_path)
    yield bucket
    bucket.may_answer.set()


def test_a_far_place_that_takes_time_holds_up_those_only_whom_it_may_help(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf_module, "LOOKING_S", 60.0)
    engine = shelved_engine(far_store(slow))
    waits = engine.submit([*PROMPT, 5], greedy(1))
    other = engine.submit(BOOKS[1][:9], greedy(20, ignore_eos=True))
    events: list[Any] = []
    while not events or events[-1].usage is None:
        events += engine.step()
    assert {event.request_id for event in events} == {other}
    slow.may_answer.set()
    while engine.has_work:
        events += engine.step()
    assert events[-1].request_id == waits
    assert events[-1].usage.cached_tokens >= 150
    engine.close()


def test_what_is_near_is_used_while_a_far_place_hangs(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf_module, "LOOKING_S", 0.1)
    engine = shelved_engine(far_store(slow, near=MORE))
    shelf = engine.memory.shelf
    assert shelf is not None
    assert answer(engine, [*MORE, *PROMPT[:60]]).cached_tokens >= 100
    assert slow.asked == 1
    assert answer(engine, [*PROMPT, 5]).cached_tokens == 0
    assert (slow.asked, shelf.counts["skipped"]) == (1, 1)
    slow.may_answer.set()
    assert shelf._late_look is not None
    shelf._late_look.result(10)
    monkeypatch.setattr(shelf_module, "LOOKING_S", 60.0)
    assert engine.memory.tree is not None
    engine.memory.tree.clear()
    assert answer(engine, [*PROMPT, 5]).cached_tokens >= 150
    engine.close()


def test_a_far_place_is_asked_only_where_it_could_save_much(slow: Slow) -> None:
    engine = shelved_engine(far_store(slow, near=MORE))
    answer(engine, BOOKS[2][:30])
    assert answer(engine, [*MORE, 5]).cached_tokens >= 100
    assert answer(engine, [*MORE, 5, 6, 7]).cached_tokens >= 100
    assert slow.asked == 0
    engine.idle._waiting.clear()
    engine.close()


@pytest.mark.parametrize("blocks", [3, 4, 6])
def test_a_pool_too_small_for_what_is_stored_computes(blocks: int) -> None:
    store = open_store()
    engine = shelved_engine(store, blocks=8)
    answer(engine, PROMPT)
    idle(engine)
    assert engine.memory.shelf is not None
    engine.memory.shelf._scanner.drain(10)
    again = shelved_engine(store, blocks=blocks)
    answer(again, BOOKS[2][:100])
    answer(again, [*PROMPT, 5])


def test_what_waits_to_be_stored_keeps_no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_module, "MAX_WAITING", 3)
    engine = shelved_engine(open_store(), blocks=6)
    used = engine.pool.used_bytes
    for number in range(5):
        answer(engine, [number + 1, *BOOKS[1][:150]])
        assert not engine.memory.idle
    assert engine.memory.tree is not None
    engine.memory.tree.clear()
    assert engine.pool.used_bytes == used
    idle(engine)
    assert engine.memory.shelf is not None
    assert engine.memory.shelf.counts["kept_tokens"] == 0
    engine.memory.check()


LAYERS = (LayerSpec(0, 2, 1, 8, 8, None), LayerSpec(1, 2, 2, 8, 8, None))


@pytest.mark.parametrize("layouts", [("plain", "plain"), ("tiled", "tiled"), ("tiled", "plain")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_kv_of_every_format_comes_back_bit_for_bit(
    tmp_path: Path, dtype: Any, layouts: Any
) -> None:
    def engine_of(layout: Any) -> Engine:
        runner = FakeRunner()
        runner.spec = replace(runner.spec, layers=LAYERS)
        config = EngineConfig(kv_memory_bytes=2**20)
        engine = Engine(runner, TextDecoder.probe(TOKENIZER), config, b"x", dtype, layout)
        give_shelf(engine, open_store(tmp_path), b"x")
        return engine

    first = engine_of(layouts[0])
    doc = KVDoc(first.pool, first.memory.root)
    for part in (PROMPT[:70], PROMPT[70:150]):
        slots = torch.from_numpy(doc.append(part))
        for layer, spec in enumerate(LAYERS):
            shape = (spec.kv_heads, len(part), 8)
            first.pool.write(layer, slots, torch.randn(shape), torch.randn(shape))
        doc.close_tail()
    first.memory.publish(doc, ANYBODY)
    first.idle.put_by(PROMPT, ANYBODY)
    wanted = carried_out(first.pool, doc.spans)
    first.close()
    again = engine_of(layouts[1])
    shelf = again.memory.shelf
    assert shelf is not None
    loading = shelf.look(PROMPT, 0, ANYBODY)
    assert isinstance(loading, Loading)
    loading.wait(10)
    found = shelf.take(loading)
    assert (found.tokens, found.exact_length()) == (PROMPT, 150)
    came = carried_out(again.pool, found.spans)
    for layer in range(2):
        for ours, theirs in zip(came.rows(layer, 0, 150), wanted.rows(layer, 0, 150), strict=True):
            assert torch.equal(ours, theirs)
    assert isinstance(again.pool, Pool)
    again.close()


def test_closing_takes_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_module, "CLOSE_S", 0.0)
    engine = shelved_engine(open_store())
    answer(engine, PROMPT)
    assert engine.idle.has_work
    engine.close()
    assert not engine.idle.has_work
    shelf = engine.memory.shelf
    assert shelf is not None
    assert shelf.counts["kept_tokens"] == 0
