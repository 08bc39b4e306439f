"""Digests of files, and when a remembered one is used."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvloom.model.digest import cache_root, cached_sha256, remember_sha256, sha256_file, write_json


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(b"some weights")
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=5000))
def test_equals_hashlib(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert sha256_file(path) == hashlib.sha256(content).hexdigest()


def test_reads_in_pieces_and_reports_them(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(9 * 2**20))
    calls: list[tuple[str, int, int]] = []
    digest = sha256_file(path, lambda *call: calls.append(call))
    assert digest == hashlib.sha256(bytes(9 * 2**20)).hexdigest()
    assert len(calls) > 1
    assert calls[-1][1:] == (9 * 2**20, 9 * 2**20)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


def test_an_unchanged_file_is_read_once(file: Path, tmp_path: Path) -> None:
    first = cached_sha256(file, tmp_path / "cache")
    reads: list[object] = []
    second = cached_sha256(file, tmp_path / "cache", lambda *call: reads.append(call))
    assert first == second == hashlib.sha256(b"some weights").hexdigest()
    assert not reads


def test_other_bytes_of_the_same_size_and_time_are_noticed(file: Path, tmp_path: Path) -> None:
    cached_sha256(file, tmp_path / "cache")
    stat = file.stat()
    file.write_bytes(b"evil weights")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cached_sha256(file, tmp_path / "cache") == hashlib.sha256(b"evil weights").hexdigest()


def test_a_noted_digest_is_used_until_the_file_changes(file: Path, tmp_path: Path) -> None:
    remember_sha256(file, "f" * 64, tmp_path / "cache")
    assert cached_sha256(file, tmp_path / "cache") == "f" * 64
    file.write_bytes(b"changed")
    assert cached_sha256(file, tmp_path / "cache") == hashlib.sha256(b"changed").hexdigest()


def test_another_file_of_the_same_size_has_its_own_record(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"more weights")
    assert cached_sha256(file, tmp_path / "cache") != cached_sha256(other, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"stamp": 1}', '{"sha256": 7}'])
def test_a_damaged_record_is_not_believed(file: Path, tmp_path: Path, damage: str) -> None:
    expected = cached_sha256(file, tmp_path / "cache")
    (record,) = (tmp_path / "cache" / "digests").iterdir()
    record.write_text(damage)
    assert cached_sha256(file, tmp_path / "cache") == expected


def test_works_without_a_usable_cache_folder(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    assert cached_sha256(file, blocked) == hashlib.sha256(b"some weights").hexdigest()
    assert "cannot remember" in caplog.text


def test_cache_root_is_the_given_folder_or_the_users(tmp_path: Path) -> None:
    assert cache_root(tmp_path) == tmp_path
    assert cache_root(None).name == "kvloom"


def test_write_json_leaves_the_old_file_if_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]
