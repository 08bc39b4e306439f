"""Where edits come from: a git repository's commits, a file of JSON lines, or made ones.

Knows: git's output, and which files are too large.
Does not know: tokens, models, or what is measured on an edit.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvloom import RequestError
from kvloom.bench.case_source import json_lines, plain_text

_LARGEST_BYTES = 200_000
"""Larger files are data or generated."""


@dataclass(frozen=True, slots=True)
class FileEdit:
    """One file before and after a change.

    Attributes:
        name: tells it from all others of its source.
        before: the whole old text.
        after: the whole new text.
    """

    name: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class CutEdit:
    """A document before and after a change, with what follows.

    Attributes:
        name: tells it from all others of its source.
        group: edits that are summed up together.
        before: the old document.
        after: the new document.
        continuation: what follows the new document.
        other: another continuation whose likelihood is of interest.
    """

    name: str
    group: str
    before: str
    after: str
    continuation: str
    other: str


def git_edits(repository: Path) -> Iterator[FileEdit]:
    """Yield the changes of text files in a repository's commits, newest first, merges left out.

    Raises:
        RequestError: git is missing, the folder is no repository, or it has no commit.
    """
    listing = _git(
        repository,
        *("log", "--no-merges", "--diff-filter=M", "--raw", "--no-abbrev", "--no-renames", "-z"),
        *("--no-ext-diff", "--no-textconv", "--no-show-signature", "--format=format:%x01%H"),
    )
    for commit in listing.split(b"\x01")[1:]:
        revision, _, changes = commit.partition(b"\n")
        fields = changes.rstrip(b"\0").split(b"\0")
        for change, path in zip(fields[::2], fields[1::2], strict=False):
            _, _, old, new, _ = change.decode().removeprefix(":").split(" ")
            before, after = _text(repository, old), _text(repository, new)
            if before is not None and after is not None:
                name = f"{revision.decode()[:10]}:{path.decode(errors='replace')}"
                yield FileEdit(name, before, after)


def checkout_around(folder: Path) -> Path | None:
    """Return the repository that a folder lies in; None without one, without commits or git."""
    try:
        top = _git(folder, "rev-parse", "--show-toplevel").decode().rstrip("\n")
        _git(folder, "rev-parse", "--verify", "HEAD")
    except RequestError:
        return None
    return Path(top)


def read_edits(file: Path) -> Iterator[FileEdit]:
    """Yield the edits of a file of JSON lines with `before`, `after` and, if it has one, `id`.

    Raises:
        RequestError: a line is no such object; the message names it.
    """
    for place, row in json_lines(file):
        before, after = row.get("before"), row.get("after")
        if not isinstance(before, str) or not isinstance(after, str):
            raise RequestError(
                f"{file.name}, {place}, is no edit; give an object whose `before` and "
                "`after` are texts."
            )
        yield FileEdit(str(row.get("id", place)), before, after)


def _text(repository: Path, blob: str) -> str | None:
    """Return a blob's text; None if it is large, binary or no UTF-8."""
    size = int(_git(repository, "cat-file", "-s", blob))
    if size > _LARGEST_BYTES:
        return None
    return plain_text(_git(repository, "cat-file", "blob", blob))


def _git(repository: Path, *arguments: str) -> bytes:
    program = shutil.which("git")
    if program is None:
        raise RequestError("git is not installed; install it, or give edits in a file.")
    command: Sequence[str] = (program, "-C", str(repository), *arguments)
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise RequestError(
            f"git {arguments[0]} failed in {repository} ({said[0] if said else done.returncode}); "
            "name a repository with commits.",
            param="repo",
        )
    return done.stdout
