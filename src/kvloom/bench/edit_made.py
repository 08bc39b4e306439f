"""Made edits: where no repository is at hand, and where it must be known what an edit changes.

Knows: Python's syntax, and which names of a module are defined once and used later.
Does not know: tokens, models, or what is measured on an edit.

Everything follows from the modules' text: two runs make the same edits.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

from kvloom.bench.edit_source import CutEdit, FileEdit
from kvloom.bench.prompts import library_modules

_NEW_FUNCTIONS = ("collect_entries", "resolve_target", "apply_rules", "load_segment", "merge_runs")
_NEW_CLASSES = ("EntryCollector", "TargetResolver", "RuleTable", "SegmentLoader", "RunMerger")
_DISTANCE = (800, 8000)
"""Characters between a definition and the use that is predicted."""
_LEAD = 1500
"""Characters before a definition that belong to the document."""
_PER_MODULE = 2
_ADDED = "# One entry at a time: the order decides.\nKEPT_ENTRIES = 12\n"

EVERYWHERE = "renamed everywhere"
DEFINITION_ONLY = "definition renamed"


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that a module defines.

    Attributes:
        old: the name.
        new: what it is renamed to.
        places: where it stands, the definition first.
    """

    old: str
    new: str
    places: tuple[int, ...]


def library_edits() -> Iterator[FileEdit]:
    """Yield one edit per module: a name renamed in its first half, lines put in, one taken out."""
    ways = cycle((_renamed, _inserted, _deleted))
    for module, text in library_modules():
        after = next(ways)(text)
        if after is not None:
            yield FileEdit(module, text, after)


def rename_edits() -> Iterator[CutEdit]:
    """Yield renamed functions and classes, each cut where the new name must come next.

    Once the definition and all uses are renamed, once the definition only, so that what lies
    between speaks of the old name still.

    Source: the rename test beside the measurements of PIE (He et al. 2025); ours.
    """
    for module, text in library_modules():
        for name in _names(text)[:_PER_MODULE]:
            first, last = name.places[0], _predicted(name)
            start = text.rfind("\n", 0, max(first - _LEAD, 0)) + 1
            # The blank before a word belongs to its token.
            blank = " " if text[last - 1] == " " else ""
            before = text[start : last - len(blank)]
            within = [place - start for place in name.places if place < last]
            for group, places in ((EVERYWHERE, within), (DEFINITION_ONLY, within[:1])):
                yield CutEdit(
                    name=f"{module}.{name.old}, {group}",
                    group=group,
                    before=before,
                    after=_with(before, name, places),
                    continuation=blank + name.new,
                    other=blank + name.old,
                )


def _renamed(text: str) -> str | None:
    names = _names(text)
    if not names:
        return None
    places = names[0].places
    return _with(text, names[0], places[: len(places) // 2 + 1])


def _inserted(text: str) -> str | None:
    place = text.find("\n\n", len(text) // 3) + 2
    return text[:place] + _ADDED + text[place:] if place > 1 else None


def _deleted(text: str) -> str | None:
    start = text.find("\n", len(text) // 3) + 1
    stop = text.find("\n", start) + 1
    return text[:start] + text[stop:] if 0 < start < stop else None


def _names(text: str) -> list[_Name]:
    """Return names that a module defines at its top and uses far enough behind."""
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError):
        return []
    found = []
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        words = rf"\b{re.escape(node.name)}\b"
        places = tuple(match.start() for match in re.finditer(words, text))
        choice = _NEW_CLASSES if isinstance(node, ast.ClassDef) else _NEW_FUNCTIONS
        new = next((name for name in choice if name not in text), None)
        definition = re.search(rf"^(?:def|class) +({words})", text, re.MULTILINE)
        if new is None or definition is None or not places or places[0] != definition.start(1):
            continue
        name = _Name(node.name, new, places)
        if len(node.name) > 3 and _predicted(name) > 0:
            found.append(name)
    return found


def _predicted(name: _Name) -> int:
    """Return the last use at a fit distance that has another one before it; 0 if there is none."""
    first, *uses = name.places
    fit = [use for use in uses[1:] if _DISTANCE[0] <= use - first <= _DISTANCE[1]]
    return fit[-1] if fit else 0


def _with(text: str, name: _Name, places: tuple[int, ...] | list[int]) -> str:
    for place in reversed(places):
        text = text[:place] + name.new + text[place + len(name.old) :]
    return text
