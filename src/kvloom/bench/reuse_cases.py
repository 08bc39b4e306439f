"""Prompts of chunks and a question, made of texts by rule.

Knows: how long a chunk is to be, and how a question is put where nobody asks one.
Does not know: models, or in which order chunks are joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from kvloom.bench.reuse_source import Question, other_passages

_CHARACTERS_PER_TOKEN = 12
"""More than text has; so many characters are looked at to find where a chunk ends."""
_QUOTED = 160
"""Characters that a made question quotes."""
_ASK = "Answer the question with the help of these texts.\n\n"
_READ = "Read these texts.\n\n"


@dataclass(frozen=True, slots=True)
class ReuseCase:
    """One prompt, and what should follow.

    Attributes:
        name: of the prompt.
        lead: text before the chunks.
        chunks: texts, in the order in which an earlier request had them.
        question: text behind them.
        answer: what should follow; empty where nobody knows.
    """

    name: str
    lead: str
    chunks: tuple[str, ...]
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class ChunkRule:
    """What chunks are like.

    Attributes:
        count: of a prompt.
        tokens: of a chunk, about; 0 leaves texts as long as they are.
        length: tokens of a text.
    """

    count: int
    tokens: int
    length: Callable[[str], int]


class Material(Protocol):
    """Texts that prompts are made of."""

    @property
    def title(self) -> str:
        """Where they come from, for people."""
        ...

    def cases(self, rule: ChunkRule) -> Iterator[ReuseCase]:
        """Yield prompts, each with a name of its own."""
        ...


@dataclass(frozen=True, slots=True)
class Questions:
    """Questions, each with passages that were found for it.

    Each of its passages begins a chunk of its own; passages of other questions fill the rest.
    """

    title: str
    questions: Sequence[Question]

    def cases(self, rule: ChunkRule) -> Iterator[ReuseCase]:
        """Yield one prompt per question."""
        for number, question in enumerate(self.questions):
            own = [f"{passage}\n\n" for passage in question.passages]
            rest = (f"{passage}\n\n" for passage in other_passages(self.questions, number))
            filling = Filling((*own[rule.count :], *rest), rule)
            chunks = [filling.next_chunk(text) for text in own[: rule.count]]
            chunks += [filling.next_chunk() for _ in range(rule.count - len(chunks))]
            yield ReuseCase(
                name=question.name,
                lead=_ASK,
                chunks=tuple(chunk for chunk in chunks if chunk),
                question=f"Question: {question.text}\nAnswer:",
                answer=f" {question.answer}" if question.answer else "",
            )


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts that nobody asked about; each prompt quotes one of its chunks and asks what follows."""

    title: str
    texts: Iterable[str]

    def cases(self, rule: ChunkRule) -> Iterator[ReuseCase]:
        """Yield prompts of so many chunks each, in the order of the texts."""
        filling = Filling(self.texts, rule)
        for number in count():
            chunks = [chunk for _ in range(rule.count) if (chunk := filling.next_chunk())]
            if len(chunks) < (rule.count if number else 2):
                return
            # Another place each time: the chunk that is asked about is not always the first.
            question, answer = quote(chunks[number % len(chunks)])
            first = number * rule.count + 1
            name = f"chunks {first} to {first + len(chunks) - 1}"
            yield ReuseCase(name, _READ, tuple(chunks), question, answer)


class Filling:
    """Texts one after the other, from which chunks are taken."""

    def __init__(self, texts: Iterable[str], rule: ChunkRule) -> None:
        self._texts, self._rule, self._rest = filter(str.strip, texts), rule, ""

    def next_chunk(self, start: str = "") -> str:
        """Return a chunk that begins with a text; empty if there is no text left."""
        if self._rule.tokens == 0:
            return start or next(self._texts, "")
        pieces, room = [], self._rule.tokens
        self._rest = start + self._rest if start else self._rest
        while room > 0 and (self._rest or self._another()):
            head, self._rest = cut(self._rest, room, self._rule.length)
            pieces.append(head)
            room = 0 if self._rest else room - self._rule.length(head)
        return "".join(pieces)

    def _another(self) -> bool:
        self._rest = next(self._texts, "")
        return bool(self._rest)


def cut(text: str, tokens: int, length: Callable[[str], int]) -> tuple[str, str]:
    """Return a text's start of about so many tokens, and the rest; words stay whole.

    Args:
        text: not empty.
        tokens: at least 1.
        length: tokens of a text.
    """
    window = text[: _CHARACTERS_PER_TOKEN * tokens]
    found = length(window)
    if found <= tokens:
        return window, text[len(window) :]
    place = max(len(window) * tokens // found, 1)
    blank = max(window.rfind(sign, 0, place) for sign in " \n") + 1
    place = blank or place
    return text[:place], text[place:]


def quote(chunk: str) -> tuple[str, str]:
    """Return a question that quotes lines from the middle of a chunk, and what follows them."""
    middle = chunk.rfind("\n", 0, len(chunk) // 2) + 1 or len(chunk) // 2
    start = chunk.find("\n", max(middle - _QUOTED, 0), middle - 1) + 1 or max(middle - _QUOTED, 0)
    return f"One of these texts goes on behind these lines:\n{chunk[start:middle]}", chunk[middle:]
