"""The whole store against a dictionary, and what its tiers do to each other."""

from __future__ import annotations

import random
import shutil
import tempfile
from contextlib import closing, suppress
from pathlib import Path
from threading import Event

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kvloom.store.disk import DiskStore
from kvloom.store.files import stored_files
from kvloom.store.prefix import find_prefix
from kvloom.store.ram import RamStore
from kvloom.store.remote import FileBucket, RemoteStore
from kvloom.store.tiered import TieredStore
from tests.store.chunks import ROOT, assert_same, make_chunk, place_of
from tests.store.damage import DAMAGES

CHUNKS = [make_chunk([index, *range(index)]) for index in range(5)]
BUDGET = 2**20


def tiers(folder: Path, budget: int = BUDGET) -> tuple[RamStore, DiskStore, RemoteStore]:
    remote = RemoteStore(FileBucket(str(folder / "remote")))
    return RamStore(budget), DiskStore(folder / "disk", budget), remote


def test_what_is_far_is_looked_for_apart(tmp_path: Path) -> None:
    ram, disk, remote = tiers(tmp_path)
    near, far = make_chunk([1, 2, 3]), make_chunk([4, 5, 6])
    disk.put(near)
    remote.put(far)
    with closing(TieredStore(ram, disk, remote)) as store:
        for chunk, found_near in ((near, True), (far, False)):
            place, tokens = chunk.key.place, chunk.tokens.tolist()
            assert bool(store.near.continuations(place, tokens[0])) == found_near
            assert [found.key for found in store.continuations(place, tokens[0])] == [chunk.key]
            looked = store.find_far(place.fingerprint, tokens, place.tenant)
            assert looked is not None
            assert looked.result(10) == find_prefix(store, place.fingerprint, tokens, place.tenant)
    assert store.find_far(near.key.fingerprint, [1], near.key.tenant) is None, "it is closed"
    assert TieredStore(RamStore(BUDGET), disk).find_far(b"x", [1], "") is None


class StoreMachine(RuleBasedStateMachine):
    """Everything that may happen to a store; `there` is what was put and not deleted since."""

    @initialize(with_remote=st.booleans(), budget=st.sampled_from([3000, 10_000, BUDGET]))
    def start(self, with_remote: bool, budget: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="kvloom-test-"))
        self.with_remote, self.budget = with_remote, budget
        self.there: dict[str, object] = {}
        self.harmed = False
        self.open()

    def open(self) -> None:
        self.ram, self.disk, remote = tiers(self.folder, self.budget)
        self.remote = remote if self.with_remote else None
        self.store = TieredStore(self.ram, self.disk, self.remote)

    @rule(chunk=st.sampled_from(CHUNKS))
    def put(self, chunk) -> None:
        self.store.put(chunk)
        self.there[chunk.name] = chunk

    @rule(chunk=st.sampled_from(CHUNKS))
    def get(self, chunk) -> None:
        found = self.store.get(chunk.key)
        if found is not None:
            assert chunk.name in self.there, "a deleted chunk came back"
            assert_same(found, chunk)
        elif self.budget == BUDGET and not self.harmed:
            assert chunk.name not in self.there

    @rule(chunk=st.sampled_from(CHUNKS))
    def delete(self, chunk) -> None:
        self.store.delete(chunk.name)
        self.there.pop(chunk.name, None)
        assert not self.store.has(chunk.name)

    @rule(chunk=st.sampled_from(CHUNKS), pinned=st.booleans())
    def pin(self, chunk, pinned: bool) -> None:
        self.store.pin(chunk.name, pinned=pinned)

    @rule(drop_ram=st.booleans())
    def restart(self, drop_ram: bool) -> None:
        if drop_ram:
            assert self.store.close()
            self.open()
        else:
            assert self.store.flush()

    @precondition(lambda self: stored_files(self.folder / "disk"))
    @rule(damage=st.sampled_from(DAMAGES), seed=st.integers(0, 1000))
    def damage(self, damage, seed: int) -> None:
        assert self.store.close()
        if stored_files(self.folder / "disk"):
            with suppress(OSError, ValueError, AssertionError, IndexError):  # damaged too much
                damage(self.folder / "disk", random.Random(seed))
            self.harmed = True
        self.open()

    @invariant()
    def nothing_else_is_listed(self) -> None:
        if not hasattr(self, "store"):
            return
        for found in self.store.continuations(CHUNKS[0].key.place):
            if self.store.flush():
                (chunk,) = [c for c in CHUNKS if c.key == found.key]
                assert found.tokens.tolist() == chunk.tokens.tolist()
                assert chunk.name in self.there
        assert self.ram.statistics().nbytes <= self.budget
        assert sum(stored_files(self.folder / "disk").values()) <= self.budget or self.harmed

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.folder)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


@pytest.mark.long
class TestStoreMachineLong(StoreMachine.TestCase):
    settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_reading_copies_up(tmp_path):
    ram, disk, remote = tiers(tmp_path)
    store = TieredStore(ram, disk, remote)
    chunk = CHUNKS[1]
    remote.put(chunk)
    assert_same(store.get(chunk.key), chunk)
    assert store.flush()
    assert disk.has(chunk.name)
    assert ram.has(chunk.name)
    assert store.tier_of(chunk.name) == "ram"
    (entry,) = store.entries()
    assert entry.tiers == ("ram", "disk", "remote")
    ram.delete(chunk.name)
    assert_same(store.get(chunk.key), chunk)
    assert store.flush()
    found = ram.get(chunk.key)
    # What lies in memory does not depend on the file any more.
    path = disk.path(chunk.name)
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(found, chunk)
    counted = store.statistics().tiers
    assert (counted["ram"].misses, counted["disk"].hits, counted["remote"].hits) == (2, 1, 1)
    store.close()


