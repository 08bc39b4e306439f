"""Upkeep: what is checked, thrown away, carried out and in, and what is left alone."""

from __future__ import annotations

import io
import random
import tarfile
from contextlib import suppress

import pytest

from kvloom.errors import StoreError
from kvloom.store import files, serde
from kvloom.store.disk import DiskStore
from kvloom.store.upkeep import (
    collect_garbage,
    export_chunks,
    find_names,
    import_chunks,
    verify,
)
from tests.store.chunks import assert_same, make_chunk
from tests.store.damage import DAMAGES, flip_bits

CHUNKS = [make_chunk([index, 1]) for index in range(4)]
NAMES = sorted(chunk.name for chunk in CHUNKS)


@pytest.fixture
def store(tmp_path):
    found = DiskStore(tmp_path / "store")
    for chunk in CHUNKS:
        found.put(chunk)
    yield found
    found.close()


@pytest.fixture(params=["folder", "file.tar"])
def target(request, tmp_path):
    return tmp_path / request.param


def damage(store: DiskStore, chunk) -> None:
    path = store.path(chunk.name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_verify_tells_damage_and_changes_nothing(store):
    damage(store, CHUNKS[0])
    before = files.stored_files(store.folder)
    report = verify(store)
    assert sorted(report.done) == [name for name in NAMES if name != CHUNKS[0].name]
    assert report.failed == ((CHUNKS[0].name, "its checksum differs"),)
    assert files.stored_files(store.folder) == before


@pytest.mark.parametrize("how", DAMAGES, ids=lambda how: how.__name__)
def test_after_garbage_collection_all_is_well(store, how):
    how(store.folder, random.Random(3))
    report = collect_garbage(store)
    # What stays is told, such as another version or a folder in place of a file.
    assert verify(store).failed == report.failed
    assert bool(report.failed) == (how.__name__ == "replace_file")
    for chunk in CHUNKS:
        found = store.get(chunk.key)
        assert found is None or assert_same(found, chunk) is None


def test_garbage_is_collected_and_all_else_is_left_alone(store, tmp_path, monkeypatch):
    damage(store, CHUNKS[0])
    orphan = store.folder / f"{files.PREFIX}x{files.PARTIAL}"
    other = store.folder / "model.safetensors"
    for path in (orphan, other):
        path.write_bytes(b"x")
    monkeypatch.setattr(serde, "FORMAT_VERSION", 2)
    foreign = make_chunk([9])
    store.put(foreign)
    monkeypatch.undo()
    report = collect_garbage(store)
    assert sorted(report.done) == sorted([orphan.name, CHUNKS[0].name])
    assert [name for name, _ in report.failed] == [foreign.name]
    assert other.exists()
    assert store.path(foreign.name).exists()
    assert len(store.entries()) == 4  # the foreign one was entered when it was put


def test_the_budget_is_kept(store):
    small = DiskStore(store.folder, 2 * sum(files.stored_files(store.folder).values()) // 4)
    assert len(collect_garbage(small).done) == 2
    assert len(files.stored_files(store.folder)) == 2
    small.close()


def test_chunks_are_carried_from_store_to_store(store, target, tmp_path):
    assert export_chunks(store, target).done == tuple(NAMES)
    other = DiskStore(tmp_path / "other")
    assert sorted(import_chunks(other, target).done) == NAMES
    assert sorted(import_chunks(other, target).done) == NAMES
    for chunk in CHUNKS:
        assert_same(other.get(chunk.key), chunk)
    other.close()


def test_some_chunks_and_damaged_ones(store, target):
    damage(store, CHUNKS[0])
    report = export_chunks(store, target, [CHUNKS[0].name, CHUNKS[1].name, "0" * 64, "../x"])
    assert report.done == (CHUNKS[1].name,)
    assert {name for name, _ in report.failed} == {CHUNKS[0].name, "0" * 64, "../x"}


def test_what_is_damaged_on_the_way_is_not_taken(store, target, tmp_path):
    export_chunks(store, target)
    if target.is_dir():
        flip_bits(target, random.Random(1))
    else:
        data = target.read_bytes()
        at = data.index(b"kvloom") + 3
        target.write_bytes(data[:at] + b"X" + data[at + 1 :])
    other = DiskStore(tmp_path / "other")
    report = import_chunks(other, target)
    assert (len(report.done), len(report.failed)) == (3, 1)
    assert len(other.entries()) == 3
    other.close()


def test_names_in_an_archive_are_no_paths(store, tmp_path):
    target = tmp_path / "evil.tar"
    data = bytes(store.read_bytes(CHUNKS[0].name))
    with tarfile.open(target, "w") as archive:
        for name in ("../../evil.safetensors", "/evil.safetensors", "x.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.safetensors")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    other = DiskStore(tmp_path / "other")
    assert set(import_chunks(other, target).done) == {CHUNKS[0].name}
    assert files.stored_files(other.folder).keys() == {CHUNKS[0].name}
    assert not (tmp_path.parent / "evil.safetensors").exists()
    other.close()


def test_sources_and_targets_that_are_none_are_said(store, tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 2000)
    with pytest.raises(StoreError, match="cannot be read"):
        import_chunks(store, tmp_path / "none.tar")
    with pytest.raises(StoreError, match="cannot be read"):
        import_chunks(store, tmp_path / "file")
    for target in (tmp_path / "file" / "x", tmp_path / "file" / "x.tar"):
        with pytest.raises(StoreError, match="cannot be written"):
            export_chunks(store, target)


def test_a_cut_archive_gives_what_is_whole(store, tmp_path):
    target = tmp_path / "x.tar"
    export_chunks(store, target)
    data = target.read_bytes()
    for cut in range(600, len(data), 977):
        target.write_bytes(data[:cut])
        other = DiskStore(tmp_path / "other")
        with suppress(StoreError):
            import_chunks(other, target)
        assert not verify(other).failed
        other.close()


def test_an_import_that_does_not_fit_says_so(store, target, tmp_path):
    export_chunks(store, target)
    other = DiskStore(tmp_path / "other", 100)
    report = import_chunks(other, target)
    assert not report.done
    assert "takes no chunk" in report.failed[0][1]
    other.close()


def test_beginnings_of_names(store):
    assert find_names(store, NAMES[0][:8]) == [NAMES[0]]
    assert find_names(store, "") == NAMES
    assert find_names(store, "x") == []
