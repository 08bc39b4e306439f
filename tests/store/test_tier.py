"""Counters and complaints."""

from __future__ import annotations

import logging
from dataclasses import fields
from threading import Thread

from kvloom.store.tier import Tally, TierStatistics


def test_threads_lose_no_count():
    tally = Tally(logging.getLogger("test"))
    threads = [Thread(target=lambda: [tally.add("hits") for _ in range(500)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tally.statistics(chunks=3, nbytes=5) == TierStatistics(hits=2000, chunks=3, nbytes=5)


def test_every_counter_can_be_counted():
    tally = Tally(logging.getLogger("test"))
    names = [field.name for field in fields(TierStatistics)][:-2]
    for name in names:
        tally.add(name)
    assert tally.statistics() == TierStatistics(*[1] * len(names))


def test_complaints_come_once(caplog):
    tally = Tally(logging.getLogger("test"))
    for _ in range(3):
        tally.say_once("a", "first %d", 1)
        tally.say_once("b", "second")
    assert [record.getMessage() for record in caplog.records] == ["first 1", "second"]
