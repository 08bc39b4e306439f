"""Lines and bytes of any kind become objects and texts, or an error that names the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom import RequestError
from kvloom.bench.case_source import json_lines, plain_text

objects = st.dictionaries(st.text(), st.text() | st.integers() | st.none(), max_size=3)


@given(rows=st.lists(objects, max_size=4), blanks=st.lists(st.integers(0, 2), max_size=4))
def test_objects_come_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], blanks: list[int]
) -> None:
    file = tmp_path_factory.getbasetemp() / "rows.jsonl"
    lines: list[str] = []
    for number, row in enumerate(rows):
        lines += [" "] * (blanks[number] if number < len(blanks) else 0)
        lines.append(json.dumps(row, ensure_ascii=False))
    file.write_text("\n".join(lines), encoding="utf-8")
    read = list(json_lines(file))
    assert [row for _, row in read] == rows
    for place, row in read:
        assert json.loads(lines[int(place.removeprefix("line ")) - 1]) == row


def test_what_is_json_and_no_object_has_no_fields(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('7\n[]\nnull\n"a"\n{}')
    assert [row for _, row in json_lines(file)] == [{}] * 5


@pytest.mark.parametrize("line", [b"{", b"\xff\xfe", b"{} {}", b"nothing"])
def test_garbage_is_named_by_its_line(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"a": 1}\n\n' + line)
    rows = json_lines(file)
    assert next(rows) == ("line 1", {"a": 1})
    with pytest.raises(RequestError, match=r"rows\.jsonl, line 3, is no JSON"):
        next(rows)


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_texts_are_read_as_they_are(text: str) -> None:
    assert plain_text(text.encode()) == text
    assert plain_text(text.encode() + b"\0") is None
    assert plain_text(text.encode() + b"\xff") is None
