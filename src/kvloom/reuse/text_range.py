"""Ranges of a text as editors send them.

Knows: lines, columns and the units they are counted in.
Does not know: tokens or documents.
"""

from __future__ import annotations

import re
from typing import Literal

from kvloom.errors import RequestError

ColumnUnit = Literal["utf-8", "utf-16", "utf-32"]
LineColumn = tuple[int, int]
_UNITS: dict[ColumnUnit, tuple[str, int]] = {
    "utf-8": ("utf-8", 1),
    "utf-16": ("utf-16-le", 2),
    "utf-32": ("utf-32-le", 4),
}
_LINE_END = re.compile(r"\r\n|\n|\r")


def line_column_range(
    text: str, start: LineColumn, end: LineColumn, encoding: ColumnUnit = "utf-16"
) -> tuple[int, int]:
    """Return the characters from start to end - 1 that lines and columns name, both from zero.

    Source: Language Server Protocol 3.17, Position; deviation: a column behind the end of its
    line is refused, because a client that sends one sees another text.

    Args:
        text: lines end with `\\n`, `\\r\\n` or `\\r`.
        start: line and column of the first character.
        end: line and column behind the last.
        encoding: columns count code units of this encoding.

    Raises:
        RequestError: there is no such place, or the end lies before the start.
    """
    if encoding not in _UNITS:
        raise RequestError(
            f"Columns are counted in utf-8, utf-16 or utf-32, not in {encoding!r}.",
            param="encoding",
        )
    first, last = _character(text, start, encoding), _character(text, end, encoding)
    if last < first:
        raise RequestError(
            f"The range ends at line {end[0]}, column {end[1]}, before it starts at line "
            f"{start[0]}, column {start[1]}; give the earlier place first.",
            param="range",
        )
    return first, last


def _character(text: str, place: LineColumn, encoding: ColumnUnit) -> int:
    line, column = place
    begin, stop = _line_range(text, line)
    name, width = _UNITS[encoding]
    units = text[begin:stop].encode(name)
    head = units[: max(column, 0) * width]
    try:
        if len(head) != column * width:
            raise ValueError(column)
        return begin + len(head.decode(name))
    except ValueError as error:  # a UnicodeDecodeError is one
        raise RequestError(
            f"Line {line} has no place {column}, counted in {encoding}, or it lies inside a "
            "character; the text may be another than the client's.",
            param="range",
        ) from error


def _line_range(text: str, line: int) -> tuple[int, int]:
    """Return a line's first character, and its end without what ends it."""
    begin = number = 0
    for found in _LINE_END.finditer(text):
        if number == line:
            return begin, found.start()
        begin = found.end()
        number += 1
    if number == line:
        return begin, len(text)
    raise RequestError(
        f"The text has {number + 1} lines and no line {line}, counted from zero; the text may be "
        "another than the client's.",
        param="range",
    )
