"""Where the cases of a bench come from, and how files of any kind become texts and objects.

Knows: lines of JSON, and what counts as text.
Does not know: what a case is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from kvloom import RequestError


class NamedCase(Protocol):
    """Something to measure, with a name that tells it from all others of its source."""

    @property
    def name(self) -> str:
        """Which one it is."""
        ...


C = TypeVar("C", bound=NamedCase)


@dataclass(frozen=True, slots=True)
class Source(Generic[C]):
    """Cases with the name of where they come from.

    Attributes:
        title: for people; reports of another one are not gone on with.
        cases: each with a name of its own.
    """

    title: str
    cases: Iterable[C]


def json_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file of JSON lines, each with the name of its line.

    What is JSON and no object is an object without fields.

    Raises:
        RequestError: a line is no JSON; the message names it.
    """
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RequestError(
                f"{file.name}, line {number}, is no JSON ({error}); give one object a line."
            ) from error
        yield f"line {number}", row if isinstance(row, dict) else {}


def plain_text(data: bytes) -> str | None:
    """Return bytes as text; None if they are binary or no UTF-8."""
    try:
        return None if b"\0" in data else data.decode()
    except UnicodeDecodeError:
        return None
