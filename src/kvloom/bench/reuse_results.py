"""What a bench of joined chunks found out, as plain data.

Knows: the shape of its options, results and report.
Does not know: how anything was measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvloom import RequestError
from kvloom.bench.case_results import CaseOptions, CaseReport, CaseResult

_LEAST = {"chunks": 2, "chunk_tokens": 0, "scored": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseOptions(CaseOptions):
    """What is measured of every prompt.

    Attributes:
        chunks: of a prompt.
        chunk_tokens: of a chunk, about; 0 leaves texts as long as they are.
        scored: tokens that are scored.
        seed: of the order that chunks are joined in.
        from_disk: whether the engine restarts between the earlier request and the measured one.

    Raises:
        RequestError: a value is out of range.
    """

    chunks: int = 8
    chunk_tokens: int = 512
    scored: int = 24
    seed: int = 0
    from_disk: bool = False

    def __post_init__(self) -> None:
        # A class with slots is made anew by its decorator, which `super()` without arguments
        # does not survive.
        CaseOptions.__post_init__(self)
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise RequestError(f"{name} is {value}; it must be at least {least}.", param=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseResult(CaseResult):
    """One prompt joined in all ways.

    Attributes:
        chunks: that were joined.
        answered: scored tokens that are the real answer's; 0 where there is none.
    """

    chunks: int
    answered: int

    @property
    def expected(self) -> int:
        """Scored tokens whose likelihood is summed up: the answer's, or all of them."""
        return self.answered or self.scored


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseReport(CaseReport):
    """Everything the runs that a report of joined chunks goes back to found out."""

    schema: ClassVar[str] = "kvloom.bench.reuse"
    noun: ClassVar[str] = "prompts"

    options: ReuseOptions
    results: tuple[ReuseResult, ...] = ()
