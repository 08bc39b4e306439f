"""Files: whole or not at all, and nothing of others is touched."""

from __future__ import annotations

import errno
import os
import time

import pytest

from kvloom.store import files
from kvloom.store.files import PARTIAL, PREFIX, SUFFIX, map_file, remove_orphans, write_atomically

NAME = "ab" * 32


def test_written_files_are_private_and_whole(tmp_path):
    path = tmp_path / "x"
    write_atomically(path, [b"ab", memoryview(b"cd")])
    assert path.read_bytes() == b"abcd"
    assert path.stat().st_mode & 0o777 == 0o600
    write_atomically(path, [b"other"])
    assert path.read_bytes() == b"other"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, call, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, [b"new"])
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(files.os, "write", lambda fd, data: write(fd, data[:3]))
    write_atomically(tmp_path / "x", [bytes(range(100))])
    assert (tmp_path / "x").read_bytes() == bytes(range(100))


def test_mappings_are_private_and_outlive_the_name(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abcd")
    data = map_file(path)
    data[0:1] = b"X"
    assert path.read_bytes() == b"abcd"
    path.unlink()
    assert bytes(data) == b"Xbcd"


def test_what_is_no_plain_file_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    for name in ("link", "folder", "pipe", "empty", "none"):
        with pytest.raises((OSError, ValueError)):
            map_file(tmp_path / name)


def test_only_orphans_of_our_own_are_removed(tmp_path, monkeypatch):
    mine = tmp_path / f"{PREFIX}x{PARTIAL}"
    others = [tmp_path / name for name in (".x.partial", f"{PREFIX}x", "model.safetensors")]
    for path in (mine, *others):
        path.touch()
    seen: list[list[str]] = []
    rename = os.rename

    def look(source: str, target: object) -> None:
        seen.append(remove_orphans(tmp_path))
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", look)
    write_atomically(tmp_path / f"{NAME}{SUFFIX}", [b"x"])
    assert seen == [[mine.name]], "a file that is being written was removed"
    assert files.stored_files(tmp_path) == {NAME: 1}
    assert all(path.exists() for path in others)


def test_a_lock_keeps_others_out_for_a_while_only(tmp_path):
    with files.locked(tmp_path, 1.0):
        before = time.monotonic()
        with files.locked(tmp_path, 0.05):
            assert time.monotonic() - before >= 0.05
    with pytest.raises(OSError, match="none"), files.locked(tmp_path / "none", 1.0):
        pass
