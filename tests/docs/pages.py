"""Reads the documentation: its pages, and the fenced code in them.

Knows: Markdown's fences and which files are pages.
Does not know: what any code does.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """A fenced block of a page.

    Attributes:
        page: the file.
        line: number of its first line of code.
        language: the word behind the opening fence.
        code: the block, without common indentation.
    """

    page: Path
    line: int
    language: str
    code: str


def name_of(page: Path) -> str:
    """Return how a page is called in the names of tests."""
    return str(page.relative_to(ROOT))


def fences(page: Path, *languages: str) -> list[Fence]:
    """Return the fenced blocks of a page in these languages."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        indent, language, body = match.groups()
        code = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        line = text.count("\n", 0, match.start(3)) + 1
        if language in languages:
            found.append(Fence(page, line, language, code))
    return found


def prose(page: Path) -> str:
    """Return a page without its fenced blocks and inline code."""
    return re.sub(r"`[^`\n]+`", "", _FENCE.sub("", page.read_text(encoding="utf-8")))


def command_lines(page: Path) -> list[tuple[int, list[str]]]:
    """Return the commands a page shows behind `$`, as words, with their line numbers."""
    found = []
    for fence in fences(page, "console", "bash", "sh"):
        joined = fence.code.replace("\\\n", "  ")
        for offset, line in enumerate(joined.splitlines()):
            if line.startswith("$ "):
                found.append((fence.line + offset, shlex.split(line[2:])))
    return found


def inline_commands(page: Path) -> list[list[str]]:
    """Return the inline code of a page that begins with `kvloom `, as words."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [shlex.split(code) for code in re.findall(r"`(kvloom [^`\n]+)`", text)]
