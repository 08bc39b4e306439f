"""What every tier must do: give back what it took bit by bit, or nothing, and count honestly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvloom.store.disk import DiskStore
from kvloom.store.key import hash_tenant, hash_tokens
from kvloom.store.ram import RamStore
from kvloom.store.remote import FileBucket, RedisBucket, RemoteStore
from kvloom.store.tiered import TieredStore
from tests.store.chunks import ROOT, assert_same, make_chunk, place_of

BUDGET = 2**20
NO_KEY = make_chunk([9, 9, 9]).key


class Flushed(TieredStore):
    """A tiered store that has written below when `put` returns."""

    def put(self, chunk, *, secret=False):
        taken = super().put(chunk, secret=secret)
        assert self.flush()
        return taken

    def get(self, key):
        chunk = super().get(key)
        assert self.flush()
        return chunk


def make_store(kind: str, folder: Path, request: pytest.FixtureRequest):
    match kind:
        case "ram":
            return RamStore(BUDGET)
        case "disk":
            return DiskStore(folder / "disk", BUDGET)
        case "folder":
            return RemoteStore(FileBucket(str(folder / "remote")))
        case "memory":
            return RemoteStore(FileBucket(f"memory://{folder}"))
        case "redis":
            url = request.getfixturevalue("redis_url")
            bucket = RedisBucket(url)
            bucket._redis.flushall()
            return RemoteStore(bucket)
    remote = RemoteStore(FileBucket(str(folder / "remote")))
    return Flushed(RamStore(BUDGET), DiskStore(folder / "disk", BUDGET), remote)


KINDS = ["ram", "disk", "folder", "memory", pytest.param("redis", marks=pytest.mark.redis)]
KINDS += ["tiered"]


@pytest.fixture(params=KINDS)
def store(request, tmp_path) -> Iterator:
    found = make_store(request.param, tmp_path, request)
    yield found
    found.close()


def test_what_was_put_comes_back(store):
    chunk = make_chunk(
        list(range(100)),
        layout="tiled",
        num_slots=128,
        dtype="int8",
        base=17,
        tensors={
            "0.k": torch.randint(-128, 127, (2, 128, 8), dtype=torch.int8),
            "0.k_scale": torch.rand(2, 128, dtype=torch.bfloat16),
            "empty": torch.empty(0, 3),
        },
        statistics={"inter": torch.rand(100), "none": torch.empty(0)},
        facts={"ä": [1, 2.5, None, "x"]},
    )
    assert store.get(chunk.key) is None
    assert not store.has(chunk.name)
    assert store.put(chunk)
    assert store.has(chunk.name)
    assert_same(store.get(chunk.key), chunk)
    assert_same(store.get(chunk.key), chunk)


def test_any_other_key_is_a_miss(store):
    tokens = [1, 2, 3]
    token_hash = hash_tokens(tokens)
    places = [
        place_of(),
        place_of(None),
        place_of(ROOT.extend([5])),
        place_of(fingerprint=b"g" * 32),
        place_of(recipe="int8"),
        place_of(tenant=hash_tenant("bob")),
    ]
    origins = [ROOT, ROOT, ROOT.extend([5]), ROOT, ROOT, ROOT]
    keys = [place.key(token_hash) for place in places]
    for stored, origin in zip(keys, origins, strict=True):
        chunk = make_chunk(tokens, origin, key=stored)
        assert store.put(chunk)
        for key in keys:
            found = store.get(key)
            assert (found is not None) == (key == stored)
            (*continuing,) = store.continuations(key.place)
            assert [c.key for c in continuing] == ([key] if key == stored else [])
        assert_same(store.get(stored), chunk)
        assert store.delete(stored.name)


def test_deleted_chunks_are_gone_but_stay_valid_for_who_has_them(store):
    chunk = make_chunk([1, 2, 3])
    store.put(chunk)
    held = store.get(chunk.key)
    assert store.delete(chunk.name)
    assert not store.delete(chunk.name)
    assert not store.has(chunk.name)
    assert store.get(chunk.key) is None
    assert not store.entries()
    assert not store.continuations(chunk.key.place)
    assert_same(held, chunk)
    assert store.put(chunk)
    assert_same(store.get(chunk.key), chunk)


def test_putting_twice_keeps_one(store):
    chunk = make_chunk([1, 2, 3])
    assert store.put(chunk)
    assert store.put(make_chunk([1, 2, 3]))
    assert len(store.entries()) == 1


def test_the_catalogue(store):
    chunks = [make_chunk(tokens) for tokens in ([1], [1, 2], [2, 1])]
    for chunk in chunks:
        store.put(chunk)
    entries = {entry.key: entry for entry in store.entries()}
    assert entries.keys() == {chunk.key for chunk in chunks}
    for chunk in chunks:
        entry = entries[chunk.key]
        assert entry.num_tokens == len(chunk.tokens)
        assert entry.nbytes >= chunk.nbytes
        assert entry.hits == 0
        assert not entry.pinned
        assert set(entry.tiers) <= {"ram", "disk", "remote"}
    store.get(chunks[0].key)
    hits = {entry.key: entry.hits for entry in store.entries()}
    # Remote places do not count uses.
    assert hits[chunks[0].key] == (0 if store.name == "remote" else 1)
    assert hits[chunks[1].key] == 0


def test_continuations_cost_and_change_nothing(store):
    one, two = make_chunk([1, 2, 3]), make_chunk([4, 2])
    behind = make_chunk([7], ROOT.extend([1, 2, 3]))
    for chunk in (one, two, behind):
        store.put(chunk)
    before = store.statistics()
    found = {c.key: c.tokens.tolist() for c in store.continuations(place_of())}
    assert found == {one.key: [1, 2, 3], two.key: [4, 2]}
    assert [c.key for c in store.continuations(place_of(), 4)] == [two.key]
    assert not store.continuations(place_of(), 2)
    (last,) = store.continuations(place_of(ROOT.extend([1, 2, 3])))
    assert last.key == behind.key
    assert not store.continuations(place_of(ROOT.extend([1, 2])))
    assert store.has(one.name)
    assert store.statistics() == before
    assert all(entry.hits == 0 for entry in store.entries())


def test_what_is_no_name_is_not_there(store, tmp_path):
    (tmp_path / "secret.safetensors").write_text("x")
    for name in ("", "..", "../secret", str(tmp_path / "secret"), "*", "0" * 63, "\0"):
        assert not store.has(name)
        assert not store.delete(name)
        assert not store.pin(name)
    assert (tmp_path / "secret.safetensors").exists()


def test_pins(store):
    chunk = make_chunk([1, 2])
    assert not store.pin(chunk.name)
    store.put(chunk)
    if store.pin(chunk.name):
        assert [entry.pinned for entry in store.entries()] == [True]
        assert store.pin(chunk.name, pinned=False)
    assert [entry.pinned for entry in store.entries()] == [False]


def test_counters(store):
    chunk = make_chunk([1, 2])
    store.put(chunk)
    store.get(chunk.key)
    store.get(NO_KEY)
    found = store.statistics()
    tiers = found.tiers.values() if store.name == "tiered" else [found]
    assert sum(tier.hits for tier in tiers) == 1
    assert all(tier.stored == 1 for tier in tiers)
    assert all(tier.misses == 1 for tier in tiers)
    assert not any(tier.errors + tier.corrupt + tier.refused + tier.skipped for tier in tiers)
