"""Kinds: the ways to carry out an edit that are compared, through the public API alone.

Knows: documents, and what each kind does to one.
Does not know: where edits come from, or what their outcomes come to.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from kvloom.bench.case_kinds import EXACT, FIRST_TOKEN, in_all_ways
from kvloom.bench.case_results import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from kvloom import LLM, Document

_SELECTORS = ("mentions", "first", "random")


@dataclass(frozen=True, slots=True)
class Case:
    """One edit as it is measured.

    Attributes:
        name: of the edit.
        group: edits that are summed up together.
        old_tokens: of the document before.
        new_tokens: of the document after.
        change: new tokens up to the first change, and up to its end.
        continuation: text that really follows.
        other: another text whose likelihood is of interest; empty for none.
        hunks: changes in the document.
        cut: tokens of the file before the document.
    """

    name: str
    group: str
    old_tokens: tuple[int, ...]
    new_tokens: tuple[int, ...]
    change: tuple[int, int]
    continuation: str
    other: str = ""
    hunks: int = 1
    cut: int = 0


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to carry out an edit.

    Attributes:
        name: in tables and files.
        way: `replace` asks kvloom for the new text; `ignore` keeps the old document; `drop` lets go
            of everything behind the first change and computes only what that puts in.
        fidelity: of `replace`.
        share: of `replace`.
        selector: of `replace`.
        baseline: of `replace`.
    """

    name: str
    way: Literal["replace", "ignore", "drop"] = "replace"
    fidelity: Literal["exact", "repaired", "shifted"] = "exact"
    share: float = 0.15
    selector: str = "blend"
    baseline: str | None = None


def make_kinds(shares: Sequence[float]) -> tuple[Kind, ...]:
    """Return the kinds in the order of the table, the exact one first: others are held against it.

    Args:
        shares: of the stale rows; other ways to choose rows take the middle one.
    """
    ordered = sorted(shares, reverse=True)
    middle = ordered[len(ordered) // 2]
    return (
        Kind(EXACT),
        *(Kind(f"repaired {share:.0%}", fidelity="repaired", share=share) for share in ordered),
        *(
            Kind(f"{name} {middle:.0%}", fidelity="repaired", share=middle, selector=name)
            for name in _SELECTORS
        ),
        Kind("shifted", fidelity="shifted"),
        Kind("unrotated", fidelity="shifted", baseline="unrotated"),
        Kind("dropped", way="drop"),
        Kind("ignored", way="ignore"),
    )


def measure(llm: LLM, case: Case, kinds: Sequence[Kind]) -> tuple[Outcome, ...]:
    """Carry out an edit in all ways; what kvloom refuses is an outcome with the reason.

    Args:
        llm: without prefix caching, else equal texts would answer for approximate ones.
        case: the edit.
        kinds: the exact one first.

    Raises:
        KvloomError: the document, or the exact edit, cannot be computed.
    """
    found: list[tuple[Outcome, Tensor]] = []
    with closing(llm.document(list(case.old_tokens))) as old:

        def carry_out(kind: Kind) -> tuple[Outcome, Tensor]:
            if kind.way == "replace" and any(outcome.fell_back for outcome, _ in found):
                # kvloom does not approximate this edit: the rest would be the same work again.
                outcome, logits = found[0]
                return replace(outcome, kind=kind.name, fell_back=True), logits
            found.append(_carry_out(llm, old, case, kind))
            return found[-1]

        return in_all_ways(kinds, carry_out)


def _carry_out(llm: LLM, old: Document, case: Case, kind: Kind) -> tuple[Outcome, Tensor]:
    """Carry out one kind; return its outcome without comparison, and the logits (s, v)."""
    with closing(old.fork()) as document:
        begun = time.perf_counter()
        rows, repaired, fell_back = _edit(llm, document, case, kind)
        document.generate("", FIRST_TOKEN)
        first_token_s = time.perf_counter() - begun
        scores, logits = document.score(case.continuation, return_logits=True)
        other = -sum(document.score(case.other)) if case.other else None
    outcome = Outcome(
        kind=kind.name,
        rows=rows,
        repaired=repaired,
        first_token_s=first_token_s,
        nll=-sum(scores),
        nll_other=other,
        fell_back=fell_back,
    )
    return outcome, logits


def _edit(llm: LLM, document: Document, case: Case, kind: Kind) -> tuple[int, int, bool]:
    """Edit a document; return rows run, old ones of them, and whether it was done exactly."""
    if kind.way == "ignore":
        return 0, 0, False
    if kind.way == "drop":
        first, last = case.change
        document.truncate(first)
        document.append_tokens(list(case.new_tokens[first:last]))
        return last - first, 0, False
    receipt = document.replace(
        llm.retokenizer.text(case.new_tokens),
        fidelity=kind.fidelity,
        share=kind.share,
        selector=kind.selector,
        baseline=kind.baseline,
    )
    return receipt.recomputed, receipt.repaired, receipt.fidelity != kind.fidelity
