"""Edits are read from real git repositories and from files; what is no text is left out."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from kvloom import RequestError
from kvloom.bench.edit_source import FileEdit, checkout_around, git_edits, read_edits


class Repository:
    """A git repository that is being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.git("init", "-q", "-b", "main")

    def git(self, *arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(self.folder), *identity, *arguments], check=True)

    def commit(self, **files: bytes | None) -> None:
        self.write({name.replace("_", "."): data for name, data in files.items()})

    def write(self, files: dict[str, bytes | None]) -> None:
        for name, data in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink() if data is None else path.write_bytes(data)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "one more")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path / "repository")


def texts(edits: list[FileEdit]) -> list[tuple[str, str]]:
    return [(edit.before, edit.after) for edit in edits]


def test_changes_come_newest_first_with_their_whole_texts(repository: Repository) -> None:
    repository.commit(a_py=b"one\n", b_py=b"1\n")
    repository.commit(a_py=b"two\n")
    repository.commit(a_py="drei ß\n".encode(), b_py=b"2\n")
    edits = list(git_edits(repository.folder))
    assert texts(edits) == [("two\n", "drei ß\n"), ("1\n", "2\n"), ("one\n", "two\n")]
    assert len({edit.name for edit in edits}) == 3
    assert edits[0].name.endswith(":a.py")
    assert list(git_edits(repository.folder)) == edits


def test_new_removed_binary_broken_and_huge_files_are_no_edits(repository: Repository) -> None:
    start = {"a": b"x\0y", "b": b"\xff\xfe", "c": b"z" * 300_000, "gone": b"1", "ok": b"1"}
    repository.write(dict(start))
    repository.write({name: data + b"!" for name, data in start.items()} | {"new": b"1"})
    repository.write({"gone": None, "c": b"small", "b": b"good"})
    assert [edit.name.split(":")[1] for edit in git_edits(repository.folder)] == ["gone", "ok"]


@pytest.mark.parametrize("name", ["with blank.py", "ümlaut.py", "new\nline", "-dash", '"quoted"'])
def test_any_name_of_a_file_is_read(repository: Repository, name: str) -> None:
    repository.write({f"folder/{name}": b"1"})
    repository.write({f"folder/{name}": b"2"})
    (edit,) = git_edits(repository.folder)
    assert (edit.before, edit.after) == ("1", "2")
    assert edit.name.endswith(f":folder/{name}")


def test_merges_and_modes_are_no_edits(repository: Repository) -> None:
    repository.commit(a_py=b"1\n2\n3\n", b_py=b"1\n")
    repository.git("checkout", "-q", "-b", "side")
    repository.commit(a_py=b"1\n2\n4\n")
    repository.git("checkout", "-q", "main")
    repository.commit(b_py=b"2\n")
    repository.git("merge", "-q", "side", "-m", "both")
    assert sorted(texts(list(git_edits(repository.folder)))) == [
        ("1\n", "2\n"),
        ("1\n2\n3\n", "1\n2\n4\n"),
    ]


def test_without_commits_or_repository_the_error_says_so(
    repository: Repository, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=r"git log failed.*name a repository with commits"):
        list(git_edits(repository.folder))
    assert checkout_around(repository.folder) is None
    (tmp_path / "plain").mkdir()
    assert checkout_around(tmp_path / "plain") is None
    repository.commit(a_py=b"1")
    assert list(git_edits(repository.folder)) == []
    repository.write({"deep/er/a": b"1"})
    assert checkout_around(repository.folder / "deep" / "er") == repository.folder.resolve()


def test_without_git_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RequestError, match="git is not installed"):
        list(git_edits(tmp_path))
    assert checkout_around(tmp_path) is None


def test_lines_are_read_with_their_names(tmp_path: Path) -> None:
    file = tmp_path / "edits.jsonl"
    rows = [
        {"id": "first", "before": "a\u2028b", "after": "", "more": 1},
        {"before": "", "after": "ü"},
    ]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text(f"{lines[0]}\n\n  \n{lines[1]}\n", encoding="utf-8")
    assert list(read_edits(file)) == [
        FileEdit("first", "a\u2028b", ""),
        FileEdit("line 4", "", "ü"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        *(b"{", b"7", b"[]", b"null", b'"before"', b"{}", b"\xff\xfe", b'{"before": "a"}'),
        *(b'{"before": 1, "after": ""}', b'{"before": "a", "after": null}'),
    ],
)
def test_garbage_is_named_by_its_line(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "edits.jsonl"
    good = b'{"before": "a", "after": "b"}'
    file.write_bytes(b"\n".join([good, good, line, good]))
    edits = read_edits(file)
    assert [next(edits).after, next(edits).after] == ["b", "b"]
    with pytest.raises(RequestError, match=r"edits\.jsonl, line 3, is no"):
        next(edits)
