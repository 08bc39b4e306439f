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

from kvloom import KvloomError, SamplingParams
from kvloom.bench.edit_results import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from kvloom import LLM, Document

EXACT = "exact"
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
    assert kinds[0].name == EXACT, "nothing to hold the other kinds against"
    outcomes: list[Outcome] = []
    full: Tensor | None = None
    fell_back = False
    with closing(llm.document(list(case.old_tokens))) as old:
        for kind in kinds:
            if fell_back and kind.way == "replace":
                # kvloom does not approximate this edit: the rest would be the same work again.
                outcomes.append(replace(outcomes[0], kind=kind.name, fell_back=True))
                continue
            try:
                outcome, logits = _carry_out(llm, old, case, kind)
            except KvloomError as error:
                if full is None:
                    raise
                outcomes.append(Outcome(kind=kind.name, failure=str(error)))
                continue
            full = logits if full is None else full
            fell_back = fell_back or outcome.fell_back
            divergence, agreement = compare(full, logits)
            outcomes.append(replace(outcome, divergence=divergence, agreement=agreement))
    return tuple(outcomes)


def compare(full: Tensor, logits: Tensor) -> tuple[float, float]:
    """Return mean KL(full || other) in nats and the share of equal likeliest tokens.

    Args:
        full: fp32 logits (s, v).
        logits: likewise.
    """
    reference, other = full.double().log_softmax(-1), logits.double().log_softmax(-1)
    divergence = (reference.exp() * (reference - other)).sum(-1).clamp_min(0).mean()
    agreement = (full.argmax(-1) == logits.argmax(-1)).double().mean()
    return float(divergence), float(agreement)


def _carry_out(llm: LLM, old: Document, case: Case, kind: Kind) -> tuple[Outcome, Tensor]:
    """Carry out one kind; return its outcome without comparison, and the logits (s, v)."""
    with closing(old.fork()) as document:
        begun = time.perf_counter()
        rows, fell_back = _edit(llm, document, case, kind)
        document.generate("", SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
        first_token_s = time.perf_counter() - begun
        scores, logits = document.score(case.continuation, return_logits=True)
        other = -sum(document.score(case.other)) if case.other else None
    outcome = Outcome(
        kind=kind.name,
        rows=rows,
        first_token_s=first_token_s,
        nll=-sum(scores),
        nll_other=other,
        fell_back=fell_back,
    )
    return outcome, logits


def _edit(llm: LLM, document: Document, case: Case, kind: Kind) -> tuple[int, bool]:
    """Edit a document; return the rows that were run, and whether more was done than asked for."""
    if kind.way == "ignore":
        return 0, False
    if kind.way == "drop":
        first, last = case.change
        document.truncate(first)
        document.append_tokens(list(case.new_tokens[first:last]))
        return last - first, False
    receipt = document.replace(
        llm.retokenizer.text(case.new_tokens),
        fidelity=kind.fidelity,
        share=kind.share,
        selector=kind.selector,
        baseline=kind.baseline,
    )
    return receipt.recomputed, receipt.fidelity != kind.fidelity
