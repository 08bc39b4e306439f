"""Questions and texts are read from files of real forms; what is neither is named or left out."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvloom import RequestError
from kvloom.bench.reuse_source import Question, other_passages, read_folder, read_questions


def questions(file: Path, *rows: object) -> list[Question]:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_questions(file)


def row(**changes: Any) -> dict[str, Any]:
    return {"question": "why", "passages": ["because"], **changes}


def test_fields_of_real_sets_are_known(tmp_path: Path) -> None:
    titled = [{"title": "T", "content": "c"}, {"text": "t"}, "plain"]
    found = questions(
        tmp_path / "set.jsonl",
        {"key": 0, "question": "who", "passages": titled, "answer_gold": "Ben/Benjamin"},
        {"id": "a", "question": "where", "passages": ["x"], "answers": ["Rome", "Roma"]},
        {"question": "why", "passages": ["y"]},
    )
    assert found == [
        Question("0", ("T\nc", "t", "plain"), "who", "Ben"),
        Question("a", ("x",), "where", "Rome"),
        Question("line 3", ("y",), "why", ""),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        *({"question": None}, {"question": 7}, {"passages": None}, {"passages": []}),
        *({"passages": "text"}, {"passages": [7]}, {"passages": [{"title": "only"}]}),
    ],
)
def test_what_is_no_question_is_named_by_its_line(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(RequestError, match=r"set\.jsonl, line 2, is no question with passages"):
        questions(tmp_path / "set.jsonl", row(), row(**changes))


def test_a_set_without_questions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no question"):
        questions(tmp_path / "set.jsonl")


def test_passages_of_others_are_none_of_its_own_and_come_once() -> None:
    made = [
        Question(str(number), passages, "", "")
        for number, passages in enumerate([("a", "b"), ("b", "c"), ("d",), ("c", "a")])
    ]
    assert list(other_passages(made, 1)) == ["d", "a"]
    assert list(other_passages(made, 3)) == ["b", "d"]
    assert list(other_passages(made[:1], 0)) == []


def test_texts_of_a_folder_come_by_name(tmp_path: Path) -> None:
    files = {"b.txt": b"two", "a/deep.md": "eins ß".encode(), ".git/config": b"hidden"}
    files |= {"picture": b"\x89PNG\0", "latin": b"\xe9", "empty": b" \n", ".hidden": b"no"}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    os.symlink(tmp_path / "nowhere", tmp_path / "broken")
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(6_000_000)
    assert list(read_folder(tmp_path)) == ["eins ß", "two"]


def test_a_folder_without_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no text; name a folder"):
        read_folder(tmp_path)


@pytest.mark.shared_data
def test_the_real_set_is_read(shared_data: Path) -> None:
    found = read_questions(shared_data / "followrag_ifnq_200.jsonl")
    assert len({question.name for question in found}) == len(found) == 200
    assert all(len(question.passages) == 3 for question in found)
    assert all(question.answer and "/" not in question.answer for question in found)
    assert found[0].answer == "Gravity"
