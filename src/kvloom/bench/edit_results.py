"""What a bench of edits found out, as plain data, and how it is kept from one run to the next.

Knows: the shape of options, outcomes and the report, and of its JSON.
Does not know: how anything was measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from kvloom import RequestError
from kvloom.bench.edit_places import PlaceRule
from kvloom.bench.results import Machine

SCHEMA = "kvloom.bench.edit"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EditOptions:
    """What is measured.

    Attributes:
        model: a folder, hub id, GGUF file or "default".
        places: which part of a file is the document, and what is scored.
        shares: of the stale rows, each a kind of its own; the baselines use the middle one.
        settings: further keyword arguments of kvloom's `LLM`.

    Raises:
        RequestError: a value is out of range.
    """

    model: str = "default"
    places: PlaceRule = field(default_factory=PlaceRule)
    shares: tuple[float, ...] = (0.05, 0.15, 0.3)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
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
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise RequestError(
                f"shares are {self.shares}; give numbers above 0 and up to 1.", param="shares"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One way to carry out one edit.

    Attributes:
        kind: its name.
        rows: rows that were run; those of which only the first layers were run are not counted.
        first_token_s: seconds from the edit to the first token behind the document.
        divergence: mean over the scored tokens of KL(full recompute || kind), in nats.
        agreement: share of the scored tokens at which both find the same one likeliest.
        nll: negative log-likelihood of all scored tokens together, in nats.
        nll_other: that of another continuation; None where there is none.
        fell_back: it was computed exactly, although less was asked for.
        failure: why there is nothing.
    """

    kind: str
    rows: int = 0
    first_token_s: float = 0.0
    divergence: float = 0.0
    agreement: float = 0.0
    nll: float = 0.0
    nll_other: float | None = None
    fell_back: bool = False
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EditResult:
    """One edit in all ways.

    Attributes:
        name: of the edit.
        group: edits that are summed up together.
        tokens: of the new document.
        first_change: tokens before the first change.
        hunks: changes in the document.
        cut: tokens of the file before the document that were cut off.
        scored: tokens that were scored.
        outcomes: one per kind, in order.
        other_cores: cores that other processes kept busy meanwhile; None if it was too short.
    """

    name: str
    group: str
    tokens: int
    first_change: int
    hunks: int
    cut: int
    scored: int
    outcomes: tuple[Outcome, ...]
    other_cores: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EditReport:
    """Everything the runs that a report goes back to found out.

    Attributes:
        started_at: of the first run, ISO 8601 with the time zone.
        duration_s: of all runs.
        source: where the edits come from.
        options: what was asked for.
        model: digest of the weights and formats; figures of others are not mixed.
        machine: where the last run ran.
        kinds: names in the order of the table.
        results: one per edit.
        skipped: edits that were not measured, with the reason.
        interrupted: whether the user ended the last run early.
    """

    started_at: str
    duration_s: float
    source: str
    options: EditOptions
    model: str
    machine: Machine
    kinds: tuple[str, ...]
    results: tuple[EditResult, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    interrupted: bool = False


def dump(report: EditReport, figures: Mapping[str, Any]) -> str:
    """Return a report with its figures; `schema_version` changes when a field changes meaning."""
    content: dict[str, Any] = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **figures}
    content |= TypeAdapter(EditReport).dump_python(report, mode="json")
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def save(text: str, file: Path) -> None:
    """Write a file whole or not at all."""
    draft = file.with_name(f".{file.name}.part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)


def load(file: Path) -> EditReport:
    """Return the report of an earlier run.

    Raises:
        RequestError: the file holds none.
    """
    try:
        content = json.loads(file.read_bytes())
        if (content["schema"], content["schema_version"]) != (SCHEMA, SCHEMA_VERSION):
            raise ValueError(f"it is {content['schema']} {content['schema_version']}")
        return TypeAdapter(EditReport).validate_python(content, strict=False)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise RequestError(
            f"{file} is there and holds no report of edits to go on with "
            f"({str(error).splitlines()[0]}); name another file or remove it."
        ) from error