def test_nothing_is_copied_for_a_memory_that_is_too_small(tmp_path):
    _, disk, _ = tiers(tmp_path)
    disk.put(CHUNKS[1])
    store = TieredStore(RamStore(1), disk)
    assert_same(store.get(CHUNKS[1].key), CHUNKS[1])
    assert store.flush()
    assert store.statistics().tiers["ram"].refused == 0
    store.close()


def test_fetch_reads_on_another_thread(tmp_path):
    store = TieredStore(*tiers(tmp_path))
    store.put(CHUNKS[1])
    futures = [store.fetch(chunk.key) for chunk in CHUNKS[:3]]
    results = [future.result(10) for future in futures]
    assert results[0] is results[2] is None
    assert_same(results[1], CHUNKS[1])
    store.close()
    assert store.fetch(CHUNKS[1].key).result(10) is None


class SlowDisk(DiskStore):
    """Writes when it is told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate = Event()

    def put(self, chunk):
        self.gate.wait(20)
        return super().put(chunk)


def test_what_cannot_wait_is_dropped_and_counted(tmp_path, caplog):
    disk = SlowDisk(tmp_path)
    store = TieredStore(RamStore(BUDGET), disk, pending_bytes=CHUNKS[1].nbytes)
    for chunk in CHUNKS:
        assert store.put(chunk)  # in memory
    assert store.statistics().dropped == len(CHUNKS) - 1
    assert store.statistics().pending == 1
    assert caplog.text.count("too many wait") == 1
    assert not store.flush(0.01)
    disk.gate.set()
    assert store.flush()
    assert stored_files(tmp_path).keys() == {CHUNKS[0].name}
    store.close()


def test_closing_takes_bounded_time(tmp_path, caplog):
    disk = SlowDisk(tmp_path)
    store = TieredStore(RamStore(BUDGET), disk)
    store.put(CHUNKS[0])
    assert not store.close(0.05)
    assert "before all chunks were written" in caplog.text
    assert not store.delete(CHUNKS[0].name)
    store.put(CHUNKS[1])
    store.put(CHUNKS[2], secret=True)
    assert store.statistics().dropped == 1
    disk.gate.set()


def test_a_write_that_fails_in_an_unforeseen_way_is_said(tmp_path, caplog):
    class Broken(DiskStore):
        def put(self, chunk):
            raise RuntimeError("unforeseen")

    store = TieredStore(RamStore(BUDGET), Broken(tmp_path))
    store.put(CHUNKS[0])
    store.put(CHUNKS[1])
    assert store.flush()
    assert caplog.text.count("unforeseen") == 1
    assert_same(store.get(CHUNKS[0].key), CHUNKS[0])
    store.close()


def on_disk_or_remote(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")]


def test_secrets_and_what_attended_to_them_stay_in_memory(tmp_path):
    store = TieredStore(*tiers(tmp_path))
    secret = make_chunk(list(range(70)))
    behind = make_chunk([5], ROOT.extend(range(70)))
    far_behind = make_chunk([6], ROOT.extend(range(70)).extend([5]))
    behind_a_part = make_chunk([8], ROOT.extend(range(30)))
    beside = make_chunk([5], ROOT.extend([1]))
    assert store.put(secret, secret=True)
    for chunk in (behind, far_behind, behind_a_part):
        assert store.is_secret_context(chunk.key.context)
        assert store.put(chunk)
    assert store.flush()
    assert on_disk_or_remote(tmp_path) == []
    for chunk in (secret, behind, far_behind, behind_a_part):
        assert_same(store.get(chunk.key), chunk)
    assert store.flush()
    assert store.statistics().secret == 4
    assert not store.is_secret_context(place_of().context)
    assert not store.is_secret_context(None)
    store.put(beside)
    assert store.flush()
    assert {path.stem for path in on_disk_or_remote(tmp_path)} == {beside.name}
    text = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert secret.name.encode() not in text
    assert secret.key.token_hash not in text
    store.close()


@pytest.mark.parametrize("wait", [True, False])
def test_what_turns_out_to_be_secret_is_removed_below(tmp_path, wait):
    store = TieredStore(*tiers(tmp_path))
    store.put(CHUNKS[2])
    if wait:
        assert store.flush()
        assert len(on_disk_or_remote(tmp_path)) == 3
    store.put(CHUNKS[2], secret=True)
    store.put(CHUNKS[2])  # and it stays so
    assert store.flush()
    assert on_disk_or_remote(tmp_path) == []
    assert_same(store.get(CHUNKS[2].key), CHUNKS[2])
    store.close()


def test_what_was_kept_behind_a_late_secret_is_removed_as_well(tmp_path):
    store = TieredStore(*tiers(tmp_path))
    first, beside = make_chunk(list(range(70))), make_chunk([99])
    lineage = ROOT.extend(range(70))
    behind = make_chunk([5], lineage)
    far_behind = make_chunk([6], lineage.extend([5]))
    for chunk in (first, behind, far_behind, beside):
        store.put(chunk)
    assert store.flush()
    store.put(first, secret=True)
    assert store.flush()
    assert {path.stem for path in on_disk_or_remote(tmp_path)} == {beside.name}
    assert store.is_secret_context(far_behind.key.context)
    store.close()


def test_memory_alone_is_a_store():
    store = TieredStore(RamStore(100))
    assert not store.put(make_chunk(list(range(100))))
    assert not store.delete("0" * 64)
    assert store.close()
