"""The remote tier: shared, and never in the way when it is damaged, slow or gone."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from threading import Event

import pytest

from kvloom.errors import StoreError
from kvloom.store.breaker import MAX_FAILURES
from kvloom.store.remote import FileBucket, RedisBucket, RemoteStore, open_remote
from tests.store.chunks import assert_same, make_chunk

CHUNK = make_chunk([1, 2, 3])
OTHER = make_chunk([1, 2, 4])


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "remote"


def test_two_stores_share_a_place(folder):
    one, two = open_remote(str(folder)), open_remote(f"file://{folder}")
    one.put(CHUNK)
    assert_same(two.get(CHUNK.key), CHUNK)
    assert [c.key for c in two.continuations(CHUNK.key.place, 1)] == [CHUNK.key]
    two.delete(CHUNK.name)
    assert one.get(CHUNK.key) is None
    assert one.put(CHUNK)
    assert not [path for path in folder.rglob("*") if "partial" in path.name]


def test_damaged_bytes_are_a_miss_and_removed(folder):
    store = open_remote(str(folder))
    store.put(CHUNK)
    store.put(OTHER)
    (mine,) = folder.rglob(f"{CHUNK.name}.safetensors")
    (theirs,) = folder.rglob(f"{OTHER.name}.safetensors")
    good = mine.read_bytes()
    for bad in (good[:-1], good + b"x", good.replace(b"plain", b"tiled"), b"", theirs.read_bytes()):
        mine.write_bytes(bad)
        assert store.get(CHUNK.key) is None
        assert not store.has(CHUNK.name)
        store.put(CHUNK)
    assert store.statistics().corrupt == 5
    assert_same(store.get(CHUNK.key), CHUNK)


def test_damaged_records_find_nothing(folder):
    store = open_remote(str(folder))
    store.put(CHUNK)
    (record,) = folder.rglob(f"{CHUNK.name}.json")
    content = json.loads(record.read_text())
    bad: list[object] = ["", "{", "[]", "null", *(content | {name: 1} for name in content)]
    bad += [{k: v for k, v in content.items() if k != name} for name in content]
    bad += [content | {"tokens": text} for text in ("", "AAAA", "?", "AQAAAAAAAAA=")]
    for each in bad:
        record.write_text(each if isinstance(each, str) else json.dumps(each))
        assert all(e.key == CHUNK.key for e in store.entries())
        for found in store.continuations(CHUNK.key.place):
            assert found.tokens.tolist() == [1, 2, 3]
    assert_same(store.get(CHUNK.key), CHUNK)


class Broken:
    """A bucket of which every method fails in one way."""

    def __init__(self, action) -> None:
        self.action = action

    def load(self, name):
        return self.action()

    def has(self, name):
        return self.action()

    remove = records = has

    def save(self, *_):
        self.action()


def use_all(store: RemoteStore) -> None:
    for _ in range(3):
        assert store.get(CHUNK.key) is None
        assert not store.put(CHUNK)
        assert not store.has(CHUNK.name)
        assert not store.delete(CHUNK.name)
        assert not store.entries()
        assert not store.continuations(CHUNK.key.place)


def test_a_bucket_that_fails_is_tried_seldom():
    def fail():
        raise RuntimeError("whatever a client raises")

    store = RemoteStore(Broken(fail), pause_s=1000)
    use_all(store)
    found = store.statistics()
    assert found.errors == MAX_FAILURES
    assert found.skipped > 10
    assert found.misses == found.refused == 3


def test_a_bucket_that_hangs_is_waited_for_once():
    gate = Event()
    store = RemoteStore(Broken(lambda: gate.wait(60)), timeout_s=0.05, pause_s=1000)
    use_all(store)
    gate.set()
    assert store.statistics().errors == 1


def test_what_cannot_be_stored_is_refused(folder):
    store = open_remote(str(folder))
    assert not store.put(make_chunk([1], facts={"x": object()}))
    assert store.statistics().refused == 1


def test_addresses_that_name_nothing_are_said():
    for url in ("nosuchthing://x", "redis://host:port"):
        with pytest.raises(StoreError, match="remote store"):
            open_remote(url)


def test_a_read_only_place_is_a_refusal(tmp_path):
    (tmp_path / "file").touch()
    store = open_remote(str(tmp_path / "file" / "remote"))
    assert not store.put(CHUNK)
    assert store.get(CHUNK.key) is None


def test_a_folder_that_vanishes_is_a_miss(folder):
    store = RemoteStore(FileBucket(str(folder)))
    store.put(CHUNK)
    shutil.rmtree(folder)
    assert store.get(CHUNK.key) is None
    assert store.statistics().errors == 0


@pytest.mark.redis
def test_a_redis_server_that_dies_is_a_miss(tmp_path):
    socket = tmp_path / "socket"
    command = ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", ""]
    server = subprocess.Popen([*command, "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
    try:
        store = open_remote(f"unix://{socket}", pause_s=1000)
        deadline = time.monotonic() + 20
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert store.put(CHUNK)
        assert_same(store.get(CHUNK.key), CHUNK)
    finally:
        server.kill()
        server.wait()
    use_all(store)
    assert store.statistics().errors == MAX_FAILURES
    assert store.statistics().skipped > 5


@pytest.mark.redis
def test_chunks_that_redis_let_go_are_a_miss(redis_url):
    bucket = RedisBucket(redis_url)
    bucket._redis.flushall()
    store = RemoteStore(bucket)
    store.put(CHUNK)
    for key in bucket._redis.keys("*chunk*"):
        bucket._redis.delete(key)
    assert len(store.continuations(CHUNK.key.place)) == 1
    assert store.get(CHUNK.key) is None
    assert store.put(CHUNK)
    assert_same(store.get(CHUNK.key), CHUNK)


@pytest.mark.redis
def test_other_data_in_redis_are_a_miss(redis_url):
    bucket = RedisBucket(redis_url)
    bucket._redis.flushall()
    store = RemoteStore(bucket)
    store.put(CHUNK)
    for key in bucket._redis.keys("*"):
        bucket._redis.delete(key)
        bucket._redis.set(key, b"something else")
    assert store.get(CHUNK.key) is None
    assert not store.continuations(CHUNK.key.place)
