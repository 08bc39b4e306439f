"""Made edits follow from the standard library's text, and change what their names say."""

from __future__ import annotations

import ast
from itertools import islice

from kvloom.bench.edit_made import DEFINITION_ONLY, EVERYWHERE, library_edits, rename_edits
from kvloom.bench.edit_source import CutEdit
from kvloom.bench.prompts import library_modules


def take(count: int) -> list[CutEdit]:
    return list(islice(rename_edits(), count))


def test_renamed_names_are_predicted_where_they_stood() -> None:
    sources = dict(library_modules())
    edits = take(8)
    assert [edit.group for edit in edits] == [EVERYWHERE, DEFINITION_ONLY] * 4
    for edit in edits:
        old, new = edit.other.strip(), edit.continuation.strip()
        text = sources[edit.name.split(".")[0]]
        assert edit.before + edit.other in text, "what follows the old document is the old name"
        assert edit.continuation.replace(new, old) == edit.other
        assert new not in text
        assert edit.before.count(old) >= 2
        renamed = edit.before.count(old) if edit.group == EVERYWHERE else 1
        assert edit.after.count(new) == renamed
        assert edit.after.replace(new, old) == edit.before
        definition = edit.after.index(new)
        assert edit.after[:definition].endswith(("def ", "class "))
        assert 800 <= len(edit.after) - definition <= 8200


def test_made_edits_change_one_place_or_one_name_and_keep_python() -> None:
    edits = list(islice(library_edits(), 6))
    assert len({edit.name for edit in edits}) == 6
    for edit in edits:
        assert edit.before != edit.after
        assert abs(len(edit.before) - len(edit.after)) < 2000
    assert sum(_parses(edit.after) for edit in edits) >= 4, "a line taken out may break a module"


def test_two_runs_make_the_same() -> None:
    assert take(2) == take(2)
    assert list(islice(library_edits(), 3)) == list(islice(library_edits(), 3))


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True
