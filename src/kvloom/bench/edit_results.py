"""What a bench of edits found out, as plain data.

Knows: the shape of its options, results and report.
Does not know: how anything was measured.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from kvloom import RequestError
from kvloom.bench.case_results import CaseOptions, CaseReport, CaseResult
from kvloom.bench.edit_places import PlaceRule


@dataclass(frozen=True, slots=True, kw_only=True)
class EditOptions(CaseOptions):
    """What is measured of every edit.

    Attributes:
        places: which part of a file is the document, and what is scored.

    Raises:
        RequestError: a value is out of range.
    """

    places: PlaceRule = field(default_factory=PlaceRule)

    def __post_init__(self) -> None:
        # A class with slots is made anew by its decorator, which `super()` without arguments
        # does not survive.
        CaseOptions.__post_init__(self)
        for name in ("behind", "scored", "context"):
            value = getattr(self.places, name)
            if value < (name != "behind"):
                raise RequestError(f"{name} is {value}; give a larger number.", param=name)
        if self.places.context <= self.places.behind:
            raise RequestError(
                f"context is {self.places.context}, which leaves no room for a change before "
                f"{self.places.behind} unchanged tokens; raise it.",
                param="context",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EditResult(CaseResult):
    """One edit in all ways.

    Attributes:
        first_change: tokens before the first change.
        hunks: changes in the document.
        cut: tokens of the file before the document that were cut off.
    """

    first_change: int
    hunks: int
    cut: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EditReport(CaseReport):
    """Everything the runs that a report of edits goes back to found out."""

    schema: ClassVar[str] = "kvloom.bench.edit"
    noun: ClassVar[str] = "edits"

    options: EditOptions
    results: tuple[EditResult, ...] = ()
