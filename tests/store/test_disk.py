"""The tier on disk: kills, damage, other processes, full and closed disks."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kvloom.errors import StoreError
from kvloom.store import files, serde
from kvloom.store.disk import INDEX, DiskStore
from kvloom.store.serde import OtherVersionError, serialize
from tests.store.chunks import ROOT, assert_same, make_chunk
from tests.store.damage import DAMAGES

FORK = multiprocessing.get_context("fork")
CHUNKS = [make_chunk([*range(index + 1)], width=16) for index in range(6)]


@pytest.fixture
def store(tmp_path):
    found = DiskStore(tmp_path / "store")
    yield found
    found.close()


def refilled(folder: Path) -> DiskStore:
    store = DiskStore(folder)
    for chunk in CHUNKS:
        store.put(chunk)
    return store


def check(folder: Path, chunks=CHUNKS) -> int:
    """Open a store and use everything in it: each chunk is right or absent; return how many are."""
    store = DiskStore(folder)
    by_key = {chunk.key: chunk for chunk in chunks}
    for chunk in chunks:
        for found in store.continuations(chunk.key.place):
            assert np.array_equal(found.tokens, by_key[found.key].tokens)
    assert {entry.key for entry in store.entries()} <= by_key.keys()
    right = 0
    for chunk in chunks:
        found = store.get(chunk.key)
        if found is not None:
            assert_same(found, chunk)
            right += 1
    for name in files.stored_files(folder):
        store.delete(name)
    store.close()
    return right


def test_chunks_survive_a_restart_with_their_uses(tmp_path):
    store = refilled(tmp_path)
    store.get(CHUNKS[0].key)
    store.pin(CHUNKS[1].name)
    before = sorted(store.entries(), key=repr)
    store.close()
    again = DiskStore(tmp_path)
    assert sorted(again.entries(), key=repr) == before
    assert again.statistics().chunks == 6
    assert again.statistics().nbytes == sum(files.stored_files(tmp_path).values())
    again.close()
    assert check(tmp_path) == 6


def test_a_lost_index_is_made_from_the_files(tmp_path):
    refilled(tmp_path).close()
    (tmp_path / INDEX).unlink()
    store = DiskStore(tmp_path)
    assert {entry.key for entry in store.entries()} == {chunk.key for chunk in CHUNKS}
    assert len(store.continuations(CHUNKS[0].key.place)) == 6
    store.close()


def test_arrays_lie_in_the_file(store):
    chunk = make_chunk(list(range(1000)), width=64)
    store.put(chunk)
    found = store.get(chunk.key)
    maps = Path("/proc/self/maps").read_text().splitlines()
    (line,) = [line for line in maps if line.endswith(str(store.path(chunk.name)))]
    first, last = (int(end, 16) for end in line.split()[0].split("-"))
    for tensor in found.tensors.values():
        assert first <= tensor.data_ptr() < last
        assert tensor.data_ptr() % 64 == 0
        tensor.zero_()
    assert_same(store.get(chunk.key), chunk)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_a_miss(tmp_path, damage):
    for seed in range(3):
        refilled(tmp_path).close()
        damage(tmp_path, random.Random(seed))
        # What is in the index does not matter to who has a key.
        assert check(tmp_path) >= (6 if damage.__name__ == "harm_index" else 4)
        shutil.rmtree(tmp_path)


@pytest.mark.long
def test_2000_damages(tmp_path):
    good = tmp_path / "good"
    refilled(good).close()
    chosen = random.Random(20)
    survived = []
    for number in range(2000):
        folder = tmp_path / f"{number}"
        shutil.copytree(good, folder)
        for _ in range(chosen.choice([1, 1, 3])):
            if any(path.is_file() for path in folder.glob("*.safetensors")):
                try:
                    chosen.choice(DAMAGES)(folder, chosen)
                except (OSError, AssertionError, ValueError):  # the file is damaged too much for it
                    continue
        survived.append(check(folder))
        shutil.rmtree(folder)
    assert 3 < np.mean(survived) < 6


def test_damage_is_counted_said_and_removed(store, caplog):
    chunk = CHUNKS[0]
    store.put(chunk)
    path = store.path(chunk.name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert store.get(chunk.key) is None
    assert not path.exists()
    assert not store.entries()
    found = store.statistics()
    assert (found.corrupt, found.misses, found.hits, found.nbytes) == (1, 1, 0, 0)
    assert chunk.name in caplog.text
    assert store.put(chunk)
    assert_same(store.get(chunk.key), chunk)


def test_another_version_is_left_alone_until_it_is_replaced(store, monkeypatch, caplog):
    chunk = CHUNKS[0]
    monkeypatch.setattr(serde, "FORMAT_VERSION", 2)
    store.put(chunk)
    monkeypatch.undo()
    assert store.get(chunk.key) is None
    assert store.get(chunk.key) is None
    assert store.path(chunk.name).exists()
    assert caplog.text.count("format 2") == 1
    assert store.statistics().corrupt == 0
    with pytest.raises(OtherVersionError):
        store.read_bytes(chunk.name)
    assert store.put(chunk)
    assert_same(store.get(chunk.key), chunk)


def test_the_budget_holds_and_what_is_used_or_pinned_stays(tmp_path):
    now = [0.0]
    chunks = [make_chunk([index] * 4) for index in range(6)]
    budget = 4 * sum(map(len, serialize(chunks[0])))
    store = DiskStore(tmp_path, budget, clock=lambda: now[0])
    for chunk in chunks[:4]:
        assert store.put(chunk)
        now[0] += 1
    store.pin(chunks[0].name)
    store.get(chunks[1].key)
    now[0] += 10
    assert store.put(chunks[4])
    assert store.put(chunks[5])
    left = [chunks[index].name for index in (0, 1, 4, 5)]
    assert sorted(files.stored_files(tmp_path)) == sorted(left)
    assert sorted(entry.key.name for entry in store.entries()) == sorted(left)
    assert sum(files.stored_files(tmp_path).values()) == store.statistics().nbytes == budget
    assert not store.put(make_chunk(list(range(500)), width=64))
    assert (store.statistics().evicted, store.statistics().refused) == (2, 1)
    assert store.statistics().chunks == 4
    store.close()
    smaller = DiskStore(tmp_path, budget // 2)
    assert smaller.make_room()
    assert smaller.statistics().nbytes <= budget // 2
    assert chunks[0].name in files.stored_files(tmp_path)
    smaller.close()


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_full_disk_is_a_refusal(store, monkeypatch, caplog, call):
    store.put(CHUNKS[0])

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, call, fail)
    assert not store.put(CHUNKS[1])
    assert not store.put(CHUNKS[2])
    monkeypatch.undo()
    assert_same(store.get(CHUNKS[0].key), CHUNKS[0])
    assert store.get(CHUNKS[1].key) is None
    assert store.statistics().refused == store.statistics().errors == 2
    assert caplog.text.count("No space left") == 1
    assert store.put(CHUNKS[1])


def in_child(work, *arguments: object) -> int:
    """Run something in a process of its own and return its exit code."""
    process = FORK.Process(target=work, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def use_without_rights(folder: Path) -> None:
    if os.getuid() == 0:
        os.setuid(65534)
    store = DiskStore(folder / "store")
    chunk = make_chunk([1, 2, 3])
    assert store.get(CHUNKS[0].key) is None or (folder.stat().st_mode & 0o005) == 0o005
    assert not store.put(chunk)
    assert store.get(chunk.key) is None
    assert not store.delete(CHUNKS[0].name)
    assert not store.has("0" * 64)
    assert store.statistics().refused == 1
    assert store.statistics().errors
    store.close()


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_no_rights_are_no_errors(mode, tmp_path_factory):
    folder = Path("/tmp") / f"kvloom-test-{os.getpid()}-{mode}"  # others may reach it
    try:
        refilled(folder / "store").close()
        for path in (folder / "store").iterdir():
            path.chmod(0o444)
        (folder / "store").chmod(mode)
        folder.chmod(mode)
        assert in_child(use_without_rights, folder) == 0
    finally:
        folder.chmod(0o700)
        (folder / "store").chmod(0o700)
        shutil.rmtree(folder)


def test_a_read_only_folder_can_be_read(tmp_path_factory):
    folder = Path("/tmp") / f"kvloom-test-{os.getpid()}-read"

    def read() -> None:
        if os.getuid() == 0:
            os.setuid(65534)
        store = DiskStore(folder)
        assert len(store.entries()) == 6
        assert len(store.continuations(CHUNKS[0].key.place)) == 6
        assert_same(store.get(CHUNKS[0].key), CHUNKS[0])
        store.close()

    try:
        refilled(folder).close()
        for path in folder.iterdir():
            path.chmod(0o444)
        folder.chmod(0o555)
        assert in_child(read) == 0
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


def test_a_file_in_place_of_the_folder_is_no_error(tmp_path):
    (tmp_path / "store").touch()
    store = DiskStore(tmp_path / "store")
    assert not store.put(CHUNKS[0])
    assert store.get(CHUNKS[0].key) is None
    assert not store.entries()
    store.close()


def test_a_folder_that_vanishes_is_no_error(store):
    store.put(CHUNKS[0])
    shutil.rmtree(store.folder)
    assert store.get(CHUNKS[0].key) is None
    assert not store.put(CHUNKS[1])
    store.statistics()
    store.entries()


def test_the_folder_is_private(tmp_path, caplog):
    DiskStore(tmp_path / "a" / "b").close()
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir(mode=0o755)
    store = refilled(tmp_path / "open")
    assert "chmod it to 700" in caplog.text
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "open").iterdir()}
    assert {INDEX, f"{INDEX}-wal"} < modes.keys()
    assert set(modes.values()) == {0o600}
    store.close()


def test_raw_bytes_are_taken_only_if_intact(store):
    data = bytearray(b"".join(serialize(CHUNKS[0])))
    assert store.put_bytes(data) == CHUNKS[0].key
    assert store.put_bytes(data) == CHUNKS[0].key
    assert bytes(store.read_bytes(CHUNKS[0].name)) == data
    data[-1] ^= 1
    with pytest.raises(StoreError):
        store.put_bytes(data)
    with pytest.raises(StoreError):
        store.read_bytes("../x")
    with pytest.raises(StoreError):
        store.read_bytes("0" * 64)


def churn(folder: Path, seed: int, rounds: int | None) -> None:
    """Put, read and delete at random, and check what is read; until killed, or for some rounds."""
    chosen = random.Random(seed)
    store = DiskStore(folder)
    done = 0
    while rounds is None or done < rounds:
        chunk = chosen.choice(CHURNED)
        match chosen.randrange(4):
            case 0 | 1:
                store.put(chunk)
            case 2:
                store.delete(chunk.name)
            case 3:
                found = store.get(chunk.key)
                assert found is None or torch.equal(found.tensors["0.k"], chunk.tensors["0.k"])
        done += 1
    assert store.statistics().corrupt == 0
    store.close()


CHURNED = [make_chunk([index] * 50, ROOT.extend([index]), width=256) for index in range(8)]


def test_two_processes_write_delete_and_read_the_same_chunks(tmp_path):
    processes = [FORK.Process(target=churn, args=(tmp_path, seed, 150)) for seed in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    check(tmp_path, CHURNED)


def kill_at_random(folder: Path, chosen: random.Random) -> bool:
    """Kill a process that writes; say whether it left an unfinished file."""
    process = FORK.Process(target=churn, args=(folder, chosen.random(), None))
    process.start()
    time.sleep(chosen.uniform(0.01, 0.08))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    return any(path.name.endswith(files.PARTIAL) for path in folder.glob(".*"))


def kill_and_check(folder: Path, number: int) -> int:
    chosen = random.Random(number)
    unfinished = 0
    for _ in range(number):
        unfinished += kill_at_random(folder, chosen)
        store = DiskStore(folder)
        there = {entry.key.name for entry in store.entries()}
        assert there == files.stored_files(folder).keys()
        assert not any(path.name.endswith(files.PARTIAL) for path in folder.glob(".*"))
        for chunk in CHURNED:
            found = store.get(chunk.key)
            assert (found is not None) == (chunk.name in there)
            if found is not None:
                assert_same(found, chunk)
        assert store.statistics().corrupt == 0
        store.close()
    return unfinished


def test_kills(tmp_path):
    kill_and_check(tmp_path, 5)


@pytest.mark.long
def test_200_kills(tmp_path):
    assert kill_and_check(tmp_path, 200) > 5, "hardly a kill has hit a write"
