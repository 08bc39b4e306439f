"""Where joined texts come from: a set of questions with passages, a folder, or Python itself.

Knows: the fields that such sets have, and which files of a folder are texts.
Does not know: tokens, chunks or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from kvloom import RequestError
from kvloom.bench.case_source import json_lines, plain_text

_LARGEST_BYTES = 5_000_000
"""Larger files are no texts that people wrote."""
_ANSWERS = ("answer", "answer_gold", "answers")


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the passages that were found for it.

    Attributes:
        name: tells it from all others of its set.
        passages: texts.
        text: the question.
        answer: the real one; empty where the set has none.
    """

    name: str
    passages: tuple[str, ...]
    text: str
    answer: str


def read_questions(file: Path) -> list[Question]:
    """Return the questions of a file of JSON lines.

    A line has a `question` and `passages`, which are texts or have a `content` or `text` and maybe
    a `title`; it may have an `id` or `key`, and an `answer`, `answer_gold` or `answers`. Of several
    answers, in a list or with slashes between them, the first is taken.

    Raises:
        RequestError: a line is no such object, which the message names, or there is none.
    """
    questions = []
    for place, row in json_lines(file):
        question, listed = row.get("question"), row.get("passages")
        passages = [_passage(one) for one in listed] if isinstance(listed, list) else []
        if not isinstance(question, str) or not passages or None in passages:
            raise RequestError(
                f"{file.name}, {place}, is no question with passages; give an object whose "
                "`question` is a text and whose `passages` are texts or have a `content`."
            )
        name = str(row.get("id", row.get("key", place)))
        texts = tuple(passage for passage in passages if passage is not None)
        questions.append(Question(name, texts, question, _answer(row)))
    if not questions:
        raise RequestError(f"{file.name} holds no question; give one object a line.")
    return questions


def read_folder(folder: Path) -> Iterator[str]:
    """Return the texts of a folder and those below it, by name; hidden ones are left out.

    Raises:
        RequestError: there is none.
    """
    texts = _texts(folder)
    first = next(texts, None)
    if first is None:
        raise RequestError(
            f"{folder} holds no text; name a folder with files in UTF-8 of at most "
            f"{_LARGEST_BYTES:,} bytes.",
            param="folder",
        )
    return chain([first], texts)


def other_passages(questions: Sequence[Question], number: int) -> Iterator[str]:
    """Yield passages of the questions behind one, then of those before it; none of its own."""
    known = set(questions[number].passages)
    for question in (*questions[number + 1 :], *questions[:number]):
        for passage in question.passages:
            if passage not in known:
                known.add(passage)
                yield passage


def _texts(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            fits = path.is_file() and path.stat().st_size <= _LARGEST_BYTES
            text = plain_text(path.read_bytes()) if fits else None
        except OSError:
            continue  # gone meanwhile, or not ours to read
        if text is not None and text.strip():
            yield text


def _passage(given: Any) -> str | None:
    """Return a passage as text, its title in a line before it; None if it is none."""
    if isinstance(given, str):
        return given
    if not isinstance(given, dict):
        return None
    content, title = given.get("content", given.get("text")), given.get("title")
    if not isinstance(content, str):
        return None
    return f"{title}\n{content}" if isinstance(title, str) else content


def _answer(row: dict[str, Any]) -> str:
    given = next((row[name] for name in _ANSWERS if row.get(name)), "")
    if isinstance(given, list):
        given = given[0]
    return given.split("/")[0].strip() if isinstance(given, str) else ""
