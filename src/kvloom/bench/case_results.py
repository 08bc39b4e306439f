"""What a bench found out that does one thing in several ways, and how it is kept between runs.

Knows: the shape of options, outcomes and the report, and of its JSON.
Does not know: what is done, or how anything was measured.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import TypeAdapter, ValidationError

from kvloom import RequestError
from kvloom.bench.results import RunReport

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseOptions:
    """What is measured of every case.

    Attributes:
        model: a folder, hub id, GGUF file or "default".
        shares: of the rows that may be computed again, each a kind of its own.
        settings: further keyword arguments of kvloom's `LLM`.

    Raises:
        RequestError: a share is out of range.
    """

    model: str = "default"
    shares: tuple[float, ...] = (0.05, 0.15, 0.3)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise RequestError(
                f"shares are {self.shares}; give numbers above 0 and up to 1.", param="shares"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One way to carry out one case.

    Attributes:
        kind: its name.
        rows: rows that were run; those of which only the first layers were run are not counted.
        repaired: of these, rows whose KV was there already.
        first_token_s: seconds from the request to the first token.
        loaded_bytes: bytes of KV that were brought into memory.
        divergence: mean over the scored tokens of KL(full recompute || kind), in nats.
        agreement: share of the scored tokens at which both find the same one likeliest.
        nll: negative log-likelihood of the expected tokens together, in nats.
        nll_other: that of another continuation; None where there is none.
        fell_back: it was computed exactly, although less was asked for.
        failure: why there is nothing.
    """

    kind: str
    rows: int = 0
    repaired: int = 0
    first_token_s: float = 0.0
    loaded_bytes: int = 0
    divergence: float = 0.0
    agreement: float = 0.0
    nll: float = 0.0
    nll_other: float | None = None
    fell_back: bool = False
    failure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """One case in all ways.

    Attributes:
        name: of the case.
        group: cases that are summed up together.
        tokens: of what stands before the scored ones.
        scored: tokens whose predictions were compared.
        outcomes: one per kind, in order.
        other_cores: cores that other processes kept busy meanwhile; None if it was too short.
    """

    name: str
    group: str
    tokens: int
    scored: int
    outcomes: tuple[Outcome, ...]
    other_cores: float | None = None

    @property
    def expected(self) -> int:
        """Scored tokens whose likelihood is summed up."""
        return self.scored


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseReport(RunReport):
    """Everything the runs that a report goes back to found out.

    Attributes:
        schema: name of the JSON's form.
        noun: what its cases are called.
        source: where the cases come from.
        options: what was asked for.
        model: digest of the weights and formats; figures of others are not mixed.
        kinds: names in the order of the table.
        results: one per case.
        skipped: cases that were not measured, with the reason.
        interrupted: whether the user ended the last run early.
    """

    schema: ClassVar[str]
    noun: ClassVar[str]

    source: str
    options: CaseOptions
    model: str
    kinds: tuple[str, ...]
    results: tuple[CaseResult, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    interrupted: bool = False


R = TypeVar("R", bound=CaseReport)


def dump(report: CaseReport, figures: Mapping[str, Any]) -> str:
    """Return a report with its figures; `schema_version` changes when a field changes meaning."""
    content: dict[str, Any] = {"schema": report.schema, "schema_version": SCHEMA_VERSION, **figures}
    content |= TypeAdapter(type(report)).dump_python(report, mode="json")
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def save(text: str, file: Path) -> None:
    """Write a file whole or not at all."""
    draft = file.with_name(f".{file.name}.part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)


def load(file: Path, kind: type[R]) -> R:
    """Return the report of an earlier run.

    Raises:
        RequestError: the file holds none.
    """
    try:
        content = json.loads(file.read_bytes())
        if (content["schema"], content["schema_version"]) != (kind.schema, SCHEMA_VERSION):
            raise ValueError(f"it is {content['schema']} {content['schema_version']}")
        return TypeAdapter(kind).validate_python(content, strict=False)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise RequestError(
            f"{file} is there and holds no report of {kind.noun} to go on with "
            f"({str(error).splitlines()[0]}); name another file or remove it."
        ) from error


def gone_on_with(earlier: R, fresh: R) -> R:
    """Return an earlier report to be gone on with.

    Raises:
        RequestError: it is about something else.
    """
    for what in ("source", "options", "kinds", "model"):
        then, now = getattr(earlier, what), getattr(fresh, what)
        if then != now:
            raise RequestError(
                f"The report there is of another run: its {what} is {then}, and now it is {now}. "
                "Name another file, or remove it."
            )
    return replace(earlier, machine=fresh.machine, interrupted=False)
