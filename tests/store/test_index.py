"""The index: hints that may be lost or garbled, and never lie."""

from __future__ import annotations

import logging
import random
import sqlite3

import numpy as np
import pytest

from kvloom.store.index import Index, connect
from kvloom.store.tier import Tally
from tests.store.chunks import make_chunk, place_of

CHUNKS = [make_chunk([index, index + 1]) for index in range(5)]


@pytest.fixture
def tally():
    return Tally(logging.getLogger("test"))


def filled(path, tally) -> Index:
    index = Index(path, tally, "disk")
    for chunk in CHUNKS:
        index.add(chunk.key, chunk.tokens, 100, 5.0)
    return index


def test_two_see_the_same(tmp_path, tally):
    one = filled(tmp_path / "index", tally)
    two = Index(tmp_path / "index", tally, "disk")
    two.touch(CHUNKS[0].name, 7.0)
    two.pin(CHUNKS[1].name, pinned=True)
    two.remove([CHUNKS[2].name])
    entries = {entry.key: entry for entry in one.entries()}
    assert entries.keys() == {c.key for c in CHUNKS} - {CHUNKS[2].key}
    assert (entries[CHUNKS[0].key].hits, entries[CHUNKS[0].key].last_used) == (1, 7.0)
    assert entries[CHUNKS[1].key].pinned
    assert one.size() == (4, 400)
    one.close()
    two.close()


def test_entering_again_keeps_hits_and_corrects_the_size(tmp_path, tally):
    index = filled(tmp_path / "index", tally)
    index.touch(CHUNKS[0].name, 7.0)
    index.add(CHUNKS[0].key, CHUNKS[0].tokens, 200, 9.0)
    (entry,) = [entry for entry in index.entries() if entry.key == CHUNKS[0].key]
    assert (entry.hits, entry.nbytes, entry.created, entry.last_used) == (1, 200, 5.0, 7.0)


@pytest.mark.parametrize("column", ["tokens", "token_hash", "tenant", "context", "place", "nbytes"])
def test_garbled_rows_find_nothing(tmp_path, tally, column):
    index = filled(tmp_path / "index", tally)
    other = connect(tmp_path / "index")
    for value in (b"x" * 16, b"y" * 17, "text", 2**40):
        other.execute(f"UPDATE chunks SET {column} = ?", (value,))
        assert all(
            c.key in {chunk.key for chunk in CHUNKS}
            and np.array_equal(c.tokens, next(x.tokens for x in CHUNKS if x.key == c.key))
            for c in index.continuations(place_of(), None)
        )
        assert all(entry.key in {chunk.key for chunk in CHUNKS} for entry in index.entries())
    other.close()


def test_contradictions_are_cleaned_away(tmp_path, tally):
    index = filled(tmp_path / "index", tally)
    other = connect(tmp_path / "index")
    sound = {chunk.name for chunk in CHUNKS}
    changes = ("recipe = 'x'", "tokens = x'00'", "place = x'00'", "first_token = 77")
    for chunk, change in zip(CHUNKS, changes, strict=False):
        assert index.clean() == sound
        other.execute(f"UPDATE chunks SET {change} WHERE name = ?", (chunk.name,))
        sound.remove(chunk.name)
    assert index.clean() == sound == {CHUNKS[4].name}
    assert index.size() == (1, 100)
    other.close()


def test_a_damaged_file_is_made_anew(tmp_path, tally, caplog):
    for garbage in (b"garbage" * 1000, b"SQLite format 3\0" + bytes(5000), b"\0"):
        (tmp_path / "index").write_bytes(garbage)
        index = filled(tmp_path / "index", tally)
        assert len(index.entries()) == 5
        index.close()
    assert "made anew" in caplog.text
    assert tally.statistics().errors == 0


def test_random_bits_never_raise(tmp_path, tally):
    filled(tmp_path / "index", tally).close()
    good = (tmp_path / "index").read_bytes()
    chosen = random.Random(1)
    for _ in range(30):
        bad = bytearray(good)
        for _ in range(20):
            bad[chosen.randrange(len(bad))] ^= 1 << chosen.randrange(8)
        (tmp_path / "index").write_bytes(bad)
        index = Index(tmp_path / "index", tally, "disk")
        index.entries()
        index.size()
        index.clean()
        for found in index.continuations(place_of(), None):
            assert found.key in {chunk.key for chunk in CHUNKS}
        index.add(CHUNKS[0].key, CHUNKS[0].tokens, 100, 5.0)
        index.close()


@pytest.mark.parametrize("word", [b"last_used", b"first_token", b"CREATE TABLE", b"BLOB NOT NULL"])
def test_a_garbled_schema_is_made_anew(tmp_path, tally, word):
    for bad in (word.replace(b"a", b"\xc9"), word[:-1] + b"x", word.lower()):
        filled(tmp_path / "index", tally).close()
        data = (tmp_path / "index").read_bytes()
        (tmp_path / "index").write_bytes(data.replace(word, bad))
        index = filled(tmp_path / "index", tally)
        assert len(index.entries()) == 5
        index.close()
        again = Index(tmp_path / "index", tally, "disk")
        assert len(again.entries()) == 5, "it was not repaired"
        again.close()
    assert tally.statistics().errors == 0


def test_another_version_is_made_anew(tmp_path, tally):
    filled(tmp_path / "index", tally).close()
    other = sqlite3.connect(tmp_path / "index")
    other.execute("PRAGMA user_version = 99")
    other.close()
    index = Index(tmp_path / "index", tally, "disk")
    assert index.entries() == []
    index.close()


def test_an_index_that_is_busy_is_not_removed(tmp_path, tally, monkeypatch, caplog):
    monkeypatch.setattr("kvloom.store.index.BUSY_S", 0.05)
    index = filled(tmp_path / "index", tally)
    other = connect(tmp_path / "index")
    other.execute("BEGIN EXCLUSIVE")
    late = Index(tmp_path / "index", tally, "disk")
    assert late.entries() == []  # it is in memory
    index.touch(CHUNKS[0].name, 9.0)  # fails, and is counted
    other.execute("ROLLBACK")
    assert len(index.entries()) == 5
    assert tally.statistics().errors == 2
    assert "in memory" in caplog.text
    for each in (index, late):
        each.close()
    other.close()


def test_no_folder_is_no_error(tmp_path, tally):
    index = filled(tmp_path / "none" / "index", tally)
    assert len(index.entries()) == 5
    assert tally.statistics().errors == 1
    index.close()
    assert index.entries() == []  # closed: nothing, and no error that is raised


def test_a_truncated_file_is_made_anew(tmp_path, tally):
    filled(tmp_path / "index", tally).close()
    data = (tmp_path / "index").read_bytes()
    for cut in (1, 50, 100, 1000, 4096, 5000, 8192, len(data) - 1):
        (tmp_path / "index").write_bytes(data[:cut])
        index = filled(tmp_path / "index", tally)
        assert len(index.entries()) == 5
        index.close()
    assert tally.statistics().errors == 0
