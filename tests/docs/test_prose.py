"""The pages keep to the manners of the house: plain words, no paths of one machine, titles."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT, name_of, prose

# What is said to be simple is not simpler for it, and what is praised is not better.
BANNED = re.compile(
    r"\b(simply|just|obviously|easily|seamless\w*|powerful|blazing\w*|cutting-edge|leverag\w+)\b",
    re.IGNORECASE,
)
AMERICAN = re.compile(r"\b(\w+iz(?:e[ds]?|ing|ation)s?|behaviors?|colors?|neighbors?)\b", re.I)
NO_WORDS_OF_OURS = {"size", "sizes", "sized", "seize", "prize"}
NO_WORDS_OF_OURS |= {"tokenize", "detokenize", "retokenize"}  # names in code
MACHINE_PATHS = re.compile(r"(?<![\w.])/(work|tmp|root|home|mnt)/")
WRITTEN = [page for page in PAGES if page.read_text(encoding="utf-8").strip()]
GENERATED = {ROOT / "docs" / "models.md"}


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_words_are_plain(page: Path) -> None:
    assert not BANNED.findall(prose(page))


@pytest.mark.parametrize("page", [p for p in WRITTEN if p not in GENERATED], ids=name_of)
def test_spelling_is_british(page: Path) -> None:
    found = {word.lower() for word in AMERICAN.findall(prose(page))}
    assert found - NO_WORDS_OF_OURS == set()


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_no_path_of_a_machine(page: Path) -> None:
    assert not MACHINE_PATHS.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "adr").glob("0*.md")), ids=name_of)
def test_decisions_have_their_parts(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {page.name[:4]} ")
    parts = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert parts == ["Context", "Decision", "Measured reason", "Consequences"]


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = [int(page.name[:4]) for page in sorted((ROOT / "docs" / "adr").glob("0*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))
