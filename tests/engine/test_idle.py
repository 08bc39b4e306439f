"""Idle work is bounded, and nothing depends on it."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from kvloom.engine import idle as idle_module
from kvloom.engine.idle import IdleWork
from kvloom.kv.doc import KVDoc
from kvloom.store.key import ANYBODY
from tests.engine.worlds import BOOKS, fake_engine, greedy


class FakeShelf(SimpleNamespace):
    """Notes what it is given; fails for one tenant."""

    def __init__(self) -> None:
        super().__init__(counts=Counter(), kept=[], closed=False)

    def keep(self, doc: KVDoc, tenant: str) -> None:
        if tenant == "broken":
            raise OSError("disk full")
        self.kept.append((doc.tokens, tenant))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def work() -> tuple[IdleWork, Any]:
    engine = fake_engine()
    shelf: Any = FakeShelf()
    engine.memory.shelf = shelf
    doc = engine.new_document()
    doc.append(BOOKS[0][:100])
    for tenant in ("a", "broken"):
        engine.memory.publish(doc, tenant)
    engine.release(doc)
    return engine.idle, shelf


def test_what_is_known_is_stored_as_far_as_it_is_known(work: tuple[IdleWork, Any]) -> None:
    idle, shelf = work
    idle.put_by([*BOOKS[0][:100], 5], "a")
    idle.put_by(BOOKS[0][:100], "b")
    idle.put_by(BOOKS[0][:70], "broken")
    while idle.has_work:
        idle.step()
    assert shelf.kept == [(BOOKS[0][:100], "a"), ([], "b")]
    assert shelf.counts["dropped"] == 1
    idle._memory.check()


def test_the_oldest_go_when_too_many_wait(work: tuple[IdleWork, Any]) -> None:
    idle, shelf = work
    for number in range(idle_module.MAX_WAITING + 2):
        idle.put_by(BOOKS[0][: 1 + number % 90], "a")
    assert shelf.counts["dropped"] == 2
    idle.close()
    assert shelf.kept[0] == (BOOKS[0][:3], "a")
    assert shelf.closed
    assert not idle.has_work


def test_documents_wait_for_a_quiet_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(idle_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    engine = fake_engine(repair_when_idle=True)
    doc = engine.new_document()
    doc.append(BOOKS[0][:60])
    doc.close_tail()
    idle = engine.idle
    engine.repair_when_idle(doc, ANYBODY)
    assert idle.begins_in_s is None, "there is nothing to repair"
    moved = engine.new_document()
    moved.extend([doc.spans[0].sub(1, 60).at(0)])
    engine.repair_when_idle(moved, ANYBODY)
    assert (idle.begins_in_s, engine.is_busy) == (idle_module.QUIET_S, False)
    clock.now += idle_module.QUIET_S / 2
    engine.submit(BOOKS[1][:10], greedy(1))
    while engine.has_work:
        engine.step()
    assert idle.begins_in_s == idle_module.QUIET_S
    clock.now += 1
    assert engine.is_busy
    engine.step_idle()
    assert idle.begins_in_s is None
    assert moved.exact_length() == 59
    engine.repair_when_idle(moved, ANYBODY)
    engine.abandon(moved)
    clock.now += 1
    engine.step_idle()
    assert not engine.is_busy


@pytest.mark.parametrize("without", ["shelf", "prefixes"])
def test_there_is_nothing_to_do_without(without: str) -> None:
    engine = fake_engine(enable_prefix_caching=without != "prefixes")
    engine.memory.shelf = None if without == "shelf" else FakeShelf()  # type: ignore[assignment]
    engine.idle.put_by(BOOKS[0][:3], "")
    assert not engine.idle.has_work
    engine.close()
